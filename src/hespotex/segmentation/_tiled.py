"""Segment a slide block by block as if it were one image.

A block is read with its surroundings; of what is found, it keeps the nuclei whose centroid lies in its core, whole,
also where they reach beyond it. So nothing is cut at a seam, and nothing is found twice unless the backend sees the
same nucleus differently from two sides; such pairs are recognised by their overlap.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._settings import settings
from ..errors import DataTypeError, DataValueError, HespotexWarning
from ..image.stream import Block, WorkingGrid, iter_blocks, working_grid
from ._outline import Regions, measure_regions
from .labels import check_numbers

if TYPE_CHECKING:
    import zarr

    from ..data.geometry import Slide

__all__ = ["Nuclei", "rasterise", "segment_slide"]

BLOCK_PX = 1024
_CHUNK_PX = 1024

#: A function of a block that returns its label image, the surroundings included.
Backend = Callable[[Block], np.ndarray]


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Nuclei of a slide.

    Attributes
    ----------
    ids
        Id of each, unique and not 0, (n,) int64.
    regions
        Their outlines and measures in pixels of `grid`.
    grid
        The working grid.
    """

    ids: np.ndarray
    regions: Regions
    grid: WorkingGrid

    def centroids(self) -> np.ndarray:
        """Centres (x, y) in level-0 pixels, (n, 2)."""
        return self.grid.to_pixels(self.regions.centroids)

    def outlines(self) -> np.ndarray:
        """Polygons in level-0 pixels, (n,)."""
        from shapely import transform

        return transform(self.regions.polygons, self.grid.to_pixels)


def segment_slide(
    slide: Slide,
    backend: Backend,
    *,
    mpp: float,
    halo_px: int,
    block_px: int = BLOCK_PX,
    n_jobs: int | None = None,
    keep_names: bool = False,
    progress_bar: bool | None = None,
) -> Nuclei:
    """Find the nuclei of a slide.

    Parameters
    ----------
    slide
        As :func:`hespotex.data.geometry.resolve_slide` gives it.
    backend
        Label image of a block; with `n_jobs` above 1 called in several threads.
    mpp
        Working resolution in µm per pixel.
    halo_px
        Surroundings read with each block: at least the length of a nucleus.
    block_px
        Side of a block. It bounds memory and does not change the result.
    n_jobs
        Blocks worked on at a time; the setting by default.
    keep_names
        Whether labels mean the same in all blocks: they become the ids. Else ids are 1…n, along rows.
    progress_bar
        The setting by default.
    """
    if block_px < 1 or halo_px < 1:
        raise DataValueError(f"block_px={block_px!r} and halo_px={halo_px!r} must be positive")
    blocks = iter_blocks(slide, mpp=mpp, block_px=block_px, halo_px=halo_px, progress_bar=progress_bar)
    grid = working_grid(slide, mpp)
    parts = list(_in_threads(lambda block: _segment_block(block, backend), blocks, n_jobs or settings.n_jobs))
    regions = Regions.concatenate([part for part, _ in parts])
    if cut := sum(count for _, count in parts):
        warnings.warn(
            f"{cut} nuclei reach further than {halo_px} px ({halo_px * grid.mpp:.0f} µm) from their block and were cut; "
            f"raise diameter_um if nuclei are that large",
            HespotexWarning,
            stacklevel=4,
        )
    # An order that does not depend on blocks: along rows of pixels.
    y, x = np.floor(regions.centroids[:, 1]), regions.centroids[:, 0]
    regions = regions.take(np.lexsort((x, y)))
    regions = regions.take(_without_doubles(regions, block_px, by_name=keep_names))
    ids = regions.names if keep_names else np.arange(1, len(regions) + 1)
    return Nuclei(ids=ids, regions=regions, grid=grid)


