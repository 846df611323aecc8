"""Pixels that show how nuclei look on a slide, without reading it all at full resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..image.stream import WorkingGrid, iter_blocks, working_grid
from ._appearance import nuclear_density, otsu

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["sample_tissue"]

OVERVIEW_UM = 16.0
OVERVIEW_BLOCK_PX = 256
SQUARE_UM = 160.0
MAX_SQUARES = 32


def sample_tissue(slide: Slide, mpp: float) -> np.ndarray:
    """Up to 32 squares of 160 µm, spread evenly over the dark part of the slide: (n, 3) uint8 pixels at `mpp`.

    They lie on a fixed lattice: the same slide always gives the same sample.
    """
    grid = working_grid(slide, mpp)
    side = max(1, round(SQUARE_UM / grid.mpp))
    darkness = _darkness(slide, grid, side)
    values, counts = np.unique(darkness.round(3), return_counts=True)
    dark = np.argwhere(darkness.round(3) >= otsu(counts.astype(np.float64), values))
    chosen = dark[np.unique(np.linspace(0, len(dark) - 1, MAX_SQUARES).round().astype(int))]
    middle = grid.to_pixels((chosen[:, ::-1] + 0.5) * side)
    boxes = np.column_stack([middle - 0.1, middle + 0.1])  # touches its own square only
    blocks = iter_blocks(slide, mpp=mpp, block_px=side, boxes=boxes, progress_bar=False)
    return np.concatenate([_on_image(block.pixels, block.place, grid).reshape(-1, 3) for block in blocks])


def _darkness(slide: Slide, grid: WorkingGrid, side: int) -> np.ndarray:
    """Mean density in red of each square of `side` pixels of `grid`, (rows, columns)."""
    rows, columns = (-(-size // side) for size in grid.shape)
    total, count = np.zeros(rows * columns), np.zeros(rows * columns)
    overview_um = max(OVERVIEW_UM, grid.mpp)
    for block in iter_blocks(slide, mpp=overview_um, block_px=OVERVIEW_BLOCK_PX, progress_bar=False):
        row, column = (
            ((np.arange(place.start, place.stop) + 0.5) * there / here / side).astype(int).clip(0, size - 1)
            for place, there, here, size in zip(
                block.place, block.grid.factor[::-1], grid.factor[::-1], (rows, columns), strict=True
            )
        )
        square = (row[:, None] * columns + column).ravel()
        density = nuclear_density(block.pixels[block.core], 255.0).ravel()
        total += np.bincount(square, density, rows * columns)
        count += np.bincount(square, minlength=rows * columns)
    return (total / np.maximum(count, 1)).reshape(rows, columns)


def _on_image(pixels: np.ndarray, place: tuple[slice, slice], grid: WorkingGrid) -> np.ndarray:
    """The pixels of a block that lie on the slide, and not beyond."""
    return pixels[: grid.shape[0] - place[0].start, : grid.shape[1] - place[1].start]
