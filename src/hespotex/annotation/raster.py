"""Between values of cells on a grid, of which only those in tissue exist, and rasters with holes."""

from __future__ import annotations

import numpy as np

from ..errors import DataValueError

__all__ = ["from_raster", "to_raster"]


def to_raster(
    values: np.ndarray, grid: np.ndarray, fill: float = np.nan, *, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """Lay values of cells out on the smallest raster that holds them.

    Parameters
    ----------
    values
        Values of the cells, (m,) or (m, k).
    grid
        Row and column of each cell, (m, 2) int; they need not start at 0.
    fill
        What holes hold.
    shape
        Rows and columns of the raster, if it is to reach beyond the last cell.

    Returns
    -------
    The raster (h, w) or (h, w, k), in the type of `values`, or float64 where integers cannot hold `fill`. Its first row
    and column are the least of `grid`.

    Raises
    ------
    DataValueError
        If there are no cells, lengths differ, two cells share a place, or `shape` is too small.

    Examples
    --------
    >>> import numpy as np
    >>> to_raster(np.array([1, 2, 3]), np.array([[5, 7], [5, 8], [6, 7]]), fill=-1).tolist()
    [[1, 2], [3, -1]]
    """
    values = np.asarray(values)
    place = _place(grid)
    if len(values) != len(place):
        raise DataValueError(f"values has {len(values)} rows for {len(place)} cells of grid")
    size = tuple(place.max(axis=0) + 1)
    if shape is not None:
        if shape[0] < size[0] or shape[1] < size[1]:
            raise DataValueError(f"shape={tuple(shape)} does not hold cells that span {tuple(map(int, size))}")
        size = tuple(shape)
    flat = np.ravel_multi_index(tuple(place.T), size)
    if len(np.unique(flat)) < len(flat):
        raise DataValueError("grid has two cells at one place; a raster holds one section")
    holds = not np.issubdtype(values.dtype, np.integer) or float(fill).is_integer()
    raster = np.full((*size, *values.shape[1:]), fill, dtype=values.dtype if holds else np.float64)
    raster[place[:, 0], place[:, 1]] = values
    return raster


def from_raster(raster: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Values of cells from a raster that :func:`to_raster` laid out for the same `grid`, (m,) or (m, k).

    Examples
    --------
    >>> import numpy as np
    >>> grid = np.array([[5, 7], [5, 8], [6, 7]])
    >>> from_raster(to_raster(np.array([1.0, 2.0, 3.0]), grid), grid).tolist()
    [1.0, 2.0, 3.0]
    """
    place = _place(grid)
    if (place.max(axis=0) >= raster.shape[:2]).any():
        raise DataValueError(f"raster of shape {raster.shape[:2]} is smaller than the cells of grid span")
    return raster[place[:, 0], place[:, 1]]


def _place(grid: np.ndarray) -> np.ndarray:
    """Row and column counted from the least of each."""
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.shape[1] != 2 or len(grid) == 0:
        raise DataValueError(f"grid must hold row and column of at least one cell, (m, 2), got shape {grid.shape}")
    if not np.issubdtype(grid.dtype, np.integer):
        raise DataValueError(f"grid must be of whole numbers, got {grid.dtype}")
    return grid.astype(np.int64) - grid.min(axis=0).astype(np.int64)
