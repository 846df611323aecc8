"""Any image encoder of lazyslide-models: the long tail of published encoders, by the loaders of that package."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import optional_import
from ..errors import DataValueError, MissingDependencyError, MissingWeightsError, ModelMismatchError
from ._base import EncoderInfo, PatchEncoder
from ._hub import is_cached
from ._licence import show_licence
from ._names import near
from ._torch import Halving
from .module import hash_module

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LazySlideEncoder", "image_models", "infos"]

_HUB_URL = "https://huggingface.co/"
_TILE_PX = 224  # where a model does not say
_TASKS = {"vision", "multimodal"}


class LazySlideEncoder(PatchEncoder):
    """An image encoder of lazyslide-models, with the loader, the preprocessing and the pooling of that package.

    Weights come from where the package takes them, which is the hub or its cache; some models run code of their publishers
    that lies beside the weights. Encoders that have a name of their own here, such as ``"uni"``, are better asked for by
    it: they take a weights file and compute in bfloat16.

    Parameters
    ----------
    model
        Key in lazyslide-models, such as ``"ctranspath"``, ``"hibou-l"`` or ``"plip"``:
        ``hx.encoders.available(family="lazyslide")``.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    tile_px
        Side at which tiles are read; that which the model's preprocessing resizes to by default.
    weights_sha256
        Identity of the weights, as :meth:`params` gives it.

    Raises
    ------
    MissingDependencyError
        If lazyslide-models, or a package that the model needs, is not installed.
    MissingWeightsError
        If the weights cannot be had.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    DataValueError
        If there is no such model, or it does not encode images.

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
    )

    def __init__(
        self,
        model: str,
        *,
        tile_um: float | None = None,
        mpp: float | None = None,
        tile_px: int | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        models = image_models()
        self.name = f"lazyslide:{model}"
        if model not in models:
            like = near(model, models)
            raise DataValueError(
                f"lazyslide-models has no image encoder {model!r}; "
                + (f"near: {like}" if like else f"there are {', '.join(map(repr, sorted(models)))}")
            )
        kind = models[model]
        show_licence(self.name, _licence(kind))
        self._model = _load(kind, self.name)
        self._sha256 = hash_module(self._model.model)
        if weights_sha256 is not None and weights_sha256 != self._sha256:
            raise ModelMismatchError(
                f"encoder {self.name!r} has weights with the hash {self._sha256[:12]}…, but the embedding was made with "
                f"{weights_sha256[:12]}…: features of other weights cannot be mixed with it"
            )
        self._transform = self._model.get_transform()
        self.tile_px = _side(self._model, self._transform) if tile_px is None else int(tile_px)
        if self.tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        self._target: Any = None
        self._in_halves = Halving()
        white = np.full((1, self.tile_px, self.tile_px, 3), 255, np.uint8)
        self.n_features = int(self.encode(white, "cpu").shape[1])

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "tile_px": self.tile_px,
            "weights_sha256": self._sha256,
        }

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._run(self._model.encode_image, tiles, device)

    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Patch tokens (b, rows, columns, d) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8.

        Raises
        ------
        DataValueError
            If the model has none that lie on a square.
        """
        dense = getattr(self._model, "encode_image_dense", None)
        if dense is not None:
            tokens = self._run(lambda images: dense(images).patch_tokens, tiles, device)
            side = math.isqrt(tokens.shape[1])
            if side**2 == tokens.shape[1]:
                return tokens.reshape(len(tokens), side, side, -1)
        raise DataValueError(f"encoder {self.name!r} has no patch tokens; take a vision transformer, such as 'uni'")

    def _run(self, call: Any, tiles: np.ndarray, device: str) -> np.ndarray:
        import torch

        from .._device import resolve_device

        target = resolve_device(device)
        if self._target != target:
            self._model.to(target)
            self._target = target

        def run(some: np.ndarray) -> np.ndarray:
            out = call(self._images(some, target))
            features = out.float().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out, np.float32)
            return features.reshape(len(some), *features.shape[1:])

        with torch.inference_mode():
            return self._in_halves(run, tiles, target)

    def _images(self, tiles: np.ndarray, target: Any) -> Any:
        """The tiles as the model takes them: normalised tensors, or pixels for models that do it themselves."""
        import torch
        from torchvision.transforms import v2

        if self._transform is None:
            return list(tiles)
        if isinstance(self._transform, v2.Compose):  # takes a batch at once, and on the device
            return self._transform(torch.from_numpy(np.ascontiguousarray(tiles)).to(target).permute(0, 3, 1, 2))
        from PIL import Image

        return torch.stack([self._transform(Image.fromarray(tile)) for tile in tiles]).to(target)


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
        hub_id = str(kind.hf_url or "").removeprefix(_HUB_URL)
        info = EncoderInfo(
            name=f"lazyslide:{key}",
            summary=str(kind.description or ""),
            n_features=kind.encode_dim,
            mpp=0.5,
            licence=_licence(kind),
            gated=bool(kind.is_gated),
            extra="encoders",
            hub_id=hub_id,
            needs_weights=True,
        )
        table.append((info, is_cached(info.name, hub_id) or None))
    return table


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _licence(kind: Any) -> str:
    names = " and ".join(str(name) for name in _as_list(kind.license) if name) or "unknown"
    urls = [str(url) for url in _as_list(kind.license_url or kind.hf_url or kind.github_url) if url]
    return names + (f", {urls[0]}" if urls else "")


def _load(kind: Any, name: str) -> Any:
    errors = optional_import("huggingface_hub.errors", feature=f"the encoder {name!r}", extra="encoders")
    try:
        return kind()
    except ImportError as error:
        raise MissingDependencyError(f"encoder {name!r} needs another package: {error}") from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = kind.hf_url or kind.github_url
        raise MissingWeightsError(
            f"encoder {name!r}: its weights could not be had ({reason}). Go online; if access is restricted, accept the terms "
            f"at {where} and log in with: hf auth login"
        ) from error


def _side(model: Any, transform: Any) -> int:
    """Side that the model's own preprocessing resizes to."""
    for step in getattr(transform, "transforms", ()):
        if type(step).__name__ == "Resize":
            return int(np.max(step.size))
    side = getattr(model, "img_size", None) or getattr(model, "image_size", None) or _TILE_PX
    return int(np.max(side))
