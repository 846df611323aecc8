"""Tissue against glass, on a small copy of the slide. Arrays in, a mask or polygons out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from shapely.geometry import Polygon

__all__ = ["mask_polygons", "tissue_mask"]

BLACK = 40  # brightest channel of pixels that are no glass at all: masked-out background, frame, mount
SMOOTH_UM = 24.0  # wider than a cell, so that the space between nuclei is tissue, too
CLOSE_UM = 48.0
OPEN_UM = 32.0
MIN_COLOUR = 0.2  # of the optical density; H&E has 0.3 and more, pen, shadow and printed frames below 0.17
MIN_DENSITY = 0.06  # pieces that absorb less are glass, uneven or dusty (up to 0.03); the palest tissue absorbs 0.2,
MAX_TINT = (
    0.15  # unless their own colour is none that glass has: then tissue was taken for the glass, where all is tissue
)
LENIENCE = 0.9  # of Otsu's threshold: pale fat and torn edges lie just below it
_ROWS = 64  # whose channels are floats at a time


def tissue_mask(rgb: np.ndarray, mpp: float, *, min_area_um2: float, max_hole_um2: float) -> np.ndarray:
    """Mask (h, w) of H&E-stained tissue in an image (h, w, 3) uint8 of about 16 µm/px.

    Glass is the commonest colour of the brighter half of the image, whatever its tint. What absorbs more light
    than it by Otsu's threshold is tissue, unless it is black or grey, or absorbs next to nothing.

    Parameters
    ----------
    rgb
        Image, (h, w, 3) uint8.
    mpp
        µm per pixel.
    min_area_um2
        Smaller pieces are dropped.
    max_hole_um2
        Smaller holes are filled.
    """
    from skimage.filters import threshold_otsu

    black = rgb.max(axis=2) < BLACK
    if black.all():
        return np.zeros(black.shape, dtype=bool)
    glass = _glass(rgb[~black])

    def density(pixels: np.ndarray) -> np.ndarray:
        return np.clip(-np.log((pixels + 1) / (glass + 1)), 0, None)

    absorbed = _by_rows(rgb, lambda pixels: np.linalg.norm(density(pixels), axis=2))
    absorbed[black] = 0
    absorbed = ndimage.gaussian_filter(absorbed, SMOOTH_UM / mpp)
    # The root evens out the long tail of dark nuclei, which draws Otsu's threshold up into the stroma.
    level = np.sqrt(absorbed)
    if np.ptp(level[~black]) < 1e-3:
        return np.zeros(black.shape, dtype=bool)
    mask = (level > LENIENCE * threshold_otsu(level[~black])) & ~black
    del level
    mask = _smooth(mask, mpp) & ~black
    mask = _fill(mask, max_hole_um2 / mpp**2)
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    index = np.arange(1, count + 1)
    area = ndimage.sum_labels(mask, pieces, index)
    hue = _by_rows(rgb, lambda pixels: np.ptp(density(pixels), axis=2))
    hue[black] = 0
    colour = ndimage.mean(hue, pieces, index)
    del hue
    strength = ndimage.mean(absorbed, pieces, index)
    kept = (area * mpp**2 >= min_area_um2) & (colour >= MIN_COLOUR * strength)
    tint = ndimage.mean(_by_rows(rgb, lambda pixels: np.ptp(np.log(pixels + 1), axis=2)), pieces, index)
    kept &= (strength >= MIN_DENSITY) | (tint > MAX_TINT)
    return np.concatenate([[False], kept])[pieces]


def mask_polygons(mask: np.ndarray) -> list[Polygon]:
    """Outlines of the pieces of a mask, with holes, in its pixels; largest first."""
    from shapely import box, union_all

    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    stops = np.nonzero(change == -1)[1]  # both in row-major order, hence paired
    if len(rows) == 0:
        return []
    area = union_all(box(starts, rows, stops, rows + 1)).buffer(0)
    # Half a diagonal: takes the staircase away and moves no edge by a pixel.
    outline = area.simplify(0.75).buffer(0)
    pieces = list(getattr(outline, "geoms", [outline]))
    return sorted(pieces, key=lambda piece: -piece.area)


def _by_rows(rgb: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A number (h, w) float32 for each pixel, of some rows at a time: channels as floats take several times the image."""
    values = np.empty(rgb.shape[:2], dtype=np.float32)
    for start in range(0, len(rgb), _ROWS):
        rows = slice(start, start + _ROWS)
        values[rows] = measure(rgb[rows].astype(np.float32))
    return values


def _glass(pixels: np.ndarray) -> np.ndarray:
    """Commonest colour of the brighter half of `pixels` (n, 3) uint8, (3,) float32."""
    brightness = pixels.mean(axis=1, dtype=np.float32)
    bright = brightness >= np.median(brightness)
    count, edges = np.histogram(brightness[bright], bins=64)
    peak = int(count.argmax())
    commonest = (brightness >= edges[peak]) & (brightness <= edges[peak + 1])
    return np.median(pixels[commonest], axis=0).astype(np.float32)


def _smooth(mask: np.ndarray, mpp: float) -> np.ndarray:
    close, open_ = (max(1, round(size / mpp)) for size in (CLOSE_UM, OPEN_UM))
    padded = np.pad(mask, close + open_, mode="edge")  # tissue that touches the border is not eaten there
    padded = ndimage.binary_opening(ndimage.binary_closing(padded, _disk(close)), _disk(open_))
    inner = slice(close + open_, -(close + open_))
    return padded[inner, inner]


def _fill(mask: np.ndarray, max_size: float) -> np.ndarray:
    holes, count = ndimage.label(~mask)
    size = np.bincount(holes.ravel(), minlength=count + 1)
    fillable = size <= max_size
    fillable[0] = False
    # A corner of glass that tissue cuts off from the rest is no hole.
    fillable[np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])] = False
    return mask | fillable[holes]


def _disk(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius
