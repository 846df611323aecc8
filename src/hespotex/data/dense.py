"""Positions between measured ones: denser lattices, random points, sections between sections. Pure functions of coordinates."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..errors import DataValueError

__all__ = ["LAYOUTS", "Layout", "between_sections", "lattice_offsets", "random_points", "shifted_points"]

Layout = Literal["midpoints", "triangles", "square"]
# The lattice each is for, and rings of steps to new points: degrees from the direction of a lattice neighbour, degrees
# between the steps, and their length in pitches.
LAYOUTS: dict[Layout, tuple[Literal["hex", "square"], tuple[tuple[int, int, float], ...]]] = {
    "midpoints": ("hex", ((0, 60, 0.5),)),
    "triangles": ("hex", ((30, 60, 1 / np.sqrt(3)),)),
    "square": ("square", ((0, 90, 0.5), (45, 90, np.sqrt(0.5)))),
}


def lattice_offsets(layout: Layout, pitch: float, angle: float) -> np.ndarray:
    """Steps from a spot of a lattice to the new positions around it, (k, 2).

    Parameters
    ----------
    layout
        ``"midpoints"`` of the edges of a hexagonal lattice, which makes it 4 × as dense; ``"triangles"``, the centres of its
        triangles, 3 ×; ``"square"``, the midpoints of edges and squares of a square lattice, 4 ×.
    pitch
        Distance of neighbouring spots.
    angle
        Direction of any lattice neighbour, in radians.

    Examples
    --------
    >>> lattice_offsets("square", 2.0, 0.0).round(1).tolist()[:2]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    rings = []
    for start, step, length in LAYOUTS[layout][1]:
        turned = angle + np.radians(np.arange(start, start + 360, step))
        rings.append(pitch * length * np.column_stack([np.cos(turned), np.sin(turned)]))
    return np.concatenate(rings)


def shifted_points(measured: np.ndarray, offsets: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The measured positions and their copies shifted by each offset, each place once.

    The published lattices are ``[(0, 2/3), (1, 1/3), (1, -1/3)]`` in columns and rows of Visium's array, and
    ``[(0, 1/2), (1/2, 0), (1/2, 1/2)]`` for the square array of Spatial Transcriptomics.

    Parameters
    ----------
    measured
        (n, d).
    offsets
        (k, d).
    tolerance
        Positions no farther apart are one place: a measured one, or the mean of all there.

    Returns
    -------
    Measured positions followed by new ones in the order of their first occurrence, offset by offset, (n + m, d); and
    whether each lies amid the measured ones that lead to it, (n + m,) bool: false beyond the outermost ones and where one
    is missing.

    Examples
    --------
    >>> import numpy as np
    >>> positions, amid = shifted_points(np.array([[0], [2]]), np.array([[1.0], [-1.0]]), 1e-6)
    >>> positions.ravel().tolist(), amid.tolist()
    ([0.0, 2.0, 1.0, 3.0, -1.0], [True, True, True, False, False])
    """
    measured = np.asarray(measured, dtype=np.float64)  # integers would cut the offsets off
    offsets = np.asarray(offsets, dtype=np.float64)
    made = (measured[None] + offsets[:, None]).reshape(-1, measured.shape[1])
    by = np.repeat(offsets, len(measured), axis=0)
    new = cKDTree(measured).query(made)[0] > tolerance
    made, by = made[new], by[new]
    pairs = cKDTree(made).query_pairs(tolerance, output_type="ndarray")
    same = sparse.coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(made), len(made)))
    place = connected_components(same, directed=False)[1]
    _, first, place, count = np.unique(place, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    members = sparse.csr_array((np.ones(len(made)), (place, np.arange(len(made)))), shape=(len(first), len(made)))
    centre = (members @ made / count[:, None])[order]
    amid = np.linalg.norm(members @ by, axis=1)[order] <= tolerance
    return np.concatenate([measured, centre]), np.concatenate([np.ones(len(measured), dtype=bool), amid])


def random_points(
    measured: np.ndarray, expand: float, radius: float, generator: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """The measured positions and uniformly drawn ones near them.

    Parameters
    ----------
    measured
        (n, 2).
    expand
        How many times as dense the positions become where the measured ones fill a disc:
        ⌈n (expand - 1) 4 / π⌉ are drawn in the bounding box.
    radius
        New positions are kept within this distance of a measured one.
    generator
        Source of random numbers.

    Raises
    ------
    DataValueError
        If `expand` is not above 1 or `radius` not positive.
    """
    if not expand > 1:
        raise DataValueError(f"expand={expand!r} must be above 1: it is how many times as dense the positions become")
    if not radius > 0:
        raise DataValueError(f"radius={radius!r} must be positive")
    measured = np.asarray(measured, dtype=np.float64)
    n_drawn = int(np.ceil(len(measured) * (expand - 1) * 4 / np.pi))
    low, high = measured.min(axis=0), measured.max(axis=0)
    drawn = np.column_stack([generator.uniform(*ends, n_drawn) for ends in zip(low, high, strict=True)])
    return np.concatenate([measured, drawn[cKDTree(measured).query(drawn)[0] <= radius]])


def between_sections(stack: np.ndarray, gap: float) -> np.ndarray:
    """Positions of new sections in a stack: each one not in the lowest section, `gap` below.

    Parameters
    ----------
    stack
        (x, y, z), (n, 3).
    gap
        Half the distance of the sections puts the new ones in the middle.
    """
    stack = np.asarray(stack, dtype=np.float64)
    upper = stack[stack[:, 2] > stack[:, 2].min()]
    return upper - np.array([0.0, 0.0, gap])
