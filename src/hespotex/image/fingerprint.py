"""Whether an image is the one seen before, from an overview and samples of its pixels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ._chunks import ChunkReader

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["fingerprint"]

OVERVIEW_PX = 1_000_000
SAMPLES = 4  # a chunk is decoded for each, which the encoder decodes once more: few of a slide
WINDOW_PX = 32


def fingerprint(slide: Slide, centres: np.ndarray) -> str:
    """SHA-256 of the image's size, of an overview, and of its finest pixels at some of `centres`, level-0 (x, y), (n, 2).

    The overview is the coarsest level, of which every k-th row and column is taken where it has more than a million
    pixels. So another image, stain normalisation, a change of contrast and a region painted over all change the
    fingerprint; a few finest pixels retouched between the samples do not. A pyramid is seen in a fraction of a second;
    an image of a single level has to be decoded once.
    """
    state = hashlib.sha256(repr((slide.shape, [level.array.shape for level in slide.levels])).encode())
    coarsest = slide.levels[-1].array
    step = int(np.ceil(np.sqrt(coarsest.shape[1] * coarsest.shape[2] / OVERVIEW_PX)))
    # Chunk after chunk, each reduced when it is read: as little in memory as an encoder needs.
    state.update(coarsest[:, ::step, ::step].compute(scheduler="synchronous").tobytes())
    if len(centres):
        chosen = centres[np.unique(np.linspace(0, len(centres) - 1, SAMPLES).round().astype(int))]
        corner = np.floor(chosen[:, ::-1]).astype(np.int64) - WINDOW_PX // 2
        reader = ChunkReader(slide.levels[0].array, np.hstack([corner, corner + WINDOW_PX]))
        for index in range(len(corner)):
            state.update(reader.read(index).tobytes())
    return state.hexdigest()
