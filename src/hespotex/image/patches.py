"""The published patch cut of HESpotEx: one spot diameter, resized to 224 × 224, in pure numpy.

OpenCV is no dependency: its bicubic and area interpolation on 8-bit images are written out, to within one grey level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GeometryError
from ._chunks import ChunkReader
from ._prefetch import prefetch

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["iter_patches", "patch_half_side", "patch_windows", "resize", "spot_patches"]

SIDE = 224
_CUBIC = -0.75  # OpenCV's coefficient; the common Catmull–Rom spline has −0.5


def patch_half_side(diameter_px: float) -> int:
    """Half the side of a patch in pixels: ⌊⌈diameter⌉ / 2⌋.

    Examples
    --------
    >>> patch_half_side(178.6)
    89
    """
    return int(np.ceil(diameter_px)) // 2


def patch_windows(centres: np.ndarray, diameter_px: float, shape: tuple[int, int]) -> np.ndarray:
    """Windows of one spot diameter around `centres`, cut at the border of the image.

    Parameters
    ----------
    centres
        Spot centres (x, y) in pixels of the image, (n, 2); cut to integers towards zero.
    diameter_px
        Spot diameter in pixels.
    shape
        Height and width of the image.

    Returns
    -------
    Row start, row stop, column start, column stop, (n, 4) int64; stops are exclusive.

    Raises
    ------
    GeometryError
        If a window lies wholly outside the image.

    Examples
    --------
    >>> import numpy as np
    >>> patch_windows(np.array([[100, 50]]), 178.6, (1000, 1000)).tolist()
    [[0, 139, 11, 189]]
    """
    x, y = np.trunc(np.asarray(centres, dtype=np.float64)).astype(np.int64).T
    r = patch_half_side(diameter_px)
    height, width = shape
    windows = np.stack(
        [np.maximum(y - r, 0), np.minimum(y + r, height), np.maximum(x - r, 0), np.minimum(x + r, width)], axis=1
    )
    empty = (windows[:, 1] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 2])
    if empty.any():
        raise GeometryError(
            f"{int(empty.sum())} of {len(windows)} spots lie outside the image of {height} × {width} pixels; "
            "check that coordinates and image share their scale"
        )
    return windows


def spot_patches(image: np.ndarray, centres: np.ndarray, diameter_px: float, *, side: int = SIDE) -> np.ndarray:
    """Patches of one spot diameter, as HESpotEx cuts them.

    Parameters
    ----------
    image
        RGB, (height, width, 3) uint8.
    centres, diameter_px
        As in :func:`patch_windows`.
    side
        Side of the result in pixels.

    Returns
    -------
    (n, 3, side, side) uint8. A patch cut by the border is stretched, as published.
    """
    windows = patch_windows(centres, diameter_px, image.shape[:2])
    patches = np.empty((len(windows), 3, side, side), dtype=np.uint8)
    for patch, (top, bottom, left, right) in zip(patches, windows, strict=True):
        patch[:] = resize(image[top:bottom, left:right], side).transpose(2, 0, 1)
    return patches


def iter_patches(
    slide: Slide, centres: np.ndarray, *, diameter_um: float, side: int, batch_size: int, progress_bar: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (row indices (b,), patches (b, side, side, 3) uint8) of a slide's finest level, in storage order.

    `centres` are (x, y) in its pixels, (n, 2).
    """
    from tqdm.auto import tqdm

    # Rounded, because a diameter of 145.0000001 px, off by the arithmetic alone, must not become 146.
    windows = patch_windows(np.round(centres, 6), round(diameter_um / slide.mpp, 6), slide.shape)
    image = slide.levels[0].array
    chunk = np.searchsorted(np.cumsum(image.chunks[1]), centres[:, 1], side="right")
    order = np.lexsort((centres[:, 0], chunk))
    reader = ChunkReader(image, windows[order][:, [0, 2, 1, 3]])

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows, np.stack([resize(reader.read(start + i), side) for i in range(len(rows))])

    with tqdm(total=len(centres), unit="tile", desc="tiles", disable=not progress_bar or len(centres) < 2) as bar:
        for rows, patches in prefetch(batches()):
            yield rows, patches
            bar.update(len(rows))


def resize(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resize to `side` × `side` by the published rule: area if the *height* shrinks or stays, else bicubic.

    Parameters
    ----------
    image
        (height, width, channels) uint8.

    Returns
    -------
    (side, side, channels) uint8.
    """
    height, width = image.shape[:2]
    if height < side:
        rows, columns = _cubic(height, side), _cubic(width, side)
    elif width < side:  # OpenCV's area mode cannot enlarge: where it must, both axes fall back to two taps
        rows, columns = _area_linear(height, side), _area_linear(width, side)
    else:
        rows, columns = _area(height, side), _area(width, side)
    mixed = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns, optimize=True)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _cubic(n_in: int, n_out: int) -> np.ndarray:
    """Bicubic weights (n_out, n_in): half-pixel centres, repeated edge, no anti-aliasing."""
    position = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    first = np.floor(position).astype(np.int64)
    weights = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        distance = np.abs(position - (first + tap))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        source = np.clip(first + tap, 0, n_in - 1)
        np.add.at(weights, (np.arange(n_out), source), np.where(distance <= 1, near, far))
    return weights


def _area(n_in: int, n_out: int) -> np.ndarray:
    """Exact box average, (n_out, n_in), for n_in ≥ n_out."""
    edges = np.arange(n_out + 1) * n_in / n_out
    pixels = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    overlap = np.maximum(overlap, 0.0)
    return overlap / overlap.sum(axis=1, keepdims=True)


def _area_linear(n_in: int, n_out: int) -> np.ndarray:
    """Two-tap weights (n_out, n_in) that OpenCV's area mode uses when one of the axes grows."""
    scale = n_in / n_out
    first = np.floor(np.arange(n_out) * scale).astype(np.int64)
    share = (np.arange(n_out) + 1) - (first + 1) / scale
    share = np.where(share <= 0, 0.0, share - np.floor(share))
    weights = np.zeros((n_out, n_in))
    np.add.at(weights, (np.arange(n_out), np.clip(first, 0, n_in - 1)), 1 - share)
    np.add.at(weights, (np.arange(n_out), np.clip(first + 1, 0, n_in - 1)), share)
    return weights
