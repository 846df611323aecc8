"""Defects of a slide, tile by tile: out of focus, pen, glass, folds. Arrays in, one number per tile out.

Tiles are RGB (b, h, w, 3) uint8 at about 1 µm per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

from .color import is_void, optical_density

__all__ = ["FoldReference", "blank_share", "fit_folds", "fold_share", "focus", "pen_share"]

# µm: the two bands of detail that are compared. Noise and JPEG's blocks lie below the first.
FOCUS_UM: Final = (0.7, 1.4, 2.8)
COARSE_UM: Final = 4.0  # a stroke and a gap are wider, and single nuclei average out
FOLD_UM: Final = 8.0
BLANK_DENSITY: Final = 0.075  # of the darkest channel: tinted glass has up to 0.06, the palest stroma 0.1

# Haematoxylin and eosin both absorb green most. Inks do not: shares of a channel's density in that of green.
INK_DENSITY: Final = 0.2
COLD_INK: Final = 1.4  # red, by green and blue ink; 99.9 % of stained pixels stay below 1.3
BLUE_INK: Final = (0.8, 0.4)  # red above and blue below, by blue ink on tissue; tissue has blue above 0.41
BLACK_INK: Final = (0.78, 0.7)  # weakest channel over the strongest, and mean density

FOLD_FACTOR: Final = 1.3  # denser than so many times what is normal for the hue
FOLD_BINS: Final = 12
FOLD_NORMAL: Final = 90  # percentile of density that is normal for a hue
FOLD_STAINED: Final = 0.08  # mean density of the three channels
FOLD_MIN_PIXELS: Final = 20 * FOLD_BINS


def focus(tiles: np.ndarray, mpp: float) -> np.ndarray:
    """Energy of detail of about 1 µm over that of about 2 µm, (b,) float32: falls with blur, whatever the contrast.

    Sharp H&E has 0.38 and more; a Gaussian blur of standard deviation 1 µm leaves 0.24 to 0.5, one of 2 µm less than 0.25.
    A tile of one colour has NaN.
    """
    grey = tiles.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    blurred = [ndimage.gaussian_filter(grey, (0, size / mpp, size / mpp), mode="nearest") for size in FOCUS_UM]
    fine, coarse = (np.square(near - far).mean(axis=(1, 2)) for near, far in zip(blurred, blurred[1:], strict=False))
    return np.divide(fine, coarse, out=np.full(len(tiles), np.nan, dtype=np.float32), where=coarse > 1e-3)


def blank_share(tiles: np.ndarray, mpp: float) -> np.ndarray:
    """Share of a tile that is bare glass, (b,) float32."""
    density = optical_density(_shrunk(tiles, COARSE_UM / mpp))
    return (density.max(axis=-1) < BLANK_DENSITY).mean(axis=(1, 2), dtype=np.float32)


def pen_share(tiles: np.ndarray, mpp: float) -> np.ndarray:
    """Share of a tile that has the colour of green, blue or black ink, (b,) float32.

    Red ink has the colour of blood and is not told from it.
    """
    return _is_ink(_shrunk(tiles, COARSE_UM / mpp)).mean(axis=(1, 2), dtype=np.float32)


def _is_ink(rgb: np.ndarray) -> np.ndarray:
    density = optical_density(rgb)
    red, green, blue = np.moveaxis(density, -1, 0)
    strong = density.max(axis=-1) > INK_DENSITY
    cold = red > COLD_INK * np.maximum(green, 0)
    on_tissue = (red > BLUE_INK[0] * green) & (blue < BLUE_INK[1] * green)
    black = (density.min(axis=-1) > BLACK_INK[0] * density.max(axis=-1)) & (density.mean(axis=-1) > BLACK_INK[1])
    return (strong & (cold | on_tissue | black)) & ~is_void(rgb)


@dataclass(frozen=True, eq=False)
class FoldReference:
    """How dense the tissue of a slide normally is.

    Attributes
    ----------
    hue
        Share of red in the density, increasing, (k,): low in eosin, high in haematoxylin.
    density
        Sum of the three channels' densities that 90 % of such tissue stays below, (k,).
    """

    hue: np.ndarray
    density: np.ndarray


def fit_folds(tiles: np.ndarray, mpp: float) -> FoldReference | None:
    """Normal density by hue, over the tissue of all `tiles` together; ``None`` if there is hardly any.

    Folds that cover more than a tenth of the tissue are taken for normal.
    """
    hue, total, tissue = _thickness(tiles, mpp)
    hue, total = hue[tissue], total[tissue]
    if len(hue) < FOLD_MIN_PIXELS:
        return None
    groups = np.array_split(np.argsort(hue, kind="stable"), FOLD_BINS)
    centres = np.array([np.median(hue[group]) for group in groups])
    density = np.array([np.percentile(total[group], FOLD_NORMAL) for group in groups])
    centres, first = np.unique(centres, return_index=True)
    return FoldReference(centres, np.maximum.reduceat(density, first))


def fold_share(tiles: np.ndarray, mpp: float, reference: FoldReference) -> np.ndarray:
    """Share of a tile in which tissue lies in several layers, (b,) float32.

    Light passes two layers one after the other: densities add up and the hue stays. So a fold is denser than tissue of its
    hue, while crowded nuclei are denser and bluer.
    """
    hue, total, tissue = _thickness(tiles, mpp)
    normal = np.interp(hue, reference.hue, reference.density)
    return (tissue & (total > FOLD_FACTOR * normal)).mean(axis=(1, 2), dtype=np.float32)


def _thickness(tiles: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, density and whether it is tissue, each (b, h, w), in squares of 8 µm."""
    # the mean of densities, not the density of means: thickness adds up in the former
    density = _shrunk(optical_density(tiles), FOLD_UM / mpp).clip(0)
    total = density.sum(axis=-1)
    colours = _shrunk(tiles, FOLD_UM / mpp)
    tissue = (total > 3 * FOLD_STAINED) & ~_is_ink(colours) & ~is_void(colours)
    return density[..., 0] / np.maximum(total, 1e-6), total, tissue


def _shrunk(tiles: np.ndarray, factor: float) -> np.ndarray:
    """Means over squares of about `factor` pixels, of the dtype of `tiles`; what is over is cut off on both sides."""
    side = max(1, min(round(factor), *tiles.shape[1:3]))
    rows, columns = (size // side for size in tiles.shape[1:3])
    top, left = (tiles.shape[1] - rows * side) // 2, (tiles.shape[2] - columns * side) // 2
    whole = tiles[:, top : top + rows * side, left : left + columns * side]
    means = whole.reshape(len(tiles), rows, side, columns, side, -1).mean(axis=(2, 4), dtype=np.float32)
    return means if tiles.dtype != np.uint8 else np.rint(means).astype(np.uint8)
