"""Any image encoder of lazyslide-models: the long tail of published encoders, by the loaders of that package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import optional_import
from ..errors import DataValueError, ModelMismatchError
from ._base import EncoderInfo, PatchEncoder
from ._hub import TIMM_FILES, is_cached
from ._lazyslide_load import LOADS, agree, hub_id_of, load, own_file, remember, runs_code
from ._lazyslide_network import PackageModel
from ._licence import show_licence
from ._names import near
from ._torch import torch_dtype
from .module import hash_module

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LazySlideEncoder", "image_models", "infos"]

_TASKS = {"vision", "multimodal"}


class LazySlideEncoder(PatchEncoder):
    """An image encoder of lazyslide-models, with the loader, the preprocessing and the pooling of that package.

    Weights come from where the package takes them, which is the hub or its cache, and pickles are read as data only. The
    loaders of some models, such as ``"hibou-l"``, ``"titan"`` and ``"conceptclip"``, run Python code that their publishers put
    beside the weights: they are refused without ``trust_remote_code=True``. Encoders that have a name of their own here, such
    as ``"uni"``, are better asked for by it: all of them take a weights file, and other pooling.

    Parameters
    ----------
    model
        Key in lazyslide-models, such as ``"ctranspath"``, ``"hibou-l"`` or ``"plip"``:
        ``hx.encoders.available(family="lazyslide")``.
    weights
        A file or folder on this machine, for the models whose loader takes one: a PyTorch checkpoint for ``"conch"``,
        ``"crisp"``, ``"crown"``, ``"gigapath-flash"``, ``"omiclip"``, ``"uni"`` and ``"uni2"``, a safetensors file for
        ``"keep"``, a folder without code for ``"plip"``. What else such a model needs, such as its tokenizer, its loader
        still asks the hub for. A file is found again by the name of the encoder.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    tile_px
        Side at which tiles are read; that which the model's preprocessing resizes to by default.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``; some models compute in the first only.
    weights_sha256
        Identity of the weights, as :meth:`params` gives it.
    trust_remote_code
        Let the loader run code of the publishers where it does that. It is no part of :meth:`params`, so that nobody else's
        file can ask for it, but holds for this name as long as the session.

    Raises
    ------
    MissingDependencyError
        If lazyslide-models, or a package that the model needs, is not installed.
    MissingWeightsError
        If the weights cannot be had.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    CheckpointError
        If a file is damaged, of another network, of a kind that the loader does not read, or holds code.
    DataValueError
        If there is no such model, it does not encode images, it takes no `weights` or not this `dtype`, or it would run code
        of its publishers.

    Warns
    -----
    HespotexWarning
        On first use, of the licence.
    """

    info = EncoderInfo(
        name="lazyslide",
        summary="any image encoder of lazyslide-models",
        mpp=0.5,
        licence="that of the model",
        extra="encoders",
        is_family=True,
        argument="model",
        needs_weights=True,
        is_network=True,
    )

    _network: PackageModel  # type: ignore[assignment]  # as the one of others, with pixels of its own

    def __init__(
        self,
        model: str,
        weights: str | Path | None = None,
        *,
        tile_um: float | None = None,
        mpp: float | None = None,
        tile_px: int | None = None,
        dtype: str = "float32",
        weights_sha256: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        models = image_models()
        self.name = f"lazyslide:{model}"
        if model not in models:
            like = near(model, models)
            raise DataValueError(
                f"lazyslide-models has no image encoder {model!r}; "
                + (f"near: {like}" if like else f"there are {', '.join(map(repr, sorted(models)))}")
            )
        torch_dtype(dtype)  # before anything is loaded
        kind = models[model]
        self._file = own_file(kind, self.name, weights, weights_sha256)
        agree(kind, self.name, trust_remote_code=trust_remote_code)
        show_licence(self.name, _licence(kind))
        loaded = load(kind, self.name, self._file)
        self._sha256 = hash_module(loaded.model)
        if weights_sha256 is not None and weights_sha256 != self._sha256:
            raise ModelMismatchError(
                f"encoder {self.name!r} has weights with the hash {self._sha256[:12]}…, but the embedding was made with "
                f"{weights_sha256[:12]}…: features of other weights cannot be mixed with it"
            )
        if weights is not None and (file := self.weights_file()) is not None:
            remember(self.name, file, self._sha256)
        self._network = PackageModel(loaded, tile_px, dtype)
        self.tile_px = self._network.tile_px
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        self._dtype = dtype
        self.n_features = self._width()

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "tile_px": self.tile_px,
            **({} if self._dtype == "float32" else {"dtype": self._dtype}),
            "weights_sha256": self._sha256,
        }

    def weights_file(self) -> Path | None:
        """The file that was given; ``None`` if the loader of the package found the weights, or they are a folder."""
        return self._file if self._file is not None and self._file.is_file() else None

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._network(tiles, device)

    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Patch tokens (b, rows, columns, d) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8.

        Raises
        ------
        DataValueError
            If the model has none that lie on a square.
        """
        dense = getattr(self._network.model, "encode_image_dense", None)
        if dense is not None:
            tokens = self._network(tiles, device, forward=lambda images: dense(images).patch_tokens)
            side = math.isqrt(tokens.shape[1])
            if side**2 == tokens.shape[1]:
                return tokens.reshape(len(tokens), side, side, -1)
        raise DataValueError(f"encoder {self.name!r} has no patch tokens; take a vision transformer, such as 'uni'")

    def _width(self) -> int:
        """Of the features, as one tile shows it."""
        try:
            return int(self.encode(self._network.white(), "cpu").shape[1])
        except (RuntimeError, TypeError, ValueError) as error:
            if self._dtype == "float32":
                raise
            raise DataValueError(
                f"encoder {self.name!r} does not compute in dtype={self._dtype!r} ({error}); take 'float32'"
            ) from error


def image_models() -> Mapping[str, Any]:
    """The classes of lazyslide-models that encode images, by key.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    optional_import("timm", feature="the encoders 'lazyslide:…'", extra="encoders")
    package = optional_import("lazyslide_models", feature="the encoders 'lazyslide:…'", extra="encoders")
    return {
        key: kind
        for key, kind in package.MODEL_REGISTRY.items()
        if hasattr(kind, "encode_image") and _TASKS & {task.value for task in _as_list(kind.task)}
    }


def infos() -> list[tuple[EncoderInfo, bool | None]]:
    """What each of them is, and whether its weights lie in the hub's cache: ``None`` where their file is not known."""
    table: list[tuple[EncoderInfo, bool | None]] = []
    for key, kind in image_models().items():
        hub_id, loads = hub_id_of(kind), LOADS.get(key)
        info = EncoderInfo(
            name=f"lazyslide:{key}",
            summary=str(kind.description or "") + ("; needs trust_remote_code=True" if runs_code(kind) else ""),
            n_features=kind.encode_dim,
            mpp=0.5,
            licence=_licence(kind),
            gated=bool(kind.is_gated),
            extra="encoders",
            hub_id=hub_id,
            needs_weights=True,
        )
        cached = is_cached(info.name, loads.hub_id if loads else hub_id, loads.files if loads else TIMM_FILES)
        table.append((info, cached or None))
    return table


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _licence(kind: Any) -> str:
    names = " and ".join(str(name) for name in _as_list(kind.license) if name) or "unknown"
    urls = [str(url) for url in _as_list(kind.license_url or kind.hf_url or kind.github_url) if url]
    return names + (f", {urls[0]}" if urls else "")
