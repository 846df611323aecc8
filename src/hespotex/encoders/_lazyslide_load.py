"""Loading the models of lazyslide-models, without running code that lies in or beside their weights."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any

from .._logging import logger
from .._optional import optional_import
from ..errors import CheckpointError, DataValueError, MissingDependencyError, MissingWeightsError
from ._hub import TIMM_FILES, cached_file
from ._published import PUBLISHED
from ._weights import known_as, read_state_dict, remember_as

__all__ = ["LOADS", "agree", "hub_id_of", "load", "own_file", "remember", "runs_code"]

_HUB_URL = "https://huggingface.co/"
_CHECKPOINT = "PyTorch checkpoint"


@dataclass(frozen=True)
class _Loads:
    """What a class loads that is given `model_path`, and which file it asks the hub for without."""

    what: str
    hub_id: str
    files: tuple[str, ...] = TIMM_FILES


# All classes have that argument; those not listed here ignore it. That of ConceptCLIP is a folder with its code in it.
LOADS = {
    "conch": _Loads(_CHECKPOINT, "MahmoodLab/conch", ("pytorch_model.bin",)),
    "crisp": _Loads(_CHECKPOINT, "FTZhou/CRISP", ("CRISP.pth",)),
    "crown": _Loads(_CHECKPOINT, "LexieK/Crown", ("CROWN.pth",)),
    "gigapath-flash": _Loads(_CHECKPOINT, "prov-gigapath/prov-gigapath-flash", ("pytorch_model.bin",)),
    "keep": _Loads("safetensors file", "Astaxanthin/KEEP", ("model.safetensors",)),
    "omiclip": _Loads(_CHECKPOINT, "WangGuangyuLab/Loki", ("checkpoint.pt",)),
    "plip": _Loads("folder", "vinid/plip"),
    "uni": _Loads(_CHECKPOINT, "MahmoodLab/uni"),
    "uni2": _Loads(_CHECKPOINT, "MahmoodLab/UNI2-h"),
}
# What a folder must hold: one file of each row.
_IN_FOLDER = (
    ("config.json",),
    (*TIMM_FILES, *(f"{name}.index.json" for name in TIMM_FILES)),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json"),
)
_FOREIGN_CODE = re.compile(r"trust_remote_code\s*=\s*True|torch\.hub\.load\(")
_AGREED: set[str] = set()  # encoders whose publishers' code the user let run in this session
_ENVIRONMENT = RLock()
_DATA_ONLY, _WITH_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def runs_code(kind: Any) -> bool:
    """Whether the loader runs Python code that it takes from the hub, or that cannot be told."""
    classes = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "lazyslide_models"]
    try:
        return any(_FOREIGN_CODE.search(inspect.getsource(base)) for base in classes)
    except (OSError, TypeError):
        return True


def agree(kind: Any, name: str, *, trust_remote_code: bool) -> None:
    """Note that the user lets code of the publishers run, which holds for the session.

    Raises
    ------
    DataValueError
        If there is such code, and the user does not.
    """
    if trust_remote_code:
        _AGREED.add(name)
    if runs_code(kind) and name not in _AGREED:
        raise DataValueError(
            f"the loader of encoder {name!r} runs Python code that its publishers put beside the weights "
            f"({kind.hf_url or kind.github_url}), with all your rights. If you have read it and trust it: "
            f"hx.encoders.create({name!r}, trust_remote_code=True), after which the name alone will do in this session"
        )


def own_file(kind: Any, name: str, weights: str | Path | None, sha256: str | None) -> Path | None:
    """The file or folder to load; ``None`` leaves it to the loader.

    Raises
    ------
    DataValueError
        If the loader takes none.
    MissingWeightsError
        If there is no such file or folder.
    """
    loads = LOADS.get(_key(name))
    if weights is None:
        known = None if loads is None else _known(loads, name, sha256)
        if known:
            logger.info("encoder %r: weights are %s, as given before", name, known)
        return known
    if loads is None:
        why = "ignores files, or runs the code that lies beside them" if runs_code(kind) else "ignores files"
        raise DataValueError(f"encoder {name!r} takes no weights=: its loader in lazyslide-models {why}{_else(kind)}")
    path = Path(weights).expanduser()
    if not (path.is_dir() if loads.what == "folder" else path.is_file()):
        raise MissingWeightsError(
            f"encoder {name!r}: weights={str(weights)!r} is not a {loads.what}, which its loader takes"
        )
    return path


def _known(loads: _Loads, name: str, sha256: str | None) -> Path | None:
    """A file that was given before: that of this hash, else the last one if the hub's cache holds none."""
    if sha256 is not None and (known := known_as(f"{name}@{sha256}")):
        return known
    return known_as(name) if cached_file(loads.hub_id, loads.files) is None else None


def remember(name: str, file: Path, sha256: str) -> None:
    """Remember a file by the name of the encoder, and by the identity of the weights, which is not the file's own hash."""
    remember_as(name, file)
    remember_as(f"{name}@{sha256}", file)


def hub_id_of(kind: Any) -> str:
    """``"owner/model"`` where a model is published; empty if not on the hub."""
    return str(kind.hf_url or "").removeprefix(_HUB_URL)


def _key(name: str) -> str:
    return name.partition(":")[2]


def _else(kind: Any) -> str:
    """By which other name the same network takes a file."""
    from .open_clip import QuiltNet

    infos = [record.info for record in PUBLISHED.values()] + [QuiltNet.info]
    same = [info.name for info in infos if info.hub_id.lower() == hub_id_of(kind).lower()]
    if same:
        return f"; the same network takes one as {same[0]!r}"
    package = optional_import("lazyslide_models.base", feature="the encoders 'lazyslide:…'", extra="encoders")
    if issubclass(kind, package.TimmModel):
        return "; as 'timm:<folder>' the network in a downloaded folder is read, with config.json in it"
    return ""


def load(kind: Any, name: str, file: Path | None) -> Any:
    """The model, from a file or folder or from where its loader takes it; pickles are read as data only.

    Raises
    ------
    MissingDependencyError, MissingWeightsError
        If a package or the weights are not there.
    CheckpointError
        If the weights are damaged, hold code, or are not what the loader takes.
    """
    errors = optional_import("huggingface_hub.errors", feature=f"the encoder {name!r}", extra="encoders")
    if file is not None and file.is_dir():
        _check_folder(kind, name, file)
    elif file is not None:
        read_state_dict(file)  # says what is wrong with a file better than loaders do
    try:
        with _data_only():
            return kind() if file is None else kind(model_path=str(file))
    except ImportError as error:
        raise MissingDependencyError(f"encoder {name!r} needs another package: {error}") from error
    except UnpicklingError as error:
        raise _holds_code(kind, name, file) from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        if file is not None and file.is_dir():
            raise _other(name, file, error) from error
        raise _not_had(kind, name, file, error) from error
    except Exception as error:  # what loaders raise about a file is not a closed set
        if file is None:
            raise
        raise _other(name, file, error) from error


@contextmanager
def _data_only() -> Iterator[None]:
    """Torch unpickles tensors and no code, also where a loader asks it to run some."""
    with _ENVIRONMENT:  # one at a time: the other would put back what this one set
        before = {key: os.environ.pop(key, None) for key in (_DATA_ONLY, _WITH_CODE)}  # torch refuses both at once
        os.environ[_DATA_ONLY] = "1"
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


def _check_folder(kind: Any, name: str, folder: Path) -> None:
    """Raise if it holds code, or lacks what the loader reads."""
    code = [path.name for path in folder.rglob("*.py")] + [
        f"{path.name} (auto_map)" for path in folder.rglob("*.json") if _names_code(path)
    ]
    if code:
        raise CheckpointError(
            f"encoder {name!r}: {folder.name!r} holds Python code, which hespotex does not run: {', '.join(sorted(code)[:3])}"
            f". Take the folder as it is published at {kind.hf_url}"
        )
    missing = [names[0] for names in _IN_FOLDER if not any((folder / one).is_file() for one in names)]
    if missing:
        raise MissingWeightsError(
            f"encoder {name!r}: {folder.name!r} is not the folder that its loader takes: it lacks {', '.join(missing)}. "
            f"Download all files of {kind.hf_url} into one"
        )


def _names_code(path: Path) -> bool:
    """Whether a configuration names Python files to import, at any depth."""
    found: list[Any] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # In a vocabulary the word would have a number.
        found.extend(value for key, value in pairs if key == "auto_map" and isinstance(value, dict | list | str))
        return dict(pairs)

    try:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=look)
    except ValueError:  # nothing that the loader could read either
        return False
    return bool(found)


def _holds_code(kind: Any, name: str, file: Path | None) -> CheckpointError:
    """Without torch's own text, which recommends to run it."""
    what = f"weights {file.name!r}" if file is not None else f"its published weights ({hub_id_of(kind)})"
    instead = ""
    if (loads := LOADS.get(_key(name))) is not None and loads.what == _CHECKPOINT:
        instead = (
            ". If you trust the file, save its tensors alone, once: torch.save(torch.load(file, weights_only=False)"
            "['state_dict'], 'tensors.pt'), without the brackets if it holds nothing else; then weights='tensors.pt'"
        )
    return CheckpointError(
        f"encoder {name!r}: {what} hold more than tensors or are damaged, and hespotex runs no code of a file{instead}"
    )


def _not_had(kind: Any, name: str, file: Path | None, error: Exception) -> MissingWeightsError:
    loads = LOADS.get(_key(name))
    if file is not None:
        instead = "; its loader asks the hub for more than the weights"
    elif loads is None:
        instead = f". Its loader takes no file{_else(kind)}"
    else:
        instead = f". Or download them there by hand and pass the {loads.what}: weights='<{loads.what.split()[-1]}>'"
    return MissingWeightsError(
        f"encoder {name!r}: its weights could not be had ({_first_line(error)}). Go online; if access is restricted, "
        f"accept the terms at {kind.hf_url or kind.github_url} and log in with: hf auth login{instead}"
    )


def _other(name: str, file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"encoder {name!r}: {file.name!r} is not the {LOADS[_key(name)].what} that its loader takes: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
