"""Cells of a grid with holes: their channels, windows of them, and the discs that spots are on the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ...data.section import Parts, Rows, Section, rows_of
from ...errors import DataValueError
from .._grid import GridFrame

__all__ = ["N_EXTRA", "Cells", "axis_position", "block_centre", "disc_mask"]

N_EXTRA = 5  # red, green, blue, row, column: the channels of a cell besides its features


def disc_mask(radius: float) -> np.ndarray:
    """Cells within `radius` cells of the central one, (2c + 1, 2c + 1) bool with c = floor(radius).

    Examples
    --------
    >>> disc_mask(55 / 16).sum(axis=1).tolist()
    [3, 5, 7, 7, 7, 5, 3]
    """
    reach = int(np.floor(radius))
    step = np.arange(-reach, reach + 1)
    return (step[:, None] ** 2 + step**2) <= radius**2


def block_centre(number: np.ndarray, side: int) -> np.ndarray:
    """Centre of blocks along one axis as published: rounded half to even, so every other one is a cell off."""
    return np.rint(np.asarray(number) * side + side / 2).astype(np.int64)


def axis_position(n: int) -> np.ndarray:
    """Position of n rows or columns in [0, 1] after the published box filter over four, reflected at the border, (n,)."""
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(np.linspace(0, 1, n) if n > 1 else np.zeros(1), 4, mode="reflect").astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Channels:
    """Features ‖ colour ‖ position of cells, (m, d + 5), read row by row."""

    features: Rows
    colour: Rows
    position: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.features.shape[0]), int(self.features.shape[1]) + N_EXTRA

    def __getitem__(self, rows: Any) -> np.ndarray:
        parts = (rows_of(self.features, rows), rows_of(self.colour, rows), self.position[rows])
        return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts], axis=1)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a section on their grid. Positions are (row, column) in cells; cell (i, j) covers [i, i+1) × [j, j+1).

    Attributes
    ----------
    section
        The cells as observations of a section: channels as features.
    place
        Row and column of each, counted from 0, (m, 2).
    lookup
        Index of the cell at each position, -1 where there is none, (rows, columns).
    frame
        Where positions lie in µm.
    """

    section: Section
    place: np.ndarray
    lookup: np.ndarray
    frame: GridFrame

    @classmethod
    def of(cls, section: Section) -> Self:
        """The cells of `section`."""
        parts = section.require_parts()
        place = _places(parts, section.name)
        coordinates = np.asarray(parts.coordinates, dtype=np.float64)
        rows, columns = place.max(axis=0) + 1
        lookup = np.full((rows, columns), -1, dtype=np.int32)
        lookup[place[:, 0], place[:, 1]] = np.arange(len(place))
        if np.count_nonzero(lookup >= 0) != len(place):
            raise DataValueError(f"section {section.name!r}: two superpixels share a row and column of the grid")
        position = np.column_stack([axis_position(rows)[place[:, 0]], axis_position(columns)[place[:, 1]]])
        channels = _Channels(parts.require("features"), parts.require("colour"), position)
        cells = Section(section.name, parts.ids, channels, coordinates)
        return cls(cells, place, lookup, GridFrame.of(place, coordinates))

    def positions(self, xy: np.ndarray) -> np.ndarray:
        """Position (row, column) of points given in µm, (n, 2) float64."""
        return self.frame.positions(xy)

    def windows(self, corners: np.ndarray, side: int) -> np.ndarray:
        """Cells of square windows whose first row and column is in `corners` (n, 2), row by row: (n, side²), or -1."""
        step = np.arange(side)
        row = corners[:, 0, None, None] + step[:, None]
        column = corners[:, 1, None, None] + step
        inside = (row >= 0) & (row < self.lookup.shape[0]) & (column >= 0) & (column < self.lookup.shape[1])
        row, column = np.broadcast_arrays(np.where(inside, row, 0), np.where(inside, column, 0))
        return np.where(inside, self.lookup[row, column], -1).reshape(len(corners), side * side).astype(np.int64)


def _places(parts: Parts, name: str) -> np.ndarray:
    if parts.level != "superpixel":
        raise DataValueError(
            f"section {name!r}: 'histex' predicts superpixels, its parts are of level {parts.level!r}; make them with "
            "hx.pp.superpixels(sdata)"
        )
    grid = np.asarray(parts.require("grid"))
    if len(grid) == 0:
        raise DataValueError(f"section {name!r} has no superpixels; make them with hx.pp.superpixels(sdata)")
    return (grid - grid.min(axis=0)).astype(np.int64)
