"""Whether an image is the one seen before, from a sample of its pixels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ._chunks import ChunkReader

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["fingerprint"]

SAMPLES = 48  # a chunk is decoded for each: a fraction of a second
WINDOW_PX = 32


def fingerprint(slide: Slide, centres: np.ndarray) -> str:
    """SHA-256 of the image's size and of its pixels at some of `centres`, level-0 (x, y), (n, 2).

    Another image, stain normalisation or a change of contrast changes it. A retouched corner that none of the samples
    meets does not: reading all pixels would cost as much as what this saves.
    """
    state = hashlib.sha256(repr((slide.shape, [level.array.shape for level in slide.levels])).encode())
    if len(centres):
        chosen = centres[np.unique(np.linspace(0, len(centres) - 1, SAMPLES).round().astype(int))]
        corner = np.floor(chosen[:, ::-1]).astype(np.int64) - WINDOW_PX // 2
        reader = ChunkReader(slide.levels[0].array, np.hstack([corner, corner + WINDOW_PX]))
        for index in range(len(corner)):
            state.update(reader.read(index).tobytes())
    return state.hexdigest()
