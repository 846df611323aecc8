"""Saved models: a folder of safetensors and JSON that carries no code and is checked before it is believed.

``config.json``      model name, config, versions, the model's plain values
``recipe.json``      genes in order, unit, encoder, tiles, graph, nuclei, training provenance, scores
``model.safetensors``  fitted arrays
``README.md``        a short card for people
``manifest.json``    format version and the SHA-256 of each file above
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .._files import publish, staged
from .._version import __version__
from ..errors import CheckpointError, DataValueError, HespotexError
from ._base import Model, config_to_json
from ._recipe import Recipe

__all__ = ["load", "save"]

FORMAT = 1
_FILES = ("config.json", "recipe.json", "model.safetensors", "README.md")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(model: Model, recipe: Recipe) -> str:
    sections = ", ".join(str(entry.get("name")) for entry in recipe.training.get("sections", ()))
    return (
        f"# {model.info.name}\n\n{model.info.summary}\n\n"
        f"- predicts {len(recipe.genes)} genes, unit `{recipe.unit}`\n"
        f"- reads embedding `{recipe.embedding_key}` ({recipe.n_features} features)\n"
        f"- trained on: {sections or 'not recorded'}\n"
        f"- written by hespotex {__version__}\n"
        + (f"- paper: https://doi.org/{model.info.paper}\n" if model.info.paper else "")
    )


def save(model: Model, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `model` to the folder `path`; it appears there only when whole.

    Raises
    ------
    DataValueError
        If the model is not fitted, or `path` exists and `overwrite` is false, or it exists and is not a saved model.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if not model.is_fitted:
        raise DataValueError("model is not fitted; there is nothing to save")
    if path.exists():
        if not overwrite:
            raise DataValueError(f"path={str(path)!r} exists; pass overwrite=True to replace it")
        if not (path / "manifest.json").is_file():
            raise DataValueError(f"path={str(path)!r} exists and is not a saved model; it is left alone")
    recipe = model.recipe or Recipe(genes=model.genes, unit=model.unit, n_features=model.n_features)
    arrays, values = model.state()
    config = {
        "model": model.info.name,
        "config": config_to_json(model.config),
        "values": values,
        "history": model.history,
        "fitted_on": list(model.fitted_on),
        "hespotex_version": __version__,
    }
    with staged(path) as folder:
        part = folder / "model"
        part.mkdir()
        (part / "config.json").write_text(json.dumps(config, indent=1))
        (part / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=1))
        (part / "README.md").write_text(_card(model, recipe))
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part / "model.safetensors")
        manifest = {"format": FORMAT, "files": {name: _digest(part / name) for name in _FILES}}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        publish(part, path)
    return path


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} of the saved model {str(path.parent)!r} cannot be read: {error}") from error


def load(path: str | Path) -> Model:
    """Load a model saved by :meth:`Model.save`; nothing is unpickled and no code runs.

    Parameters
    ----------
    path
        Folder written by ``model.save(path)``.

    Raises
    ------
    CheckpointError
        If the folder is missing, incomplete, altered, from a newer version, or not in this format
        (pickled checkpoints are never read).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if path.is_file():
        raise CheckpointError(
            f"path={str(path)!r} is a file; a saved model is a folder written by model.save(path). "
            "Pickled checkpoints (.pt, .pth, .ckpt, .pkl) are not read: they can run code."
        )
    if not path.is_dir():
        raise CheckpointError(f"path={str(path)!r} does not exist; save a model there with model.save(path)")
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"path={str(path)!r} holds no manifest.json: not a saved hespotex model")
    manifest = _read_json(path / "manifest.json")
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"the manifest of {str(path)!r} names no known format")
    if version > FORMAT:
        raise CheckpointError(
            f"the model in {str(path)!r} has format {version}, this hespotex {__version__} reads up to {FORMAT}; "
            "upgrade hespotex"
        )
    listed = manifest.get("files")
    for name in _FILES:
        if not (path / name).is_file():
            raise CheckpointError(f"the saved model {str(path)!r} lacks {name}")
        if not isinstance(listed, dict) or _digest(path / name) != listed.get(name):
            raise CheckpointError(
                f"{name} of the saved model {str(path)!r} was altered or truncated since it was saved"
            )
    config = _read_json(path / "config.json")
    try:
        from ._registry import get

        model = get(config["model"])(config["config"])
        arrays = load_file(path / "model.safetensors")
        recipe = Recipe.from_json(_read_json(path / "recipe.json"))
        model.recipe = recipe
        model.genes, model.unit, model.n_features = recipe.genes, recipe.unit, recipe.n_features
        model.history, model.scores = config["history"], dict(recipe.scores)
        model.fitted_on = tuple(config.get("fitted_on", ()))
        model.load_state(arrays, config["values"])
        model._fitted = True
    except CheckpointError:
        raise
    except (HespotexError, KeyError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the saved model {str(path)!r} does not fit this hespotex: {error}") from error
    return model
