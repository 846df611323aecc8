"""Which superpixels a spot covers on the integer grid, as published."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from ...data.section import Parts
from .._grid import GridFrame

__all__ = ["disc", "disc_members", "nearest_index", "published_radius", "round_half_even"]

PIXELS = 16  # side of a superpixel: radii are rounded to a sixteenth of it


def round_half_even(values: np.ndarray) -> np.ndarray:
    """Nearest whole numbers, halves to the even one, int64.

    Examples
    --------
    >>> round_half_even([1.5, 2.5]).tolist()
    [2, 2]
    """
    return np.rint(np.asarray(values, dtype=np.float64)).astype(np.int64)


def nearest_index(pixels: np.ndarray) -> np.ndarray:
    """Superpixel that stands for the centre of a spot at pixel positions: the nearest *edge*, as published.

    Examples
    --------
    >>> nearest_index([24, 40, 41]).tolist()
    [2, 2, 3]
    """
    return round_half_even(np.asarray(pixels, dtype=np.float64) / PIXELS)


def disc(radius: float, width: float | None = None) -> np.ndarray:
    """Offsets (row, column) of the superpixels of a disc, or of the ring at its rim, (n, 2) int, along rows.

    Parameters
    ----------
    radius
        In superpixels; 55 / 16 for a Visium spot of 55 µm, which gives 37.
    width
        Of the ring, in superpixels.

    Examples
    --------
    >>> len(disc(55 / 16)), len(disc(4)), len(disc(4, width=1))
    (37, 49, 24)
    """
    reach = int(np.ceil(radius))
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    square = (offsets**2).sum(axis=1)
    least = 0.0 if width is None else max(radius - width, 0.0)
    return offsets[(square <= radius**2) & (square >= least**2)]


def published_radius(parts: Parts) -> float:
    """Radius of a spot in superpixels, from the area of the spot that lies on most tissue; a whole number of pixels."""
    area = float(np.asarray(parts.share.sum(axis=1)).max(initial=0.0))
    return float(round_half_even(PIXELS * np.sqrt(area / np.pi))) / PIXELS


def disc_members(parts: Parts, coordinates: np.ndarray, radius: float) -> sparse.csr_array:
    """Ones where a superpixel belongs to the disc of a spot, CSR (n, m); superpixels that are not there are left out.

    Parameters
    ----------
    parts
        Superpixels with their grid.
    coordinates
        Centres of the spots in µm, (n, 2).
    radius
        In superpixels.
    """
    grid = np.asarray(parts.require("grid"), dtype=np.int64)
    centre = nearest_index(PIXELS * GridFrame.of(grid, parts.coordinates).positions(coordinates))
    offsets = disc(radius)
    wanted = (centre[:, None, :] + offsets).reshape(-1, 2)
    low = grid.min(axis=0)
    size = grid.max(axis=0) - low + 1
    inside = ((wanted >= low) & (wanted < low + size)).all(axis=1)
    key = np.ravel_multi_index(tuple((grid - low).T), tuple(size))
    order = np.argsort(key, kind="stable")
    asked = np.ravel_multi_index(tuple((wanted[inside] - low).T), tuple(size))
    place = np.minimum(np.searchsorted(key[order], asked), len(key) - 1)
    there = key[order[place]] == asked
    rows = np.repeat(np.arange(len(centre)), len(offsets))[inside][there]
    columns = order[place[there]]
    members = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(centre), len(grid)))
    members.sort_indices()
    return members
