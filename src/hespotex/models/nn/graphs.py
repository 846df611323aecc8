"""Neighbour graphs of observations as sparse matrices, and what graph layers need of them.

A graph is a CSR matrix whose row i lists the neighbours that observation i receives from. Regions are
never joined. Nothing here needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from ...errors import DataValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["edge_index", "nearest", "neighbour_mean", "ring", "truncated", "with_self_loops"]


def nearest(
    coordinates: np.ndarray, k: int, *, region: np.ndarray | None = None, symmetric: bool, include_self: bool
) -> sparse.csr_array:
    """Graph of the `k` nearest other observations.

    HESpotEx's expression stream uses ``k=7, symmetric=True, include_self=True``; its decoder
    ``k=4, symmetric=False, include_self=False`` on :func:`truncated` pixel positions.

    Parameters
    ----------
    coordinates
        Positions (x, y) in any unit, (n, 2).
    k
        Number of neighbours, the observation itself not counted.
    region
        Index of the region of each observation, (n,); neighbours are sought within a region only.
    symmetric
        Whether to add the reverse of every edge.
    include_self
        Whether to add self loops.

    Returns
    -------
    Ones at (i, j) where j is a neighbour of i, (n, n), indices sorted.

    Raises
    ------
    DataValueError
        If a region has fewer than `k` + 1 observations, or a coordinate is not finite.

    Notes
    -----
    Equal distances are broken by the lower index, whatever library or processor.

    Examples
    --------
    >>> import numpy as np
    >>> line = np.array([[0.0, 0], [1, 0], [3, 0]])
    >>> nearest(line, 1, symmetric=False, include_self=False).toarray().astype(int)
    array([[0, 1, 0],
           [1, 0, 0],
           [0, 1, 0]])
    """
    coordinates = np.asarray(coordinates, dtype=np.float64)
    n = len(coordinates)
    if not np.isfinite(coordinates).all():
        raise DataValueError("coordinates hold values that are not finite; drop those observations")
    region = np.zeros(n, dtype=np.int64) if region is None else np.asarray(region)
    rows, columns = [], []
    for members in _members(region):
        if len(members) <= k:
            raise DataValueError(
                f"a region has {len(members)} observations, too few for {k} neighbours each; "
                "leave it out, or build the graph with fewer neighbours"
            )
        found = _nearest_others(coordinates[members], k)
        rows.append(np.repeat(members, k))
        columns.append(members[found].ravel())
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = sparse.csr_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=(n, n))
    if symmetric:
        graph = graph.maximum(graph.T).tocsr()
    return with_self_loops(graph) if include_self else _sorted(graph)


def truncated(pixels: np.ndarray) -> np.ndarray:
    """Pixel positions cut to integers towards zero, as the published decoder graph sees them."""
    return np.trunc(np.asarray(pixels, dtype=np.float64))


def with_self_loops(graph: sparse.csr_array) -> sparse.csr_array:
    """The graph with ones at all its edges and on the diagonal."""
    pattern = sparse.csr_array(graph, dtype=np.float32, copy=True)
    pattern.data[:] = 1.0
    eye = sparse.eye_array(graph.shape[0], dtype=np.float32, format="csr")
    return _sorted(pattern.maximum(eye).tocsr())


def edge_index(graph: sparse.csr_array) -> np.ndarray:
    """Edges of `graph` in torch-geometric's form, (2, E) int64: row 0 sources j, row 1 targets i, sorted by target."""
    graph = _sorted(sparse.csr_array(graph))
    targets = np.repeat(np.arange(graph.shape[0], dtype=np.int64), np.diff(graph.indptr))
    return np.stack([graph.indices.astype(np.int64), targets])


def neighbour_mean(graph: sparse.csr_array, *, subtract_self: bool = False) -> sparse.csr_array:
    """Operator whose product with a matrix of embeddings is the mean over each row's neighbours.

    Parameters
    ----------
    graph
        Neighbours without self loops, (n, n); values are ignored.
    subtract_self
        Reproduce the published code, which takes the identity from an adjacency whose diagonal is already
        zero: (Σ neighbours − self) / (number of neighbours − 1).

    Returns
    -------
    Weights, (n, n) float64. An observation without neighbours is its own mean.

    Raises
    ------
    DataValueError
        If `subtract_self` meets an observation with fewer than two neighbours, for which it is undefined.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> star = sparse.csr_array(np.array([[0, 1, 1, 1, 1]] + [[1, 0, 0, 0, 0]] * 4))
    >>> e = np.array([1.0, 2, 3, 4, 5])
    >>> float((neighbour_mean(star) @ e)[0])
    3.5
    """
    pattern = sparse.csr_array(graph, copy=True)
    targets = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    pattern.data = ((pattern.data != 0) & (pattern.indices != targets)).astype(np.float64)
    pattern.eliminate_zeros()
    degree = np.diff(pattern.indptr)
    n = len(degree)
    if subtract_self:
        if (degree < 2).any():
            raise DataValueError(
                f"{int((degree < 2).sum())} observations have fewer than 2 neighbours, for which the published "
                "neighbour term is undefined; use legacy_self_subtraction=False"
            )
        weights = pattern - sparse.eye_array(n, format="csr")
        scale = 1.0 / (degree - 1)
    else:
        weights = pattern + sparse.diags_array((degree == 0).astype(np.float64), format="csr")
        weights.eliminate_zeros()
        scale = 1.0 / np.maximum(degree, 1)
    weights = sparse.csr_array(weights)
    weights.data = weights.data * np.repeat(scale, np.diff(weights.indptr))
    return _sorted(weights)


def ring(graph: sparse.csr_array) -> sparse.csr_array:
    """Graph of all spots around a spot: on a square lattice the diagonals are added, any other stays as it is.

    A lattice is taken for square if no spot has more than four neighbours; its diagonals are the spots that two
    neighbours lead to.
    """
    pattern = sparse.csr_array(graph, dtype=np.float32, copy=True)
    pattern.data[:] = 1.0
    if pattern.shape[0] == 0 or np.diff(pattern.indptr).max() > 4:
        return pattern
    twice = sparse.csr_array(pattern @ pattern)
    targets = np.repeat(np.arange(twice.shape[0]), np.diff(twice.indptr))
    twice.data = ((twice.data >= 2) & (twice.indices != targets)).astype(np.float32)
    twice.eliminate_zeros()
    return _sorted(pattern.maximum(twice))


def _members(region: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the observations of each region, ascending."""
    order = np.argsort(region, kind="stable")
    _, starts = np.unique(region[order], return_index=True)
    yield from np.split(order, starts[1:])


def _nearest_others(points: np.ndarray, k: int) -> np.ndarray:
    """The `k` nearest other points of each point, ties broken by the lower index, (n, k)."""
    from scipy.spatial import cKDTree

    n = len(points)
    room = min(n, k + 9)  # the point itself, and ties: eight spots surround one of a square lattice
    distance, index = cKDTree(points).query(points, k=room)
    # Rounding of the distances must not decide between two that are equal by construction.
    rank = np.round(distance / max(float(distance.max()), np.finfo(float).tiny), 9)
    rank[index == np.arange(n)[:, None]] = np.inf
    order = np.lexsort((index, rank), axis=1)[:, :k]
    return np.take_along_axis(index, order, axis=1)


def _sorted(graph: sparse.csr_array) -> sparse.csr_array:
    graph = sparse.csr_array(graph)
    graph.sort_indices()
    return graph
