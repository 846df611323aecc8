"""Measured expression around a window: the published denser lattice, ours, and the nearest places of either."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from ...errors import DataValueError

__all__ = ["Lattice", "Places", "densified", "staggered_lattice"]

_COLUMN_UM, _HALF_ROW_UM, _OFFSET_UM = 100.0, 50.0, 27.5  # of the staggered square layout the publication assumes
_ROOM = 12  # further places asked for, among which ties are broken
_LONGEST_EDGE = 1.6  # of the spacing: the diagonal of a square lattice is an edge, what spans a hole is not


@dataclass(frozen=True, eq=False)
class Lattice:
    """The published enhanced lattice of a staggered square layout.

    Attributes
    ----------
    values
        Each lattice node's value, 0 where there is no spot, (G, h, w).
    upsampled
        After bilinear interpolation and padding, (G, 2h, 2w).
    a, b
        Coordinates of the upsampled nodes: columns of the layout, and half rows, (2h, 2w).
    kept
        Nodes that were measured or have two measured neighbours, (2h, 2w) bool.
    """

    values: np.ndarray
    upsampled: np.ndarray
    a: np.ndarray
    b: np.ndarray
    kept: np.ndarray

    @property
    def coordinates(self) -> np.ndarray:
        """Kept nodes, x and y in µm, (k, 2)."""
        x = _COLUMN_UM * self.a[self.kept] + _OFFSET_UM
        return np.column_stack([x, _HALF_ROW_UM * self.b[self.kept] + _OFFSET_UM])

    @property
    def expression(self) -> np.ndarray:
        """Values of the kept nodes, (k, G)."""
        return self.upsampled[:, self.kept].T


def staggered_index(coordinates: np.ndarray) -> np.ndarray:
    """Column and half row of spots in the staggered layout, (n, 2) int, from µm."""
    return np.floor(np.asarray(coordinates, dtype=np.float64) / [_COLUMN_UM, _HALF_ROW_UM]).astype(np.int64)


def is_staggered(coordinates: np.ndarray) -> bool:
    """Whether spots lie where the published lattice arithmetic expects them, to 1 µm."""
    index = staggered_index(coordinates)
    expected = index * [_COLUMN_UM, _HALF_ROW_UM] + _OFFSET_UM
    parity_fits = ((index[:, 0] - index[:, 1]) % 2 == 0).all()
    return bool(parity_fits and np.abs(np.asarray(coordinates) - expected).max(initial=0) <= 1)


def staggered_lattice(coordinates: np.ndarray, values: np.ndarray) -> Lattice:
    """Expression on a lattice about four times as dense, as published.

    Parameters
    ----------
    coordinates
        Spots, x and y in µm, (n, 2), for which :func:`is_staggered` holds.
    values
        Their expression, (n, G).

    Notes
    -----
    As published, interpolation does not align corners, so that measured values change too, and nodes without a spot
    bleed zeros into their neighbours.
    """
    import torch
    from torch.nn import functional

    index = staggered_index(coordinates)
    start = index.min(axis=0) // 2 * 2
    stop = index.max(axis=0)
    h, w = int(stop[0] - start[0]) + 1, int(stop[1] - start[1] + 3) // 2
    row = index[:, 0] - start[0]
    column = (index[:, 1] - start[1] - row % 2) // 2
    lattice = np.zeros((values.shape[1], h, w), dtype=np.float32)
    lattice[:, row, column] = np.asarray(values, dtype=np.float32).T
    between = functional.interpolate(torch.from_numpy(lattice)[None], size=(2 * h - 1, 2 * w - 1), mode="bilinear")[0]
    upsampled = functional.pad(between, (0, 1, 0, 1)).numpy()

    i = np.arange(2 * h)
    a = np.repeat(start[0] + i[:, None] / 2, 2 * w, axis=1)
    b = start[1] + np.arange(2 * w) - 0.5 * (i % 2)[:, None] + (i // 2 % 2)[:, None]
    # Twice the coordinates are whole numbers, of which sets are safe.
    measured = {(2 * int(x), 2 * int(y)) for x, y in index}
    nodes = np.stack([2 * a, 2 * b], axis=-1).astype(np.int64)
    around = ((0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1))
    kept = np.array(
        [
            [(x, y) in measured or sum((x + dx, y + dy) in measured for dx, dy in around) >= 2 for x, y in line]
            for line in nodes.tolist()
        ]
    )
    return Lattice(lattice, upsampled, a, b, kept)


@dataclass(frozen=True, eq=False)
class Places:
    """Places with expression.

    Attributes
    ----------
    positions
        (p, 2), in any unit.
    values
        Expression, (p, G) float32.
    sources
        The two spots that each place's value comes from, twice the same for a measured one, (p, 2) int.
    """

    positions: np.ndarray
    values: np.ndarray
    sources: np.ndarray

    @classmethod
    def measured(cls, positions: np.ndarray, values: np.ndarray) -> Self:
        """The spots themselves."""
        own = np.arange(len(positions))
        return cls(np.asarray(positions, dtype=np.float64), values, np.column_stack([own, own]))

    def nearest(self, queries: np.ndarray, k: int, without: np.ndarray | None = None) -> np.ndarray:
        """The `k` places nearest to each of `queries` (n, 2), nearest first, (n, k); equal distances by row and column.

        Parameters
        ----------
        without
            Spot that each query must learn nothing from, (n,): neither it nor what was interpolated from it is taken.

        Raises
        ------
        DataValueError
            If so many places are not left.
        """
        from scipy.spatial import cKDTree

        dropped = 0 if without is None else int(np.bincount(self.sources.ravel()).max())
        if len(self.positions) < k:
            raise DataValueError(_too_few(len(self.positions), k))
        room = min(len(self.positions), k + dropped + _ROOM)
        distance, index = cKDTree(self.positions).query(queries, k=np.arange(1, room + 1))
        # Rounding of the distances must not decide between two that are equal by construction.
        rank = np.round(distance / max(float(distance.max()), np.finfo(float).tiny), 9)
        if without is not None:
            rank[(self.sources[index] == np.asarray(without)[:, None, None]).any(axis=-1)] = np.inf
        row, column = np.moveaxis(self.positions[index], -1, 0)
        order = np.lexsort((column, row, rank), axis=1)[:, :k]
        if (left := int(np.isfinite(rank).sum(axis=1).min(initial=k))) < k:
            raise DataValueError(_too_few(left, k))
        return np.take_along_axis(index, order, axis=1)


def densified(places: Places) -> Places:
    """Measured places, and the mean of each two neighbours half way between them: about four times as many.

    Neighbours are joined by an edge of the Delaunay triangulation that does not span a hole. Measured values stay as they
    are, and nothing is taken from outside the tissue. Works for square, hexagonal and irregular layouts.
    """
    edges = _edges(places.positions)
    between = Places(
        positions=places.positions[edges].mean(axis=1),
        values=places.values[edges].mean(axis=1),
        sources=places.sources[edges, 0],
    )
    return replace(
        places,
        **{
            name: np.concatenate([getattr(places, name), getattr(between, name)])
            for name in ("positions", "values", "sources")
        },
    )


def _edges(points: np.ndarray) -> np.ndarray:
    """Pairs of neighbouring points, (e, 2)."""
    from scipy.spatial import Delaunay, QhullError, cKDTree

    order = np.lexsort(
        (points[:, 1], points[:, 0])
    )  # which diagonal a square gets must not depend on that of the spots
    try:
        triangles = order[Delaunay(points[order]).simplices]
    except (QhullError, ValueError):  # fewer than three points, or all on a line
        return np.empty((0, 2), dtype=np.int64)
    edges = np.unique(np.sort(triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    spacing = np.median(cKDTree(points).query(points, k=2)[0][:, 1])
    length = np.linalg.norm(points[edges[:, 0]] - points[edges[:, 1]], axis=1)
    return edges[length <= _LONGEST_EDGE * spacing].astype(np.int64)


def _too_few(n: int, k: int) -> str:
    return (
        f"n_context={k}, but only {n} measured places are left to read expression from; set n_context to at most {n}, or "
        "give a section with more spots"
    )
