"""Batches that do not fit into the memory of a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceMemoryError, HespotexWarning

if TYPE_CHECKING:
    import torch

__all__ = ["Halving", "is_out_of_memory"]


class Halving:
    """Batches by what fits into the memory of a device: one that does not is taken in halves from then on."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._at_most: int | None = None  # tiles that fit, once more of them did not

    def __call__(self, run: Callable[[np.ndarray], np.ndarray], tiles: np.ndarray, device: torch.device) -> np.ndarray:
        """``run(tiles)``, one row for each of the tiles (b, h, w, 3), some at a time where need be.

        Raises
        ------
        DeviceMemoryError
            If not even one tile fits.

        Warns
        -----
        HespotexWarning
            If a batch does not, once for each size.
        """
        import torch

        if self._device != device:
            self._device, self._at_most = device, None
        step = max(min(self._at_most or len(tiles), len(tiles)), 1)
        parts: list[np.ndarray] = []
        start = 0
        while start < len(tiles) or not parts:
            try:
                parts.append(run(tiles[start : start + step]))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    raise DeviceMemoryError(
                        f"one tile of {tiles.shape[1]} × {tiles.shape[2]} px does not fit into the memory of "
                        f"{str(device)!r}; free some, take device='cpu', dtype='bfloat16' or a smaller encoder"
                    ) from error
                step = self._at_most = -(-step // 2)
                _forget(device)
                warnings.warn(
                    f"{str(device)!r} is out of memory; going on with batches of {step} tiles. To spare the attempt: "
                    f"batch_size={step}",
                    HespotexWarning,
                    stacklevel=3,
                )
            else:
                start += step
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says so; that of CUDA has a class of its own, those of other devices only a text."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _forget(device: torch.device) -> None:
    """Give back what the failed attempt reserved."""
    import torch

    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
