"""Label images of nuclei, painted chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import zarr

    from ._nuclei import Nuclei

__all__ = ["CHUNK_PX", "label_dtype", "paint", "rasterise"]

CHUNK_PX = 1024


def label_dtype(highest: int) -> np.dtype:
    """Type of a label image whose numbers go up to `highest`."""
    return np.dtype(np.int32 if highest <= np.iinfo(np.int32).max else np.int64)


def rasterise(nuclei: Nuclei) -> zarr.Array:
    """Label image of `nuclei` on their grid: a chunked, compressed array in memory, a few bytes per nucleus.

    Where two nuclei overlap, pixels belong to the first.
    """
    import zarr

    height, width = nuclei.grid.shape
    raster = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=(height, width),
        chunks=(min(CHUNK_PX, height), min(CHUNK_PX, width)),
        dtype=label_dtype(nuclei.numbers.max(initial=0)),
        fill_value=0,
    )
    paint(raster, nuclei)
    return raster


def paint(raster: zarr.Array, nuclei: Nuclei) -> None:
    """Write nuclei into a label image (h, w), where nothing is yet.

    Each chunk that they touch is read and written once, so that no more than one of them is in memory.
    """
    height, width = raster.shape
    rows, columns = raster.chunks
    top, left, bottom, right = np.clip(nuclei.regions.boxes, 0, [height, width, height, width]).T
    inside = np.flatnonzero((bottom > top) & (right > left))
    # A pair of a chunk and a nucleus for each that they share; few nuclei lie in more than one.
    pairs = [np.empty((0, 3), dtype=np.int64)]
    step_y, step_x = top // rows, left // columns
    for down in range(int(((bottom[inside] - 1) // rows - step_y[inside]).max(initial=-1)) + 1):
        for across in range(int(((right[inside] - 1) // columns - step_x[inside]).max(initial=-1)) + 1):
            y, x = step_y[inside] + down, step_x[inside] + across
            met = (y * rows < bottom[inside]) & (x * columns < right[inside])
            pairs.append(np.column_stack([y, x, inside])[met])
    every = np.concatenate(pairs)
    every = every[np.lexsort(every.T[::-1])]
    if not len(every):
        return
    starts = np.flatnonzero((np.diff(every[:, :2], axis=0, prepend=-1) != 0).any(axis=1))
    for start, stop in zip(starts, [*starts[1:], len(every)], strict=True):
        y, x = every[start, :2] * (rows, columns)
        _paint_chunk(
            raster, nuclei, every[start:stop, 2], slice(y, min(y + rows, height)), slice(x, min(x + columns, width))
        )


def _paint_chunk(raster: zarr.Array, nuclei: Nuclei, members: np.ndarray, rows: slice, columns: slice) -> None:
    chunk = np.asarray(raster[rows, columns])
    boxes = nuclei.regions.boxes[members].tolist()
    numbers = nuclei.numbers[members]
    for (top, left, bottom, right), number, mask in zip(boxes, numbers, nuclei.regions.masks(members), strict=True):
        y0, y1 = max(top, rows.start), min(bottom, rows.stop)
        x0, x1 = max(left, columns.start), min(right, columns.stop)
        place = chunk[y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start]
        part = mask[y0 - top : y1 - top, x0 - left : x1 - left]
        place[part & (place == 0)] = number
    raster[rows, columns] = chunk