def rasterise(nuclei: Nuclei) -> zarr.Array:
    """Label image of `nuclei` on their grid: a chunked, compressed array in memory, a few bytes per nucleus pixel.

    Where two nuclei overlap, pixels belong to the first.
    """
    import zarr

    height, width = nuclei.grid.shape
    dtype = np.int32 if nuclei.ids.max(initial=0) <= np.iinfo(np.int32).max else np.int64
    raster = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=(height, width),
        chunks=(min(_CHUNK_PX, height), min(_CHUNK_PX, width)),
        dtype=dtype,
        fill_value=0,
    )
    top, left, bottom, right = nuclei.regions.boxes.T
    for start in range(0, height, _CHUNK_PX):
        stop = min(start + _CHUNK_PX, height)
        strip = np.zeros((stop - start, width), dtype=dtype)
        for row in np.flatnonzero((top < stop) & (bottom > start)):
            upper, lower = max(top[row], start), min(bottom[row], stop)
            near, far = max(left[row], 0), min(right[row], width)
            mask = nuclei.regions.masks[row][upper - top[row] : lower - top[row], near - left[row] : far - left[row]]
            place = strip[upper - start : lower - start, near:far]
            place[mask & (place == 0)] = nuclei.ids[row]
        if strip.any():
            raster[start:stop] = strip
    return raster


def _segment_block(block: Block, backend: Backend) -> tuple[Regions, int]:
    """Regions whose centroid lies in the core, on the grid; and how many of them the window cuts."""
    labels = np.asarray(backend(block))
    if labels.shape != block.pixels.shape[:2]:
        raise DataValueError(
            f"the segmenter returned labels of shape {labels.shape} for {block.pixels.shape[:2]} pixels"
        )
    if labels.dtype.kind not in "iu":
        raise DataTypeError(f"the segmenter returned {labels.dtype}; labels are whole numbers, 0 for background")
    labels = _on_grid(check_numbers(labels, "the segmenter's label image"), block)
    origin = (block.y - block.halo_px, block.x - block.halo_px)
    regions = measure_regions(labels, block.pixels, block.grid.mpp, block.core, origin)
    window = np.array([*origin, origin[0] + labels.shape[0], origin[1] + labels.shape[1]])
    return regions, int((regions.boxes == window).any(axis=1).sum())


def _on_grid(labels: np.ndarray, block: Block) -> np.ndarray:
    """`labels` without what lies beyond the slide, where there is only filling."""
    height, width = block.grid.shape
    top, left = block.y - block.halo_px, block.x - block.halo_px
    rows, columns = slice(max(-top, 0), height - top), slice(max(-left, 0), width - left)
    inside = np.zeros(labels.shape, dtype=bool)
    inside[rows, columns] = True
    return labels if inside.all() else np.where(inside, labels, 0)


def _in_threads(
    function: Callable[[Block], tuple[Regions, int]], blocks: Iterator[Block], n_jobs: int
) -> Iterator[tuple[Regions, int]]:
    """Results in order, with at most one block more in memory than is worked on."""
    if n_jobs == 1:
        yield from map(function, blocks)
        return
    waiting: deque[Future[tuple[Regions, int]]] = deque()
    with ThreadPoolExecutor(n_jobs) as pool:
        try:
            for block in blocks:
                waiting.append(pool.submit(function, block))
                if len(waiting) > n_jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _without_doubles(regions: Regions, block_px: int, *, by_name: bool) -> np.ndarray:
    """Rows of `regions` without those that show a nucleus again that an earlier row shows."""
    if by_name:
        return np.sort(np.unique(regions.names, return_index=True)[1])
    from shapely import STRtree, intersection
    from shapely import area as area_of

    # Only at seams can blocks disagree.
    first, last = regions.boxes[:, :2] // block_px, (regions.boxes[:, 2:] - 1) // block_px
    seam = np.flatnonzero((first != last).any(axis=1) | (regions.boxes % block_px == 0).any(axis=1))
    polygons = regions.polygons[seam]
    one, other = STRtree(polygons).query(polygons, predicate="intersects")
    one, other = one[one < other], other[one < other]
    shared = area_of(intersection(polygons[one], polygons[other]))
    smaller = np.minimum(area_of(polygons[one]), area_of(polygons[other]))
    doubles = seam[other[shared > smaller / 2]]
    return np.setdiff1d(np.arange(len(regions)), doubles)
