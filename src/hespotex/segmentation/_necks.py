"""Parting of nuclei that touch at their neck: where the region is narrower than on both sides."""

from __future__ import annotations

import numpy as np

from ._components import region_sums
from ._jit import find_root, jit, longer

__all__ = ["split_necks"]


def split_necks(
    labels: np.ndarray, diameter_px: float, *, depth: float, min_area: float, split_area: float
) -> np.ndarray:
    """Part regions at necks, each region by itself.

    Parameters
    ----------
    labels
        (h, w) int32, 0 is background; changed in place.
    diameter_px
        Diameter of a typical nucleus.
    depth
        How much narrower than both its sides a neck must be, as a share of the diameter (of half the width each).
    min_area
        Smallest part, and
    split_area
        smallest region that is looked at, as shares of the area of a typical nucleus.

    Returns
    -------
    `labels`, new regions numbered from the highest label on.
    """
    expected = np.pi / 4 * diameter_px**2
    sums = region_sums(labels, int(labels.max(initial=0)))
    _part_at_necks(labels, sums, depth * diameter_px, min_area * expected, split_area * expected)
    return labels


@jit
def _part_at_necks(labels, sums, depth, min_area, split_area):
    """Part each region at its necks; the parts but the first get new labels.

    From the inside outwards, pixels join the nearest maximum of the distance to the outline. Where two maxima meet, the
    lower one is given up unless it is more than `depth` above the place: then the place is a neck.

    Parameters
    ----------
    labels
        (h, w) int32; changed in place.
    sums
        As ``region_sums`` gives them: area first, box in columns 6 to 9.
    depth
        Pixels by which half the width on both sides must exceed that at a neck.
    min_area
        Pixels of the smallest part; smaller ones stay with the neighbour that they have the widest neck with.
    split_area
        Pixels of the smallest region that is looked at.

    Returns
    -------
    The highest label.
    """
    highest = len(sums) - 1
    for name in range(1, len(sums)):
        if sums[name, 0] >= split_area:
            left, top, right, bottom = sums[name, 6], sums[name, 7], sums[name, 8], sums[name, 9]
            highest = _part(labels[top : bottom + 1, left : right + 1], name, sums[name, 0], depth, min_area, highest)
    return highest


@jit
def _part(window, name, area, depth, min_area, highest):
    height, width = window.shape
    squared = _squared_distance(window, name)
    pixels = _from_inside(squared, area)
    basin = np.full((height, width), -1, np.int32)
    roots = np.empty(area, np.int32)
    peak = np.empty(area, np.float64)
    basins = 0
    # Necks between basins: both, and half the width there.
    room = 16
    one, other, half = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room)
    necks = 0
    for at in range(area):
        y, x = pixels[at] // width, pixels[at] % width
        here = np.sqrt(squared[y, x])
        own, own_squared = -1, -1
        for side in range(4):
            v, u = y + (side == 3) - (side == 0), x + (side == 2) - (side == 1)
            if v < 0 or u < 0 or v >= height or u >= width or basin[v, u] < 0:
                continue
            found = find_root(roots, basin[v, u])
            if own < 0:
                own, own_squared = found, squared[v, u]
                continue
            if found == own:
                own_squared = max(own_squared, squared[v, u])
                continue
            low, high = (found, own) if peak[own] >= peak[found] else (own, found)
            if peak[low] - here <= depth:
                roots[low] = high
                own, own_squared = high, max(own_squared, squared[v, u])
                continue
            if necks == room:
                room *= 2
                one, other, half = longer(one, room), longer(other, room), longer(half, room)
            one[necks], other[necks], half[necks] = own, found, here
            necks += 1
            if squared[v, u] > own_squared:
                own, own_squared = found, squared[v, u]
        if own < 0:
            own = basins
            roots[own], peak[own] = own, here
            basins += 1
        basin[y, x] = own
    if necks == 0:
        return highest
    size = np.zeros(basins, np.int64)
    for at in range(area):
        y, x = pixels[at] // width, pixels[at] % width
        size[find_root(roots, basin[y, x])] += 1
    while _join_smallest(roots, size, one[:necks], other[:necks], half[:necks], min_area):
        pass
    new = np.zeros(basins, np.int32)
    first = find_root(roots, basin[pixels[0] // width, pixels[0] % width])
    new[first] = name
    for y in range(height):
        for x in range(width):
            if window[y, x] == name and basin[y, x] >= 0:
                root = find_root(roots, basin[y, x])
                if new[root] == 0:
                    highest += 1
                    new[root] = highest
                window[y, x] = new[root]
    return highest


@jit
def _join_smallest(roots, size, one, other, half, min_area):
    """Join the smallest basin that is too small with the neighbour behind its widest neck; whether there was one."""
    smallest, least, widest, target = -1, min_area, -1.0, -1
    for neck in range(len(one)):
        a, b = find_root(roots, one[neck]), find_root(roots, other[neck])
        if a == b:
            continue
        for low, high in ((a, b), (b, a)):
            if size[low] < least or (low == smallest and half[neck] > widest):
                smallest, least, widest, target = low, size[low], half[neck], high
    if smallest < 0:
        return False
    roots[smallest] = target
    size[target] += size[smallest]
    return True


@jit
def _squared_distance(window, name):
    """Squared distance from each pixel of the region to the nearest one outside it; all beyond the window is outside."""
    height, width = window.shape
    along = np.empty((height, width), np.int64)
    for y in range(height):
        steps = 0
        for x in range(width):
            steps = steps + 1 if window[y, x] == name else 0
            along[y, x] = steps
        steps = 0
        for x in range(width - 1, -1, -1):
            steps = steps + 1 if window[y, x] == name else 0
            along[y, x] = min(along[y, x], steps)
    out = np.zeros((height, width), np.int64)
    for y in range(height):
        for x in range(width):
            best, step = along[y, x] ** 2, 1
            while step * step < best:
                above = along[y - step, x] if y >= step else 0
                below = along[y + step, x] if y + step < height else 0
                nearest = min(above, below)
                best = min(best, nearest * nearest + step * step)
                step += 1
            out[y, x] = best
    return out


@jit
def _from_inside(squared, area):
    """Flat positions of the region's pixels, the farthest from its outline first, equals in reading order."""
    count = np.zeros(squared.max() + 2, np.int64)
    flat = squared.ravel()
    for value in flat:
        count[value] += 1
    following = np.zeros(len(count), np.int64)
    for value in range(len(count) - 2, 0, -1):
        following[value] = following[value + 1] + count[value + 1]
    pixels = np.empty(area, np.int32)
    for pixel in range(len(flat)):
        value = flat[pixel]
        if value:
            pixels[following[value]] = pixel
            following[value] += 1
    return pixels
