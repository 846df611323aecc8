"""Superpixels and colours as the published program takes them from an image in pixels.

The model itself needs neither: its superpixels come with their colours. Points are (row, column).
"""

from __future__ import annotations

import numpy as np

__all__ = ["superpixel_points", "window_means", "window_side"]


def window_side(res: float) -> int:
    """Side in pixels of the window that a superpixel of side `res` takes its colour from.

    Examples
    --------
    >>> window_side(50), window_side(49)  # halves are rounded to even
    (51, 49)
    """
    return 2 * round(res / 2) + 1


def window_means(image: np.ndarray, points: np.ndarray, res: float) -> np.ndarray:
    """Mean of each channel of `image` (h, w, c) in the window around each point, cut at the border, (n, c)."""
    half = window_side(res) // 2
    height, width = image.shape[:2]
    cumulated = np.zeros((height + 1, width + 1, image.shape[2]))
    np.cumsum(np.cumsum(image, axis=0, dtype=np.float64), axis=1, out=cumulated[1:, 1:])
    row, column = np.asarray(points, dtype=np.int64).T
    top, bottom = np.maximum(row - half, 0), np.minimum(row + half + 1, height)
    left, right = np.maximum(column - half, 0), np.minimum(column + half + 1, width)
    total = cumulated[bottom, right] - cumulated[top, right] - cumulated[bottom, left] + cumulated[top, left]
    return total / ((bottom - top) * (right - left))[:, None]


def superpixel_points(mask: np.ndarray, res: int) -> np.ndarray:
    """Centres (row, column) of superpixels: whole multiples of `res` from the first on that lie in `mask` (h, w), (m, 2).

    The published mask is the inside of the tissue's contour enlarged by 1.05.
    """
    row, column = np.meshgrid(*(np.arange(res, length, res) for length in mask.shape), indexing="ij")
    inside = np.asarray(mask, dtype=bool)[row, column]
    return np.column_stack([row[inside], column[inside]])
