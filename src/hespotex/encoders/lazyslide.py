"""Any image encoder of lazyslide-models: the long tail of published encoders, by the loaders of that package."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._logging import logger
from .._optional import optional_import
from ..errors import CheckpointError, DataValueError, MissingDependencyError, MissingWeightsError, ModelMismatchError
from ._base import EncoderInfo, PatchEncoder
from ._hub import cached_file, is_cached
from ._licence import show_licence
from ._names import near
from ._published import PUBLISHED
from ._torch import DTYPES, Halving, is_out_of_memory
from ._weights import known_as, read_state_dict, remember_as
from .module import hash_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

__all__ = ["LazySlideEncoder", "image_models", "infos"]

_HUB_URL = "https://huggingface.co/"
_TILE_PX = 224  # where a model does not say
_TASKS = {"vision", "multimodal"}
# What a class loads that is given `model_path`. All classes have that argument; those not listed here ignore it.
_LOADS = {
    **dict.fromkeys(("conch", "crisp", "crown", "gigapath-flash", "omiclip", "uni", "uni2"), "PyTorch checkpoint"),
    "keep": "safetensors file",
    **dict.fromkeys(("conceptclip", "plip"), "folder"),
}


class LazySlideEncoder(PatchEncoder):
    """An image encoder of lazyslide-models, with the loader, the preprocessing and the pooling of that package.

    Weights come from where the package takes them, which is the hub or its cache; some models run code of their publishers
    that lies beside the weights. Encoders that have a name of their own here, such as ``"uni"``, are better asked for by
    it: all of them take a weights file, and other pooling.

    Parameters
    ----------
    model
        Key in lazyslide-models, such as ``"ctranspath"``, ``"hibou-l"`` or ``"plip"``:
        ``hx.encoders.available(family="lazyslide")``.
    weights
        A file or folder on this machine, for the models whose loader takes one: a PyTorch checkpoint for ``"conch"``,
        ``"crisp"``, ``"crown"``, ``"gigapath-flash"``, ``"omiclip"``, ``"uni"`` and ``"uni2"``, a safetensors file for
        ``"keep"``, a folder for ``"conceptclip"`` and ``"plip"``. What else such a model needs, such as its tokenizer,
        its loader still asks the hub for. A file is found again by the name of the encoder.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    tile_px
        Side at which tiles are read; that which the model's preprocessing resizes to by default.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``; some models compute in the first only.
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
    CheckpointError
        If a file is damaged, of another network, or of a kind that the loader does not read.
    DataValueError
        If there is no such model, it does not encode images, or it takes no `weights` or not this `dtype`.

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
    ) -> None:
        models = image_models()
        self.name = f"lazyslide:{model}"
        if model not in models:
            like = near(model, models)
            raise DataValueError(
                f"lazyslide-models has no image encoder {model!r}; "
                + (f"near: {like}" if like else f"there are {', '.join(map(repr, sorted(models)))}")
            )
        if dtype not in DTYPES:
            raise DataValueError(f"dtype={dtype!r} is unknown; possible: {', '.join(map(repr, DTYPES))}")
        kind = models[model]
        self._file = _own_file(kind, self.name, weights)
        show_licence(self.name, _licence(kind))
        self._model = _load(kind, self.name, self._file)
        self._sha256 = hash_module(self._model.model)
        if weights_sha256 is not None and weights_sha256 != self._sha256:
            raise ModelMismatchError(
                f"encoder {self.name!r} has weights with the hash {self._sha256[:12]}…, but the embedding was made with "
                f"{weights_sha256[:12]}…: features of other weights cannot be mixed with it"
            )
        if weights is not None and self._file is not None and self._file.is_file():
            remember_as(self.name, self._file)
        self._transform = self._model.get_transform()
        self.tile_px = _side(self._model, self._transform) if tile_px is None else int(tile_px)
        if self.tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        self._target: Any = None
        self._in_halves = Halving()
        self._compiled: list[torch.nn.Module] = []
        self._compiled_for = 0  # tiles
        self._dtype = dtype
        self.n_features = self._cast()

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

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called, and torch could."""
        return bool(self._compiled)

    def compile(self) -> None:
        """Have torch compile, at the next batch and for its size, the networks that the model runs on images.

        Where torch cannot (it needs a C++ compiler), they go on as they are, and the log says why.
        """
        self._compiled, self._compiled_for = self._outermost(), 0
        self._switch(on=True)

    def fitting_batch_size(self, device: str) -> int:
        """Tiles per forward pass that are fastest; see :meth:`TileEncoder.fitting_batch_size`."""
        with self._uncompiled():  # each size would be compiled anew
            return super().fitting_batch_size(device)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the networks to be compiled there if they were to be here."""
        return {**self.__dict__, "_compiled_for": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._switch(on=True)

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

        def run_compiled(some: np.ndarray) -> np.ndarray:
            """A smaller batch is filled up, as each size would be compiled anew."""
            if not self._compiled or not len(some):
                return run(some)
            self._compiled_for = max(self._compiled_for, len(some))
            try:
                return run(np.pad(some, ((0, self._compiled_for - len(some)), (0, 0), (0, 0), (0, 0))))[: len(some)]
            except Exception as error:  # what compilers raise is not a closed set
                if is_out_of_memory(error):
                    self._compiled_for = 0  # the halves are not to be filled up to what did not fit
                    raise
                logger.warning(
                    "torch cannot compile %r, which goes on as it is: %s", self.name, str(error).split("\n")[0]
                )
                self._switch(on=False)
                self._compiled = []
                return run(some)

        with torch.inference_mode():
            return self._in_halves(run_compiled, tiles, target)

    def _cast(self) -> int:
        """Put the networks into their type, and find the width of their features."""
        import torch

        if self._dtype != "float32":
            for part in vars(self._model).values():
                if isinstance(part, torch.nn.Module):
                    part.to(getattr(torch, self._dtype))
        try:
            return int(self.encode(self._white(), "cpu").shape[1])
        except (RuntimeError, TypeError, ValueError) as error:
            if self._dtype == "float32":
                raise
            raise DataValueError(
                f"encoder {self.name!r} does not compute in dtype={self._dtype!r} ({error}); take 'float32'"
            ) from error

    def _white(self) -> np.ndarray:
        return np.full((1, self.tile_px, self.tile_px, 3), 255, np.uint8)

    def _outermost(self) -> list[torch.nn.Module]:
        """The modules that encoding calls itself: the whole network, or the parts that the model's class puts together."""
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

        called: dict[int, torch.nn.Module] = {}
        inside: list[Any] = []

        def enter(module: Any, args: Any) -> None:
            if not inside and next(module.parameters(), None) is not None:
                called.setdefault(id(module), module)
            inside.append(module)

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(lambda module, args, out: inside.pop() and None),
        ]
        try:
            self.encode(self._white(), str(self._target))
        finally:
            for hook in hooks:
                hook.remove()
        return list(called.values())

    def _switch(self, *, on: bool) -> None:
        for module in self._compiled:
            if on:
                module.compile(dynamic=False)
            else:
                module._compiled_call_impl = None

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        compiled = self._compiled
        self._switch(on=False)
        self._compiled = []
        try:
            yield
        finally:
            self._compiled = compiled
            self._switch(on=True)

    def _images(self, tiles: np.ndarray, target: Any) -> Any:
        """The tiles as the model takes them: normalised tensors, or pixels for models that do it themselves."""
        import torch
        from torchvision.transforms import v2

        if self._transform is None:
            return list(tiles)
        if isinstance(self._transform, v2.Compose):  # takes a batch at once, and on the device
            images = self._transform(torch.from_numpy(np.ascontiguousarray(tiles)).to(target).permute(0, 3, 1, 2))
        else:
            from PIL import Image

            images = torch.stack([self._transform(Image.fromarray(tile)) for tile in tiles]).to(target)
        images = images.as_subclass(torch.Tensor)  # not torchvision's Image, which torch cannot compile for
        return images.to(getattr(torch, self._dtype)) if images.is_floating_point() else images


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
        hub_id = _hub_id(kind)
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


