"""Which spots a spot attends to: the nearest of its region, itself first, as indices."""

from __future__ import annotations

import numpy as np

from ...errors import DataValueError

__all__ = ["neighbour_index", "neighbours_at_pitch"]

_TIES = 16  # spots of a lattice that can lie equally far


def neighbour_index(
    coordinates: np.ndarray, k: int, *, region: np.ndarray, radius_um: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest spots of each spot, itself included and first.

    Parameters
    ----------
    coordinates
        Centres in µm, (n, 2).
    k
        Number of neighbours.
    region
        Region of each spot, (n,); neighbours are sought within a region only.
    radius_um
        Spots farther away are no neighbours.

    Returns
    -------
    Indices, nearest first, (n, k) int64, and which of them stand for no neighbour, (n, k) bool: where there are fewer
    than `k`, the spot's own index fills the row.

    Notes
    -----
    Of equally distant spots the one with the smaller y, then x comes first, so that the order of the spots does not
    matter.

    Examples
    --------
    >>> import numpy as np
    >>> index, absent = neighbour_index(np.array([[0.0, 0], [1, 0], [3, 0]]), 2, region=np.zeros(3), radius_um=1.5)
    >>> index.tolist(), absent.tolist()
    ([[0, 1], [1, 0], [2, 2]], [[False, False], [False, False], [False, True]])
    """
    from scipy.spatial import cKDTree

    coordinates = np.asarray(coordinates, dtype=np.float64)
    if not np.isfinite(coordinates).all():
        raise DataValueError("coordinates hold values that are not finite; drop those observations")
    n = len(coordinates)
    index = np.repeat(np.arange(n)[:, None], k, axis=1)
    absent = np.ones((n, k), dtype=bool)
    for code in np.unique(region):
        members = np.flatnonzero(region == code)
        points = coordinates[members]
        room = min(len(members), k + _TIES)
        distance, found = cKDTree(points).query(points, k=np.arange(1, room + 1))
        # Rounding of the distances must not decide between two that are equal by construction.
        rank = np.round(distance / max(float(distance.max()), np.finfo(float).tiny), 9)
        rank[found == np.arange(len(members))[:, None]] = -1.0
        order = np.lexsort((points[found, 0], points[found, 1], rank), axis=1)[:, :k]
        found, distance = np.take_along_axis(found, order, axis=1), np.take_along_axis(distance, order, axis=1)
        far = distance > np.inf if radius_um is None else distance > radius_um * (1 + 1e-9)
        width = found.shape[1]
        index[members, :width] = np.where(far, members[:, None], members[found])
        absent[members, :width] = far
    return index, absent


def neighbours_at_pitch(
    coordinates: np.ndarray, k: int, *, region: np.ndarray, pitch_um: float, radius_um: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of a lattice denser than `pitch_um`, `k` neighbours as far apart as on one of that pitch.

    Each is the spot nearest to a site of a square lattice around the spot, if it lies within half a pitch of it, so that
    a neighbourhood covers the same tissue however densely it is sampled. Parameters and returns as in
    :func:`neighbour_index`, the pitch apart.

    Examples
    --------
    >>> import numpy as np
    >>> index, absent = neighbours_at_pitch(np.arange(9.0)[:, None] * [1, 0], 5, region=np.zeros(9), pitch_um=2.0)
    >>> sorted(index[4][~absent[4]].tolist())
    [2, 4, 6]
    """
    from scipy.spatial import cKDTree

    coordinates = np.asarray(coordinates, dtype=np.float64)
    if not np.isfinite(coordinates).all():
        raise DataValueError("coordinates hold values that are not finite; drop those observations")
    sites = _sites(k, pitch_um)
    if radius_um is not None:
        sites = sites[np.hypot(*sites.T) <= radius_um * (1 + 1e-9)]
    index = np.repeat(np.arange(len(coordinates))[:, None], k, axis=1)
    absent = np.ones((len(coordinates), k), dtype=bool)
    for code in np.unique(region):
        members = np.flatnonzero(region == code)
        points = coordinates[members]
        tree = cKDTree(points)
        for column, site in enumerate(sites):
            _, found = tree.query(points + site, distance_upper_bound=pitch_um / 2)
            there = found < len(members)
            index[members[there], column] = members[found[there]]
            absent[members, column] = ~there
    return index, absent


def _sites(k: int, pitch_um: float) -> np.ndarray:
    """The `k` sites of a square lattice that lie nearest to one of them, (k, 2), that one first."""
    reach = int(np.ceil(np.sqrt(k)))
    steps = np.arange(-reach, reach + 1)
    sites = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    order = np.lexsort((sites[:, 0], sites[:, 1], (sites**2).sum(axis=1)))
    return sites[order[:k]] * pitch_um
