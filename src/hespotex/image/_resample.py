"""Area-weighted reduction onto a global grid: the same pixel whatever block it is computed in."""

from __future__ import annotations

import numpy as np

__all__ = ["AreaAxis", "reduce_area"]


class AreaAxis:
    """One axis of a grid whose pixel *j* is the mean over the source interval [j·step, (j + 1)·step).

    Weights follow from the global index alone, so that neighbouring blocks agree to the last bit.
    """

    def __init__(self, step: float) -> None:
        self.step = step
        self.whole = abs(step - round(step)) < 1e-9 and round(step) >= 1

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that grid pixels [start, stop) cover."""
        if self.whole:
            return start * round(self.step), stop * round(self.step)
        return int(np.floor(start * self.step + 1e-9)), int(np.ceil(stop * self.step - 1e-9))

    def taps(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source pixel, counted from the span's start, and weight of each tap, (taps, n) both."""
        low = np.arange(start, stop) * self.step
        high = np.arange(start + 1, stop + 1) * self.step
        first, last = self.span(start, stop)
        source = np.floor(low).astype(np.int64) + np.arange(int(np.ceil(self.step)) + 1)[:, None]
        overlap = np.minimum(source + 1, high) - np.maximum(source, low)
        weights = np.clip(overlap, 0, None) / self.step
        weights[weights < 1e-7] = 0
        return np.clip(source, first, last - 1) - first, weights.astype(np.float32)


def reduce_area(pixels: np.ndarray, rows: AreaAxis, columns: AreaAxis, y: slice, x: slice) -> np.ndarray:
    """Grid pixels (h, w, 3) uint8 at [y, x) from the source pixels of their spans (H, W, 3) uint8."""
    if rows.whole and columns.whole:
        return _reduce_whole(pixels, round(rows.step), round(columns.step))
    along_y = _weighted(pixels, *rows.taps(y.start, y.stop))
    along_x = _weighted(np.ascontiguousarray(along_y.transpose(1, 0, 2)), *columns.taps(x.start, x.stop))
    return np.ascontiguousarray((along_x.transpose(1, 0, 2) + np.float32(0.5)).astype(np.uint8))


def _reduce_whole(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if height == width == 1:
        return pixels
    # One strided addition per tap: no temporary larger than the result.
    total = np.zeros((pixels.shape[0] // height, pixels.shape[1] // width, 3), dtype=np.uint32)
    for dy in range(height):
        for dx in range(width):
            total += pixels[dy::height, dx::width]
    area = height * width
    return ((total + area // 2) // area).astype(np.uint8)


def _weighted(pixels: np.ndarray, source: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of rows; a loop over the few taps, each a copy of whole rows."""
    out = np.zeros((source.shape[1], *pixels.shape[1:]), dtype=np.float32)
    for index, weight in zip(source, weights, strict=True):
        if weight.any():
            out += pixels[index] * weight[:, None, None]
    return out
