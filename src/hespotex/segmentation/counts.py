"""How many nuclei belong to a spot."""

from __future__ import annotations

import numpy as np

from ..errors import DataValueError

__all__ = ["count_in_circles", "count_in_polygons", "count_in_window"]

_SQUARE_PX = 2048


def count_in_window(labels: np.ndarray, xy: np.ndarray, diameter_px: float) -> np.ndarray:
    """Distinct labels in the square patch of each spot, as HESpotEx counts nuclei: the background is one, too.

    The window of a spot at (x, y), both cut to whole pixels, is rows ``y - r`` to ``y + r`` (exclusive) and columns
    alike, with ``r = floor(ceil(diameter) / 2)``, clipped to the image. A nucleus that the border cuts counts fully. A
    window wholly outside the image counts 0; the published code counts pixels from the other end there.

    Parameters
    ----------
    labels
        Label image (h, w); anything that slices to an integer array, lazy or not.
    xy
        Centres in pixels of `labels`, (n, 2).
    diameter_px
        Diameter of a spot in the same pixels.

    Returns
    -------
    (n,) int64.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((10, 10), int)
    >>> labels[4, 4], labels[9, 9] = 1, 2
    >>> count_in_window(labels, np.array([[5.0, 5.0], [40.0, 5.0]]), 4.0).tolist()
    [2, 0]
    """
    xy = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(xy).all() or not np.isfinite(diameter_px) or diameter_px <= 0:
        raise DataValueError(f"xy must be finite and diameter_px={diameter_px!r} positive")
    reach = int(np.ceil(diameter_px)) // 2
    centre = xy.astype(np.int64)
    height, width = labels.shape
    low = (centre - reach).clip(0)
    high = np.minimum(centre + reach, (width, height))
    counts = np.zeros(len(xy), dtype=np.int64)
    there = np.flatnonzero((high > low).all(axis=1))
    # A lazy label image is read in squares, or each chunk would be decoded anew for each spot on it.
    squares, square = np.unique(low[there] // _SQUARE_PX, axis=0, return_inverse=True)
    order = np.argsort(square, kind="stable")
    for rows in np.split(there[order], np.cumsum(np.bincount(square, minlength=len(squares)))[:-1]):
        if not len(rows):
            continue
        (left, top), (right, bottom) = low[rows].min(axis=0), high[rows].max(axis=0)
        part = np.asarray(labels[top:bottom, left:right])
        for row in rows:
            (x0, y0), (x1, y1) = low[row], high[row]
            counts[row] = len(np.unique(part[y0 - top : y1 - top, x0 - left : x1 - left]))
    return counts


def count_in_circles(points: np.ndarray, centres: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Points (m, 2) in each circle, its rim included; (n,) int64.

    Examples
    --------
    >>> import numpy as np
    >>> count_in_circles(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0]]), 5.0).tolist()
    [2]
    """
    from scipy.spatial import cKDTree

    if len(points) == 0 or len(centres) == 0:
        return np.zeros(len(centres), dtype=np.int64)
    found = cKDTree(points).query_ball_point(centres, radius, return_length=True)
    return np.asarray(found, dtype=np.int64)


def count_in_polygons(points: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """Points (m, 2) inside each of an array of shapely polygons; (n,) int64."""
    from shapely import STRtree
    from shapely import points as as_points

    if len(points) == 0 or len(polygons) == 0:
        return np.zeros(len(polygons), dtype=np.int64)
    polygon, _ = STRtree(as_points(points)).query(polygons, predicate="contains")
    return np.bincount(polygon, minlength=len(polygons)).astype(np.int64)
