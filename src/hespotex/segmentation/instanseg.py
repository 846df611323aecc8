"""Nuclei by InstanSeg and the other segmenters of lazyslide-models."""

from __future__ import annotations

import inspect
import os
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from .._device import resolve_device
from .._optional import ensure_torchvision, optional_import
from ..errors import DataValueError, MissingKeyError, MissingWeightsError
from .watershed import check_rgb

__all__ = ["NETWORK_MPP", "LazyslideSegmenter"]

NETWORK_MPP = 0.5  # at which these networks were trained
_WINDOW_PX = 512
_HUB_ID, _HUB_FILE = "RendeiroLab/LazySlide-models", "instanseg/instanseg_v0_1_0.pt"
_PATH_ARGUMENTS = ("model_path", "model_file")


class LazyslideSegmenter:
    """A segmenter of lazyslide-models as a function of an RGB image.

    The network sees windows of 512 px (or as many as it takes), because it scales each by its own percentiles.

    Parameters
    ----------
    name
        Name in the registry of lazyslide-models; it has to return instance masks.
    model
        Path of the weights; by default those in the cache of the hub, or taken from there. Or an object with the
        ``segment`` and ``get_transform`` of lazyslide-models.
    diameter_px
        Diameter of a typical nucleus in pixels.
    device
        The setting by default.

    Raises
    ------
    MissingKeyError
        If there is no segmenter of that name.
    MissingWeightsError
        If its weights are not there and could not be had.
    DataValueError
        If a file holds something else, or the segmenter takes none.
    """

    def __init__(
        self,
        name: str = "instanseg",
        model: str | os.PathLike[str] | Any = None,
        *,
        diameter_px: float,
        device: str | None = None,
    ) -> None:
        self.name = name
        self.diameter_px = diameter_px
        self._device = device
        self._source = model
        self._model = self._load()

    @property
    def halo_px(self) -> int:
        """Width of the surroundings that decide what lies in a block."""
        return min(int(np.ceil(4 * self.diameter_px)), _WINDOW_PX // 4)

    @property
    def block_px(self) -> int:
        """Side of the core of a window."""
        return self._window_px() - 2 * self.halo_px

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Label image (h, w) of an (h, w, 3) uint8 image."""
        import torch

        check_rgb(rgb)
        network = self._network()
        height, width = rgb.shape[:2]
        side = max(self._window_px(), height, width)
        window = np.full((side, side, 3), 255, dtype=np.uint8)
        window[:height, :width] = rgb
        transform = network.get_transform()
        image = torch.from_numpy(window) if transform is None else transform(window)
        with torch.inference_mode():
            output = network.segment(image[None].to(resolve_device(self._device)))
        labels = output.instance_map
        if labels is None:
            raise DataValueError(
                f"lazyslide:{self.name} returns classes of pixels and no nuclei; 'instanseg' and 'cellpose' return nuclei"
            )
        if isinstance(labels, torch.Tensor):
            labels = labels.cpu().numpy()
        return np.asarray(labels).reshape(side, side)[:height, :width].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # A network does not travel; the worker of a cluster loads it from where it is.
        return {**self.__dict__, "_model": self._model if _is_model(self._source) else None}

    def _network(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _window_px(self) -> int:
        limits = getattr(self._network(), "input_constraint", None)
        if limits is None:
            return _WINDOW_PX
        side = min(max(_WINDOW_PX, limits.min or 0), limits.max or _WINDOW_PX)
        return side - side % (limits.divisible_by or 1)

    def _load(self) -> Any:
        if _is_model(self._source):
            return self._source
        ensure_torchvision()
        feature = f"segment_nuclei(method={self.name!r})"
        models = optional_import("lazyslide_models", feature=feature, extra="encoders")
        known = models.list_models("segmentation")
        if self.name not in known:
            near = get_close_matches(self.name, known, n=1)
            raise MissingKeyError(
                f"lazyslide-models has no segmenter {self.name!r}; there are {known}"
                + (f". Did you mean 'lazyslide:{near[0]}'?" if near else "")
            )
        path = None if self._source is None else Path(self._source).expanduser()
        if path is not None and not path.is_file():
            raise MissingWeightsError(f"model={str(path)!r}: there is no such file of weights for {self.name!r}")
        kind = models.MODEL_REGISTRY[self.name]
        made = _instanseg(kind, path) if self.name == "instanseg" else _other(self.name, kind, path)
        return made.to(resolve_device(self._device))


def _is_model(source: Any) -> bool:
    return hasattr(source, "segment") and hasattr(source, "get_transform")


def _instanseg(kind: type[Any], path: Path | None) -> Any:
    """InstanSeg with weights of a file, which lazyslide-models would ignore and take those of the hub."""
    import torch

    if path is None:
        hub = optional_import("huggingface_hub", feature="segment_nuclei(method='instanseg')", extra="encoders")
        try:
            path = Path(hub.hf_hub_download(_HUB_ID, _HUB_FILE))
        except (OSError, ValueError) as error:  # those of the hub are OSErrors
            raise _unavailable("instanseg", error) from error
    made: Any = object.__new__(kind)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`torch.jit.load` is", DeprecationWarning
            )  # InstanSeg comes in no other form
            made.model = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise DataValueError(
            f"model={str(path)!r} is no TorchScript file, as which InstanSeg is published: {_first_line(error)}"
        ) from error
    return made


def _other(name: str, kind: type[Any], path: Path | None) -> Any:
    options = {}
    if path is not None:
        taken = [argument for argument in _PATH_ARGUMENTS if argument in inspect.signature(kind.__init__).parameters]
        if not taken:
            raise DataValueError(
                f"lazyslide:{name} takes no file of weights; leave model= out, and it uses those of the hub"
            )
        options[taken[0]] = str(path)
    try:
        return kind(**options)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> MissingWeightsError:
    return MissingWeightsError(
        f"the weights of {name!r} could not be had ({_first_line(error)}). Go online once; if access is restricted, accept "
        f"its terms on https://huggingface.co and log in with: hf auth login. Or download the file by hand "
        + (f"(https://huggingface.co/{_HUB_ID}, {_HUB_FILE}) " if name == "instanseg" else "")
        + "and pass it: hx.pp.segment_nuclei(sdata, "
        + f"{name if name == 'instanseg' else f'lazyslide:{name}'!r}, model='<file>')"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
