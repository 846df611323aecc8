"""Lattices that spots lie on: square or hexagonal, and their pitch. Pure functions of coordinates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from ..errors import DataValueError

__all__ = ["Lattice", "array_lattice", "detect_lattice", "lattice_angle", "lay_lattice", "spot_pitch"]

# Measured positions of legacy arrays scatter by a few percent of the pitch; the next distance on a square
# lattice is 1.41 pitches, so that a fifth separates the two safely.
DISTANCE_TOLERANCE = 0.2
MIN_SHARE = 0.8  # of the spots that have a neighbour at the pitch, and of the directions that agree
MIN_SPOTS = 4
ARRAY_TOLERANCE = 0.03


class Lattice(NamedTuple):
    """A kind of lattice and the distance between neighbours on it, in the units of the coordinates."""

    kind: Literal["square", "hex"]
    pitch: float


def detect_lattice(coordinates: np.ndarray, region: np.ndarray | None = None) -> Lattice | None:
    """The lattice that `coordinates` (n, 2) lie on, or ``None`` if they lie on none.

    Directions to the nearest neighbours repeat every 90° on a square lattice and every 60° on a hexagonal one,
    however the lattice is turned.

    Parameters
    ----------
    coordinates
        Positions, (n, 2).
    region
        Region of each position, (n,); all regions are taken to have one lattice, each turned and shifted freely.

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.meshgrid(np.arange(5.0), np.arange(5.0))
    >>> detect_lattice(np.column_stack([x.ravel(), y.ravel()]) * 200).kind
    'square'
    """
    xy = np.asarray(coordinates, dtype=np.float64)
    regions = [xy] if region is None else [xy[np.asarray(region) == name] for name in np.unique(region)]
    regions = [points for points in regions if len(points) >= MIN_SPOTS]
    if not regions:
        return None
    steps = [_steps(points) for points in regions]
    nearest = np.concatenate([np.hypot(*step[:, 0].T) for step in steps])
    pitch = float(np.median(nearest))
    if pitch <= 0 or _near(nearest, pitch).mean() < MIN_SHARE:
        return None
    direct = [step[_near(np.hypot(step[..., 0], step[..., 1]), pitch)] for step in steps]
    pitch = float(np.median(np.hypot(*np.concatenate(direct).T)))
    square, hexagonal = _order(direct, 4), _order(direct, 6)
    if max(square, hexagonal) < MIN_SHARE:
        return None
    return Lattice("square" if square >= hexagonal else "hex", pitch)


def lattice_angle(coordinates: np.ndarray, lattice: Lattice) -> float:
    """Direction of a neighbour on the `lattice` that the coordinates (n, 2) lie on, in radians.

    Examples
    --------
    >>> import numpy as np
    >>> points = np.array([[0.0, 0], [3, 4], [-4, 3], [-1, 7]])
    >>> angle = lattice_angle(points, Lattice("square", 5.0))
    >>> (5 * np.array([np.cos(angle), np.sin(angle)])).round(6).tolist()
    [4.0, -3.0]
    """
    step = _steps(np.asarray(coordinates, dtype=np.float64))
    direct = step[_near(np.hypot(step[..., 0], step[..., 1]), lattice.pitch)]
    folds = 4 if lattice.kind == "square" else 6
    return float(np.angle(np.exp(1j * folds * np.arctan2(direct[:, 1], direct[:, 0])).mean()) / folds)


def lay_lattice(shape: tuple[int, int], pitch: float, kind: Literal["square", "hex"]) -> tuple[np.ndarray, np.ndarray]:
    """All positions of a lattice on an image of height and width `shape`, row by row from its corner.

    Returns
    -------
    Positions (x, y) in pixels, (n, 2), and array positions (row, column), (n, 2) int; on a hexagonal lattice every second
    column of a row is empty, as Space Ranger counts them.

    Examples
    --------
    >>> lay_lattice((10, 20), 10.0, "square")[0].tolist()
    [[5.0, 5.0], [15.0, 5.0]]
    """
    height, width = shape
    step = pitch * (np.sqrt(3) / 2 if kind == "hex" else 1.0)
    x, y = np.meshgrid(np.arange(pitch / 2, width, pitch), np.arange(step / 2, height, step))
    row, column = np.indices(x.shape)
    if kind == "hex":
        x[1::2] += pitch / 2
        column = 2 * column + row % 2
    inside = x < width
    return np.column_stack([x[inside], y[inside]]), np.column_stack([row[inside], column[inside]])


def spot_pitch(coordinates: np.ndarray, region: np.ndarray | None = None) -> float:
    """Distance of neighbouring spots in the units of the coordinates (n, 2), on a lattice or off it.

    Off a lattice it is the median distance to the nearest other spot of the same region.

    Raises
    ------
    DataValueError
        If no region has two spots at different places.

    Examples
    --------
    >>> import numpy as np
    >>> spot_pitch(np.array([[0.0, 0], [90, 0]]))
    90.0
    """
    xy = np.asarray(coordinates, dtype=np.float64)
    if (lattice := detect_lattice(xy, region)) is not None:
        return lattice.pitch
    regions = [xy] if region is None else [xy[np.asarray(region) == name] for name in np.unique(region)]
    nearest = [cKDTree(points).query(points, k=2)[0][:, 1] for points in regions if len(points) > 1]
    pitch = float(np.median(np.concatenate(nearest))) if nearest else 0.0
    if not pitch > 0:
        raise DataValueError(f"{len(xy)} spots have no distance between neighbours; at least two places are needed")
    return pitch


def array_lattice(xy: np.ndarray, array_row: np.ndarray, array_col: np.ndarray) -> Lattice | None:
    """The lattice of an array by the places of its spots on it, however few are left; ``None`` if they do not fit.

    On Visium's array rows are √3/2 pitches apart and columns half a pitch, every second one of a row being used; on a
    square one both are a pitch apart. The pitch is fitted to all spots, so that no single one decides.

    Parameters
    ----------
    xy
        Positions, (n, 2).
    array_row, array_col
        Place on the array, (n,).
    """
    known = np.isfinite(array_row) & np.isfinite(array_col) & np.isfinite(xy).all(axis=1)
    rows, columns, xy = array_row[known], array_col[known], xy[known]
    design = np.column_stack([columns, rows, np.ones(len(xy))])
    if len(xy) < MIN_SPOTS or np.linalg.matrix_rank(design) < 3:
        return None
    fit = np.linalg.lstsq(design, xy, rcond=None)[0]
    column, row = np.hypot(*fit[0]), np.hypot(*fit[1])
    if min(column, row) <= 0 or abs(fit[0] @ fit[1]) > ARRAY_TOLERANCE * column * row:
        return None
    alternating = len(np.unique((rows + columns) % 2)) == 1
    for kind, by_column, by_row in (("hex", 2 * column, 2 / np.sqrt(3) * row), ("square", column, row)):
        pitch = float(np.sqrt(by_column * by_row))
        on_array = np.median(np.hypot(*(design @ fit - xy).T)) <= ARRAY_TOLERANCE * pitch
        if (alternating or kind == "square") and abs(by_column / by_row - 1) <= ARRAY_TOLERANCE and on_array:
            return Lattice(kind, pitch)  # type: ignore[arg-type]
    return None


def _steps(points: np.ndarray) -> np.ndarray:
    """Vectors to the nearest neighbours (at most 6) of each point, nearest first, (n, k, 2)."""
    _, neighbours = cKDTree(points).query(points, k=min(7, len(points)))
    return points[neighbours[:, 1:]] - points[:, None, :]


def _near(length: np.ndarray, pitch: float) -> np.ndarray:
    return np.abs(length - pitch) <= DISTANCE_TOLERANCE * pitch


def _order(direct: list[np.ndarray], folds: int) -> float:
    """How well the directions of all regions agree modulo 360° / `folds`: 1 if they do, 0 at random."""
    per_region = [abs(np.exp(1j * folds * np.arctan2(step[:, 1], step[:, 0])).mean()) for step in direct if len(step)]
    weights = [len(step) for step in direct if len(step)]
    return float(np.average(per_region, weights=weights))
