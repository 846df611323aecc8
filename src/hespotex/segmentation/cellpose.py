"""Nuclei by Cellpose 4 (Cellpose-SAM), with weights that lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._device import resolve_device
from .._optional import optional_import
from ..errors import MissingWeightsError
from .watershed import check_rgb

__all__ = ["CellposeSegmenter", "find_weights"]

DEFAULT_WEIGHTS = "cpsam_v2"
_HALO_DIAMETERS = 4.0


def find_weights(model: str | os.PathLike[str] | None = None) -> Path:
    """The weights file named, or Cellpose's default one where Cellpose keeps it.

    Given a path that does not exist, Cellpose downloads its default model without asking; hence this check.

    Raises
    ------
    MissingWeightsError
        If the file is not there, saying how to get it.
    """
    if model is not None:
        path = Path(model).expanduser()
    else:
        folder = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH")
        path = (Path(folder) if folder else Path.home() / ".cellpose" / "models") / DEFAULT_WEIGHTS
    if not path.is_file():
        raise MissingWeightsError(
            f"Cellpose's weights {str(path)!r} are not there, and hespotex downloads nothing by itself. Get them once (1.2 "
            f'GB) with python -c "from cellpose.models import CellposeModel; CellposeModel()", or download '
            f"https://huggingface.co/mouseland/cellpose-sam and pass the file: "
            f"hx.pp.segment_nuclei(sdata, 'cellpose', model='path/to/{DEFAULT_WEIGHTS}')"
        )
    return path


class CellposeSegmenter:
    """Cellpose as a function of an RGB image.

    Parameters
    ----------
    model
        Path of the weights, see :func:`find_weights`; or an object with Cellpose's ``eval``.
    diameter_px
        Diameter of a typical nucleus in pixels, to which Cellpose scales the image.
    device
        The setting by default.
    eval_options
        Further arguments of ``CellposeModel.eval``, such as ``flow_threshold``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Any = None,
        *,
        diameter_px: float,
        device: str | None = None,
        **eval_options: Any,
    ) -> None:
        self.diameter_px = diameter_px
        self.eval_options = eval_options
        self._device = device
        self.path = None if hasattr(model, "eval") else find_weights(model)
        self._model: Any = model if self.path is None else _load(self.path, device)

    @property
    def halo_px(self) -> int:
        """Width of the surroundings that decide what lies in a block."""
        return int(np.ceil(_HALO_DIAMETERS * self.diameter_px))

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Label image (h, w) of an (h, w, 3) uint8 image."""
        check_rgb(rgb)
        if self._model is None and self.path is not None:
            self._model = _load(self.path, self._device)
        masks, *_ = self._model.eval(rgb, channel_axis=-1, diameter=self.diameter_px, **self.eval_options)
        masks = np.asarray(masks)
        return masks.astype(np.int32) if masks.dtype.kind in "iu" else masks  # others are refused, not rounded

    def __getstate__(self) -> dict[str, Any]:
        # A network does not travel; the worker of a cluster loads it from where it is.
        return {**self.__dict__, "_model": self._model if self.path is None else None}


def _load(path: Path, device: str | None) -> Any:
    models = optional_import("cellpose.models", feature="segment_nuclei(method='cellpose')", extra="cellpose")
    chosen = resolve_device(device)
    return models.CellposeModel(gpu=chosen.type != "cpu", pretrained_model=str(path), device=chosen)
