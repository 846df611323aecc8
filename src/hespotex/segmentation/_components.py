"""The most nucleus-like regions in the component tree of an image.

Thresholds from low to high cut an image into nested regions: clumps fall apart into nuclei, then nuclei into
chromatin. No single threshold suits all nuclei, but each nucleus is a good ellipse of the right size at some of
them. So every region gets a score, and of each region and the best choice among its parts the better one is kept.
The tree is built from the highest level down in one sweep over the pixels.
"""

from __future__ import annotations

import numpy as np

from ._jit import find_root, jit

__all__ = ["choose_regions", "region_sums", "score_regions"]

# Columns of the sums kept for each region: whole numbers, so that they do not depend on the order of pixels.
AREA, X, Y, XX, YY, XY, LEFT, TOP, RIGHT, BOTTOM = range(10)
COLUMNS = 10


@jit
def _add_pixel(sums, y, x):
    sums[AREA] += 1
    sums[X] += x
    sums[Y] += y
    sums[XX] += x * x
    sums[YY] += y * y
    sums[XY] += x * y
    sums[LEFT] = min(sums[LEFT], x)
    sums[TOP] = min(sums[TOP], y)
    sums[RIGHT] = max(sums[RIGHT], x)
    sums[BOTTOM] = max(sums[BOTTOM], y)


@jit
def _empty(sums):
    sums[:] = 0
    sums[LEFT] = sums[TOP] = 2**31 - 1
    sums[RIGHT] = sums[BOTTOM] = -1


@jit
def region_sums(labels, count):
    """Area, sums of coordinates and of their products, and bounding box of labels 0…`count`, (count + 1, 10) int64.

    The box is (left, top, right, bottom), the last pixel included. Row 0 stays empty.
    """
    sums = np.empty((count + 1, COLUMNS), np.int64)
    for name in range(count + 1):
        _empty(sums[name])
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if labels[y, x] > 0:
                _add_pixel(sums[labels[y, x]], y, x)
    return sums


@jit
def _likeness(sums, expected_area, max_extent, min_area, max_area, spread, min_roundness, sharpness):
    """How much a region looks like a nucleus, 0 to 1, by its sums; see ``TreeOptions``.

    Variances are differences of whole numbers: the same wherever in a block the region lies.
    """
    area = sums[AREA]
    share = area / expected_area
    extent = max(sums[RIGHT] - sums[LEFT], sums[BOTTOM] - sums[TOP]) + 1
    if share < min_area or share > max_area or extent > max_extent:
        return 0.0
    # 1/12 is the variance within a pixel: without it thin regions have no area at all.
    square = float(area) * area
    xx = (area * sums[XX] - sums[X] * sums[X]) / square + 1 / 12
    yy = (area * sums[YY] - sums[Y] * sums[Y]) / square + 1 / 12
    xy = (area * sums[XY] - sums[X] * sums[Y]) / square
    roundness = area / (4 * np.pi * np.sqrt(max(xx * yy - xy * xy, 1e-9)))
    fit = min(max((roundness - min_roundness) / (1 - min_roundness), 0.0), 1.0) ** sharpness
    beyond = max(abs(np.log(share)) - np.log(2), 0.0)
    return fit * np.exp(-spread * beyond * beyond)


