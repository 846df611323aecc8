"""Where the cells of a grid lie, whatever way the grid is turned and however the tissue's border cuts its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..errors import DataValueError

__all__ = ["GridFrame"]

_ROUNDS = 20
_EXACT = 1e-7  # of a cell
_DIGITS = 6  # of positions: whether one is a half must not depend on rounding


@dataclass(frozen=True, eq=False)
class GridFrame:
    """The affine map from positions on a grid to µm. Cell (i, j) covers [i, i + 1) × [j, j + 1).

    Attributes
    ----------
    origin
        x and y in µm of position (0, 0), (2,).
    steps
        x and y in µm of one row and of one column, (2, 2).
    """

    origin: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, grid: np.ndarray, coordinates: np.ndarray) -> Self:
        """The frame of cells from their rows and columns (m, 2) and their centres in µm (m, 2).

        The centre of a cell that the tissue's border cuts is that of what is left of it. Least squares are therefore
        repeated on the half of the cells that fit best, until these are whole ones; where few are whole, all cells count.

        Raises
        ------
        DataValueError
            If rows, columns or centres lie on one line.
        """
        at, xy = np.asarray(grid, dtype=np.float64) + 0.5, np.asarray(coordinates, dtype=np.float64)
        first = frame = cls._fitted(at, xy)
        for _ in range(_ROUNDS):
            distance = np.linalg.norm(xy - frame.microns(at), axis=1)
            typical = float(np.median(distance))
            if typical <= _EXACT * np.abs(frame.steps).max():
                return frame
            closer = distance <= typical
            if np.linalg.matrix_rank(at[closer] - at[closer].mean(axis=0)) < 2:
                break
            frame = cls._fitted(at[closer], xy[closer])
        return first

    @classmethod
    def _fitted(cls, at: np.ndarray, xy: np.ndarray) -> Self:
        """Least squares on all of the cells."""
        middle, centre = at.mean(axis=0), xy.mean(axis=0)
        moved = at - middle
        steps = np.linalg.pinv(moved.T @ moved) @ (moved.T @ (xy - centre))
        if abs(np.linalg.det(steps)) <= 1e-9 * np.square(steps).sum():
            raise DataValueError("the superpixels lie in one row, which does not tell how their grid is turned")
        return cls(origin=centre - middle @ steps, steps=steps)

    def positions(self, xy: np.ndarray) -> np.ndarray:
        """Position (row, column) of points given in µm, (n, 2) float64."""
        return np.round((np.asarray(xy, dtype=np.float64) - self.origin) @ np.linalg.inv(self.steps), _DIGITS)

    def microns(self, positions: np.ndarray) -> np.ndarray:
        """Points in µm at positions (row, column), (n, 2) float64."""
        return np.asarray(positions, dtype=np.float64) @ self.steps + self.origin
