"""Shape numbers of outlines that come without a label image."""

from __future__ import annotations

import numpy as np

from ._outline import FEATURES

__all__ = ["SHAPE_FEATURES", "largest_pieces", "measure_polygons"]

#: Those of :data:`FEATURES` that follow from the outline alone.
SHAPE_FEATURES = tuple(name for name in FEATURES if "haematoxylin" not in name)


def largest_pieces(geometries: np.ndarray) -> np.ndarray:
    """Polygons without holes, of several pieces the largest, (n,)."""
    import shapely

    pieces, owner = shapely.get_parts(geometries, return_index=True)
    order = np.lexsort((shapely.area(pieces), owner))
    last = np.flatnonzero(np.diff(owner[order], append=len(geometries)))
    return shapely.polygons(shapely.get_exterior_ring(pieces[order[last]]))


def measure_polygons(polygons: np.ndarray, mpp: float) -> np.ndarray:
    """Area, perimeter, axes, eccentricity, circularity and solidity, in the order of :data:`SHAPE_FEATURES`.

    The same numbers as of a label image, whose pixels are squares, but for the steps of its outlines.

    Parameters
    ----------
    polygons
        (n,) shapely polygons without holes, in pixels.
    mpp
        µm per pixel.

    Returns
    -------
    (n, 7) float32.

    Examples
    --------
    >>> import numpy as np, shapely
    >>> disc = np.array([shapely.Point(5, 5).buffer(4, 64)])
    >>> print(measure_polygons(disc, 0.5).round(2))
    [[12.57 12.57  4.    4.    0.    1.    1.  ]]
    """
    import shapely

    area, perimeter = shapely.area(polygons), shapely.length(polygons)
    xx, yy, xy = _variances(polygons)
    half_trace, root = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    large, small = half_trace + root, np.maximum(half_trace - root, 1e-9)
    columns = {
        "area_um2": area * mpp**2,
        "perimeter_um": perimeter * mpp,
        "major_axis_um": 4 * np.sqrt(large) * mpp,
        "minor_axis_um": 4 * np.sqrt(small) * mpp,
        "eccentricity": np.sqrt(np.maximum(1 - small / large, 0)),
        "circularity": 4 * np.pi * area / perimeter**2,
        "solidity": area / shapely.area(shapely.convex_hull(polygons)),
    }
    return np.column_stack([columns[name] for name in SHAPE_FEATURES]).astype(np.float32)


def _variances(polygons: np.ndarray) -> np.ndarray:
    """Variances of x and y over the area, and their covariance, (3, n), by Green's theorem."""
    import shapely

    count = len(polygons)
    ring, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    centre = shapely.get_coordinates(shapely.centroid(polygons))
    x, y = (ring - centre[owner]).T
    inside = owner[1:] == owner[:-1]  # a ring ends where it begins; the step to the next one is none
    x0, x1, y0, y1, owner = x[:-1][inside], x[1:][inside], y[:-1][inside], y[1:][inside], owner[1:][inside]
    cross = x0 * y1 - x1 * y0
    area = np.bincount(owner, cross, count) / 2  # of either sign, as that of the moments
    xx = np.bincount(owner, cross * (x0 * x0 + x0 * x1 + x1 * x1), count) / 12
    yy = np.bincount(owner, cross * (y0 * y0 + y0 * y1 + y1 * y1), count) / 12
    xy = np.bincount(owner, cross * (x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0), count) / 24
    return np.stack([xx, yy, xy]) / area
