"""How much of each part lies under each observation: the one operator that ties fine levels to measured ones.

A share is an area (or a count of centroids) in units of a whole part, so that ``share @ values`` sums values per part.
All geometry is exact: the overlap of a disc and a polygon has a closed form, which cells cut by the tissue's border
need as well as whole ones.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import sparse

from ..errors import DataValueError

__all__ = [
    "aggregate",
    "disc_overlaps",
    "disc_shares",
    "inside_shares",
    "polygon_shares",
    "reconcile",
    "within_shares",
]

_PAIRS_AT_ONCE = 500_000
_COLUMNS_AT_ONCE = 64


def aggregate(
    share: sparse.csr_array, values: np.ndarray | sparse.sparray, how: Literal["sum", "mean"] = "sum"
) -> np.ndarray:
    """Values of observations from values of their parts, (n, G).

    Parameters
    ----------
    share
        Observations × parts, (n, m).
    values
        Values of whole parts, (m, G).
    how
        ``"sum"`` of what lies under the observation, or its ``"mean"``, NaN where there is nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> share = sparse.csr_array(np.array([[1.0, 0.5]]))
    >>> aggregate(share, np.array([[2.0], [4.0]])).tolist(), aggregate(share, np.array([[2.0], [5.0]]), "mean").tolist()
    ([[4.0]], [[3.0]])
    """
    if share.shape[1] != values.shape[0]:
        raise DataValueError(f"share has {share.shape[1]} parts, values has {values.shape[0]} rows")
    if sparse.issparse(values):
        total = (share @ values).toarray()
    else:
        total = np.empty((share.shape[0], *values.shape[1:]), dtype=np.result_type(share.dtype, values.dtype))
        for some in _pieces(values.shape[-1], _COLUMNS_AT_ONCE):  # scipy casts what it multiplies by as a whole
            total[..., some] = share @ values[..., some]
    if how == "sum":
        return total
    if how != "mean":
        raise DataValueError(f"how={how!r} is unknown; possible: 'sum', 'mean'")
    covered = np.asarray(share.sum(axis=1)).reshape(-1, 1)
    return np.divide(total, covered, out=np.full(total.shape, np.nan), where=covered > 0)


def reconcile(
    share: sparse.csr_array,
    expected: np.ndarray,
    counts: np.ndarray | sparse.sparray,
    *,
    max_iter: int = 200,
    tol: float = 1e-6,
) -> np.ndarray:
    """Expected values of parts, rescaled until those of every observation add up to its counts.

    A part under one observation is scaled by counts over expectation, y / Σ m λ, which is exact after one step. Where
    observations overlap or a part lies under several, the step is repeated with the mean factor of each part (the EM
    algorithm for Poisson sums): the total stays right in every step, and the limit is exact wherever that is possible.

    Parameters
    ----------
    share
        Observations × parts, (n, m).
    expected
        Expected values of whole parts, not negative, (m, G).
    counts
        Measured counts of the observations, (n, G).
    max_iter, tol
        Steps at most, and the error of a sum, relative to a count (of one at least), that is small enough to stop.

    Returns
    -------
    (m, G) float64. Parts under no observation are scaled, gene by gene, as all that were measured are together. Where
    nothing was expected, counts go by the shares alone; those of observations without parts go nowhere.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> share = sparse.csr_array(np.array([[1.0, 1.0, 0.0]]))
    >>> reconcile(share, np.array([[1.0], [3.0], [5.0]]), np.array([[8.0]])).ravel().tolist()
    [2.0, 6.0, 10.0]
    """
    dense: Any = counts
    measured = np.asarray(dense.toarray() if sparse.issparse(counts) else dense, dtype=np.float64)
    values = np.array(expected, dtype=np.float64)
    if share.shape[0] != measured.shape[0] or measured.shape[1] != values.shape[1]:
        raise DataValueError(
            f"counts has shape {measured.shape}, share and expected ask for {(share.shape[0], values.shape[1])}"
        )
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise DataValueError("expected holds values that are negative or not finite")
    held = np.asarray(share.sum(axis=1)).ravel() > 0
    share, measured = sparse.csr_array(share[held]), measured[held]
    covered = np.asarray(share.sum(axis=0)).reshape(-1, 1)
    seen = covered.ravel() > 0
    sums = share @ values
    unexpected = share.T @ ((sums <= 0) & (measured > 0)).astype(float) > 0
    total = sums.sum(axis=0)
    overall = np.divide(measured.sum(axis=0), total, out=np.ones_like(total), where=total > 0)
    values = np.where(seen[:, None], np.where((values <= 0) & unexpected, 1.0, values), values * overall)
    for _ in range(max_iter):
        sums = share @ values
        if (np.abs(sums - measured) <= tol * np.maximum(measured, 1)).all():
            break
        ratio = np.divide(measured, sums, out=np.zeros_like(sums), where=sums > 0)
        values[seen] *= (share.T @ ratio)[seen] / covered[seen]
    return values


def disc_shares(
    centres: np.ndarray, radius: float | np.ndarray, parts: np.ndarray, unit_area: float
) -> sparse.csr_array:
    """Area of each polygon under each disc, in units of `unit_area`.

    Parameters
    ----------
    centres
        Centres of the discs, (n, 2).
    radius
        Their radius, or one for each, (n,).
    parts
        Polygons or multipolygons, with holes or without, (m,) of shapely geometries, in the units of `centres`.
    unit_area
        Area that counts as a whole part.

    Returns
    -------
    Observations × parts, CSR (n, m) float64; nothing is stored where disc and polygon do not overlap.
    """
    import shapely

    centres = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
    radius = np.broadcast_to(np.asarray(radius, dtype=np.float64), len(centres))
    boxes = shapely.box(*(centres - radius[:, None]).T, *(centres + radius[:, None]).T)
    rows, columns = shapely.STRtree(parts).query(boxes)
    area = np.concatenate(
        [np.empty(0)]
        + [
            disc_overlaps(centres[rows[some]], radius[rows[some]], parts[columns[some]])
            for some in _pieces(len(rows), _PAIRS_AT_ONCE)
        ]
    )
    return _matrix(rows, columns, area / unit_area, (len(centres), len(parts)))


def polygon_shares(observations: np.ndarray, parts: np.ndarray, unit_area: float) -> sparse.csr_array:
    """Area of each polygon of `parts` within each of `observations`, in units of `unit_area`, CSR (n, m)."""
    import shapely

    observations = _valid(observations)
    rows, columns = shapely.STRtree(parts).query(observations, predicate="intersects")
    area = np.concatenate(
        [np.empty(0)]
        + [
            shapely.area(shapely.intersection(observations[rows[some]], parts[columns[some]]))
            for some in _pieces(len(rows), _PAIRS_AT_ONCE)
        ]
    )
    return _matrix(rows, columns, area / unit_area, (len(observations), len(parts)))


def within_shares(centres: np.ndarray, radius: float | np.ndarray, points: np.ndarray) -> sparse.csr_array:
    """1 where one of the `points` (m, 2) lies in or on one of the discs (n,), CSR (n, m)."""
    from scipy.spatial import KDTree

    centres = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
    found = KDTree(points).query_ball_point(centres, radius, return_sorted=True) if len(points) else [[]] * len(centres)
    rows = np.repeat(np.arange(len(centres)), [len(each) for each in found])
    columns = np.concatenate([np.asarray(each, dtype=np.int64) for each in found]) if len(centres) else rows
    return _matrix(rows, columns, np.ones(len(rows)), (len(centres), len(points)))


def inside_shares(observations: np.ndarray, points: np.ndarray) -> sparse.csr_array:
    """1 where one of the `points` (m, 2) lies in one of `observations` (n,) of shapely polygons, CSR (n, m).

    A point on the border of several polygons, and inside none, counts for the first of them.
    """
    import shapely

    observations = _valid(observations)
    tree = shapely.STRtree(shapely.points(points))
    rows, columns = tree.query(observations, predicate="contains")
    near, touched = tree.query(observations, predicate="intersects")
    lone = ~np.isin(touched, columns)
    order = np.argsort(near[lone], kind="stable")
    on_border, first = np.unique(touched[lone][order], return_index=True)
    rows, columns = np.append(rows, near[lone][order][first]), np.append(columns, on_border)
    return _matrix(rows, columns, np.ones(len(rows)), (len(observations), len(points)))


def disc_overlaps(centres: np.ndarray, radius: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """Area of the overlap of each disc with the polygon of the same position, (n,).

    The overlap is the sum, over the edges of the polygon, of the signed overlap of the disc with the triangle of its
    centre and the edge; holes count negative.

    Examples
    --------
    >>> import numpy as np, shapely
    >>> square = np.array([shapely.box(0, 0, 10, 10)])
    >>> float(disc_overlaps(np.array([[0.0, 0.0]]), np.array([4.0]), square)[0] / np.pi)
    4.0
    """
    import shapely

    single, owner = shapely.get_parts(polygons, return_index=True)
    rings, polygon = shapely.get_rings(single, return_index=True)
    hole = np.concatenate([[False], polygon[1:] == polygon[:-1]]) if len(rings) else np.empty(0, dtype=bool)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    disc = owner[polygon[ring]]
    xy = xy - np.asarray(centres, dtype=np.float64)[disc]
    joined = ring[1:] == ring[:-1]
    start = np.flatnonzero(joined)
    edge = _edge_overlap(xy[start], xy[start + 1], np.asarray(radius, dtype=np.float64)[disc[start]])
    of_ring = np.abs(np.bincount(ring[start], weights=edge, minlength=len(rings)))  # whichever way a ring runs
    signed = np.where(hole, -of_ring, of_ring)
    return np.maximum(np.bincount(owner[polygon], weights=signed, minlength=len(polygons)), 0.0)


def _valid(polygons: np.ndarray) -> np.ndarray:
    """Polygons, those drawn across themselves mended: no overlap can be formed with them as they are."""
    import shapely

    wrong = ~shapely.is_valid(polygons)
    return np.where(wrong, shapely.make_valid(polygons), polygons) if wrong.any() else polygons


def _edge_overlap(a: np.ndarray, b: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed area that a disc around the origin shares with the triangles (origin, a, b), (k,)."""
    d = b - a
    square = (d * d).sum(axis=1)
    along = (a * d).sum(axis=1)
    reach = along * along - square * ((a * a).sum(axis=1) - radius * radius)
    root = np.sqrt(np.maximum(reach, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        enter = np.where(square > 0, np.clip((-along - root) / square, 0, 1), 0)
        leave = np.where(square > 0, np.clip((-along + root) / square, 0, 1), 0)
    p, q = a + enter[:, None] * d, a + leave[:, None] * d
    sector = radius * radius * (_angle(a, p) + _angle(q, b))
    return (sector + _cross(p, q)) / 2


def _angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.arctan2(_cross(a, b), (a * b).sum(axis=1))


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _pieces(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _matrix(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    kept = values > 1e-12
    matrix = sparse.csr_array((values[kept], (rows[kept], columns[kept])), shape=shape)
    matrix.sort_indices()
    return matrix
