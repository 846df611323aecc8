"""Colour of H&E as absorbance: optical density and the amounts of its two dyes.

Light that passes a stained section is absorbed exponentially (Beer-Lambert), so the optical density of a pixel is
linear in the amounts of haematoxylin and eosin, and a 3 x 3 matrix separates them (Ruifrok & Johnston 2001). As a
channel has 256 values only, each dye is the sum of three table look-ups: no logarithm is taken per pixel.

Everything here is a pure function of arrays; images are (h, w, 3) uint8 RGB.
"""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = [
    "HE_VECTORS",
    "haematoxylin",
    "is_void",
    "optical_density",
    "stain_tables",
]

#: Absorbance of haematoxylin and eosin in red, green and blue, unit length (Ruifrok & Johnston 2001), (2, 3).
HE_VECTORS: Final = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]]) / np.linalg.norm(
    [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]], axis=1, keepdims=True
)

_WHITE: Final = 255.0
_VOID_BELOW: Final = 16  # no dye is opaque in all three channels; what is so dark was never scanned, or masked
# A black pixel would be infinitely dense; half a grey level keeps 0 apart from 1 and all values finite.
_FLOOR: Final = 0.5


def _density_table(white: float) -> np.ndarray:
    """Optical density of the 256 values of a channel, (256,)."""
    return np.log10(white / np.maximum(np.arange(256.0), _FLOOR))


def _as_white(white: np.ndarray | float) -> np.ndarray:
    return np.broadcast_to(np.asarray(white, dtype=float), (3,))


def optical_density(rgb: np.ndarray, *, white: np.ndarray | float = _WHITE) -> np.ndarray:
    """Optical density ``log10(white / value)`` of each channel.

    Parameters
    ----------
    rgb
        Image, (..., 3) uint8.
    white
        Value of unstained glass, one number or one per channel. Pixels brighter than it get a negative density.

    Returns
    -------
    (..., 3) float32.

    Examples
    --------
    >>> import numpy as np
    >>> print(optical_density(np.array([255, 26, 255], np.uint8)).round(2))
    [0.   0.99 0.  ]
    """
    out = np.empty(rgb.shape, np.float32)
    for channel, value in enumerate(_as_white(white)):
        out[..., channel] = _density_table(value).astype(np.float32)[rgb[..., channel]]
    return out


def stain_tables(vectors: np.ndarray = HE_VECTORS, *, white: np.ndarray | float = _WHITE) -> np.ndarray:
    """Tables that turn channel values into amounts of dye.

    The amount of dye ``s`` in a pixel is ``tables[s, 0, r] + tables[s, 1, g] + tables[s, 2, b]``. The third dye is
    the residual: density that neither vector explains (pigment, ink, glass).

    Parameters
    ----------
    vectors
        Absorbance of the two dyes in red, green and blue, (2, 3), of any length.
    white
        Value of unstained glass, one number or one per channel.

    Returns
    -------
    (3, 3, 256) float32: dye (haematoxylin, eosin, residual), channel, value.
    """
    first, second = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    residual = np.cross(first, second)
    matrix = np.stack([first, second, residual / np.linalg.norm(residual)])
    density = np.stack([_density_table(value) for value in _as_white(white)])
    # density = amounts @ matrix, hence amounts = density @ inv(matrix)
    return np.ascontiguousarray(np.linalg.inv(matrix).T[:, :, None] * density[None], dtype=np.float32)


def haematoxylin(
    rgb: np.ndarray, vectors: np.ndarray = HE_VECTORS, *, white: np.ndarray | float = _WHITE
) -> np.ndarray:
    """Amount of haematoxylin in each pixel: what makes nuclei dark.

    Parameters
    ----------
    rgb
        Image, (h, w, 3) uint8.
    vectors, white
        As in :func:`stain_tables`, whose first dye this is.

    Returns
    -------
    (h, w) float32.
    """
    return _apply(rgb, stain_tables(vectors, white=white)[0])


def _apply(rgb: np.ndarray, table: np.ndarray) -> np.ndarray:
    amount = np.take(table[0], rgb[..., 0])
    amount += np.take(table[1], rgb[..., 1])
    amount += np.take(table[2], rgb[..., 2])
    return amount


def is_void(rgb: np.ndarray) -> np.ndarray:
    """Whether pixels are black: masked by an author or left out by a scanner, not the densest of tissue.

    Parameters
    ----------
    rgb
        Image, (..., 3) uint8.

    Returns
    -------
    (...) bool.
    """
    return np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2]) < _VOID_BELOW