def score_regions(labels: np.ndarray, count: int, shape: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Area of each region 1…`count` and how much it looks like a nucleus (0 to 1), (count + 1,) each; 0 of background.

    `shape` is that of :func:`choose_regions`.
    """
    sums = region_sums(labels, count)
    scores = [0.0] + [_likeness(row, *shape) if row[0] else 0.0 for row in sums[1:]]
    return sums[:, 0].astype(np.float64), np.array(scores)


@jit
def _by_level(levels, highest):
    """Flat positions of the pixels above level 0, from the highest level down, each level in reading order."""
    count = np.zeros(highest + 2, np.int64)
    flat = levels.ravel()
    for level in flat:
        count[level] += 1
    first = np.zeros(highest + 2, np.int64)
    for level in range(highest - 1, 0, -1):
        first[level] = first[level + 1] + count[level + 1]
    pixels = np.empty(len(flat) - count[0], np.int32)
    following = first.copy()
    for pixel in range(len(flat)):
        level = flat[pixel]
        if level:
            pixels[following[level]] = pixel
            following[level] += 1
    return pixels, first, following


@jit
def choose_regions(levels, highest, shape):
    """Of each region and the best choice among its parts the more nucleus-like one.

    Parameters
    ----------
    levels
        (h, w) uint8, 0 to `highest`: regions are the connected pixels at or above each level but 0.
    highest
        The highest level.
    shape
        What counts as a nucleus: the arguments of :func:`_likeness` but the first.

    Returns
    -------
    Labels (h, w) int32, 1…n or 0, and n.
    """
    height, width = levels.shape
    pixels, first, last = _by_level(levels, highest)
    total = len(pixels)
    basin = np.full(height * width, -1, np.int32)  # of each pixel; joined basins have a common root
    node_of = np.zeros(height * width, np.int32)
    room = total + 1  # a basin starts at a pixel without higher neighbours; memory is used for those there are
    roots = np.empty(room, np.int32)
    sums = np.empty((room, COLUMNS), np.int64)
    open_nodes = np.empty((room, 2), np.int32)  # first and last node of a basin that has no parent yet
    weight, merit = np.empty(room), np.empty(room)  # area of a basin's nodes with a choice in them, and times score
    node = np.empty(room, np.int32)  # the one made at the present level
    basins = 0
    parent = np.full(total + 1, -1, np.int32)
    sibling = np.full(total + 1, -1, np.int32)
    wanted = np.zeros(total + 1, np.bool_)
    nodes = 0
    for level in range(highest, 0, -1):
        for at in range(first[level], last[level]):
            pixel = pixels[at]
            y, x = pixel // width, pixel % width
            own = -1
            for side in range(4):
                if side == 0:
                    if y == 0:
                        continue
                    other = pixel - width
                elif side == 1:
                    if x == 0:
                        continue
                    other = pixel - 1
                elif side == 2:
                    if x == width - 1:
                        continue
                    other = pixel + 1
                else:
                    if y == height - 1:
                        continue
                    other = pixel + width
                if basin[other] < 0:
                    continue
                found = find_root(roots, basin[other])
                if own < 0:
                    own = found
                elif found != own:
                    if sums[found, AREA] > sums[own, AREA]:
                        own, found = found, own
                    roots[found] = own
                    sums[own, :LEFT] += sums[found, :LEFT]
                    sums[own, LEFT] = min(sums[own, LEFT], sums[found, LEFT])
                    sums[own, TOP] = min(sums[own, TOP], sums[found, TOP])
                    sums[own, RIGHT] = max(sums[own, RIGHT], sums[found, RIGHT])
                    sums[own, BOTTOM] = max(sums[own, BOTTOM], sums[found, BOTTOM])
                    weight[own] += weight[found]
                    merit[own] += merit[found]
                    if open_nodes[own, 0] < 0:
                        open_nodes[own] = open_nodes[found]
                    elif open_nodes[found, 0] >= 0:
                        sibling[open_nodes[own, 1]] = open_nodes[found, 0]
                        open_nodes[own, 1] = open_nodes[found, 1]
            if own < 0:
                own = basins
                basins += 1
                roots[own] = own
                _empty(sums[own])
                open_nodes[own] = -1
                weight[own] = merit[own] = 0.0
            node[own] = -1
            basin[pixel] = own
            _add_pixel(sums[own], y, x)
        for at in range(first[level], last[level]):
            pixel = pixels[at]
            own = find_root(roots, basin[pixel])
            if node[own] < 0:
                made = nodes
                nodes += 1
                node[own] = made
                part = open_nodes[own, 0]
                while part >= 0:
                    parent[part] = made
                    part = sibling[part]
                open_nodes[own] = made
                parts = merit[own] / weight[own] if weight[own] > 0 else 0.0
                score = _likeness(sums[own], *shape)
                wanted[made] = score > 0 and score >= parts
                best = score if wanted[made] else parts
                weight[own] = float(sums[own, AREA]) if best > 0 else 0.0
                merit[own] = weight[own] * best
            node_of[pixel] = node[own]
    # From the widest regions to the narrowest: within one that is chosen, nothing else is.
    name = np.zeros(nodes, np.int32)
    count = 0
    for item in range(nodes - 1, -1, -1):
        above = name[parent[item]] if parent[item] >= 0 else 0
        if above == 0 and wanted[item]:
            count += 1
            above = count
        name[item] = above
    labels = np.zeros(height * width, np.int32)
    for at in range(total):
        labels[pixels[at]] = name[node_of[pixels[at]]]
    return labels.reshape(height, width), count
