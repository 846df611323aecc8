"""Defects painted into a slide, at known places."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy import ndimage

INKS: Final = {"green": (25, 115, 70), "blue": (40, 60, 160), "black": (28, 28, 32)}


def paint(
    pixels: np.ndarray, centre: np.ndarray, side_px: float, mpp: float, defect: str, *, strength: float = 2.0
) -> None:
    """Paint a square tile of `pixels` (h, w, 3) uint8, in place.

    ``"blur"``: by a Gaussian of `strength` µm; ``"fold"``: a band of 40 % of the tile, `strength` times as thick;
    ``"blank"``: bare glass; ``"green"``, ``"blue"``, ``"black"``: a stroke across it, 30 µm wide, that lets 10 % through.
    """
    half = side_px / 2
    x0, y0 = np.maximum(np.floor(centre - half).astype(int) - 1, 0)
    x1, y1 = np.ceil(centre + half).astype(int) + 1
    tile = pixels[y0:y1, x0:x1]
    height, width = tile.shape[:2]
    if defect == "blur":
        reach = int(4 * strength / mpp)
        top, left = max(y0 - reach, 0), max(x0 - reach, 0)
        around = pixels[top : y1 + reach, left : x1 + reach].astype(np.float32)
        blurred = ndimage.gaussian_filter(around, (strength / mpp, strength / mpp, 0))
        tile[:] = blurred[y0 - top : y0 - top + height, x0 - left : x0 - left + width]
    elif defect == "fold":
        band = tile[:, int(0.3 * width) : int(0.7 * width)]
        band[:] = (256 * ((band.astype(np.float32) + 1) / 256) ** strength - 1).clip(0, 255)
    elif defect == "blank":
        noise = np.random.default_rng(0).normal(243, 2, tile.shape)
        tile[:] = noise.clip(0, 255)
    else:
        y, x = np.mgrid[:height, :width]
        stroke = np.abs(y - height / 2 - 0.5 * (x - width / 2)) < 15 / mpp
        tile[stroke] = 0.9 * np.array(INKS[defect]) + 0.1 * tile[stroke]