def _own_file(kind: Any, name: str, weights: str | Path | None) -> Path | None:
    """The file or folder to load; ``None`` leaves it to the loader."""
    wanted = _LOADS.get(_key(name))
    if weights is None:
        is_free = wanted is not None and cached_file(_hub_id(kind)) is None
        known = known_as(name) if is_free else None
        if known:
            logger.info("encoder %r: weights are %s, as given before", name, known)
        return known
    if wanted is None:
        raise DataValueError(
            f"encoder {name!r} takes no weights=: its loader in lazyslide-models ignores files{_else(kind)}"
        )
    path = Path(weights).expanduser()
    if not (path.is_dir() if wanted == "folder" else path.is_file()):
        raise MissingWeightsError(
            f"encoder {name!r}: weights={str(weights)!r} is not a {wanted}, which its loader takes"
        )
    return path


def _key(name: str) -> str:
    return name.partition(":")[2]


def _hub_id(kind: Any) -> str:
    return str(kind.hf_url or "").removeprefix(_HUB_URL)


def _else(kind: Any) -> str:
    """By which other name the same network takes a file."""
    from .open_clip import QuiltNet

    infos = [record.info for record in PUBLISHED.values()] + [QuiltNet.info]
    same = [info.name for info in infos if info.hub_id.lower() == _hub_id(kind).lower()]
    if same:
        return f"; the same network takes one as {same[0]!r}"
    package = optional_import("lazyslide_models.base", feature="the encoders 'lazyslide:…'", extra="encoders")
    if issubclass(kind, package.TimmModel):
        return "; as 'timm:<folder>' the network in a downloaded folder is read, with config.json in it"
    return ""


def _load(kind: Any, name: str, file: Path | None) -> Any:
    errors = optional_import("huggingface_hub.errors", feature=f"the encoder {name!r}", extra="encoders")
    if file is not None and file.is_file():
        read_state_dict(file)  # damaged, or with code in it: some loaders would run that
    try:
        return kind() if file is None else kind(model_path=str(file))
    except ImportError as error:
        raise MissingDependencyError(f"encoder {name!r} needs another package: {error}") from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        where = kind.hf_url or kind.github_url
        wanted = _LOADS.get(_key(name))
        if file is not None:
            instead = "; its loader asks the hub for more than the weights"
        elif wanted is None:
            instead = f". Its loader takes no file{_else(kind)}"
        else:
            instead = f". Or download them there by hand and pass the {wanted}: weights='<{wanted.split()[-1]}>'"
        raise MissingWeightsError(
            f"encoder {name!r}: its weights could not be had ({_first_line(error)}). Go online; if access is restricted, "
            f"accept the terms at {where} and log in with: hf auth login{instead}"
        ) from error
    except Exception as error:  # what loaders raise about a file is not a closed set
        if file is None:
            raise
        raise CheckpointError(
            f"encoder {name!r}: {file.name!r} is not the {_LOADS[_key(name)]} that its loader takes: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _side(model: Any, transform: Any) -> int:
    """Side that the model's own preprocessing resizes to."""
    for step in getattr(transform, "transforms", ()):
        if type(step).__name__ == "Resize":
            return int(np.max(step.size))
    side = getattr(model, "img_size", None) or getattr(model, "image_size", None) or _TILE_PX
    return int(np.max(side))
