"""Pixels inside polygons: those whose middle is."""

from __future__ import annotations

import numpy as np

from ._jit import jit

__all__ = ["bit_masks", "count_pixels", "edges_of", "pixel_boxes", "sum_pixels"]


def edges_of(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sides (x0, y0, x1, y1) of polygons and multipolygons, holes included, (m, 4), and where each one's begin, (n + 1,)."""
    import shapely

    parts, part_of = shapely.get_parts(polygons, return_index=True)
    rings, ring_of = shapely.get_rings(parts, return_index=True)
    xy, point_of = shapely.get_coordinates(rings, return_index=True)
    goes_on = point_of[1:] == point_of[:-1]
    sides = np.hstack([xy[:-1], xy[1:]])[goes_on]
    owner = part_of[ring_of[point_of[1:][goes_on]]]
    return sides, np.searchsorted(owner, np.arange(len(polygons) + 1))


def pixel_boxes(polygons: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bounding boxes (y0, x0, y1, x1) in whole pixels of an image (h, w), at least one of them, (n, 4) int64."""
    import shapely

    bounds = shapely.bounds(polygons)
    low = np.floor(bounds[:, 1::-1]).clip(0, np.array(shape) - 1)
    high = np.maximum(np.ceil(bounds[:, :1:-1]).clip(0, shape), low + 1)
    return np.column_stack([low, high]).astype(np.int64)


@jit
def count_pixels(sides, starts, boxes):
    """Number of pixels in each polygon, (n,) int64."""
    counts = np.zeros(len(boxes), np.int64)
    for i in range(len(boxes)):
        top, left, bottom, right = boxes[i]
        crossed = np.empty(starts[i + 1] - starts[i], np.float64)
        for y in range(top, bottom):
            met = _crossings(sides, starts[i], starts[i + 1], y + 0.5, crossed)
            for k in range(0, met - 1, 2):
                first, stop = _span(crossed[k], crossed[k + 1], left, right)
                counts[i] += stop - first
    return counts


@jit
def bit_masks(sides, starts, boxes, single, bit_starts):
    """Pixels inside each box along rows, eight in a byte as :func:`numpy.packbits` has them, (k,) uint8.

    Parameters
    ----------
    sides, starts
        See :func:`edges_of`.
    boxes
        See :func:`pixel_boxes`.
    single
        Row and column of the only pixel of polygons that have none by their outline, (n, 2); others -1.
    bit_starts
        Where each begins in the result, and the end, (n + 1,).
    """
    bits = np.zeros(bit_starts[-1], np.uint8)
    for i in range(len(boxes)):
        top, left, bottom, right = boxes[i]
        width = right - left
        if single[i, 0] >= 0:
            place = (single[i, 0] - top) * width + single[i, 1] - left
            bits[bit_starts[i] + (place >> 3)] |= np.uint8(128 >> (place & 7))
            continue
        crossed = np.empty(starts[i + 1] - starts[i], np.float64)
        for y in range(top, bottom):
            met = _crossings(sides, starts[i], starts[i + 1], y + 0.5, crossed)
            for k in range(0, met - 1, 2):
                first, stop = _span(crossed[k], crossed[k + 1], left, right)
                for x in range(first, stop):
                    place = (y - top) * width + x - left
                    bits[bit_starts[i] + (place >> 3)] |= np.uint8(128 >> (place & 7))
    return bits


@jit
def sum_pixels(sides, starts, boxes, single, values, y0, x0):
    """Number, sum and sum of squares of the pixels of an image (h, w) in each polygon, (n, 3) float64.

    The image's first pixel is (y0, x0). Other parameters are those of :func:`bit_masks`.
    """
    height, width = values.shape
    sums = np.zeros((len(boxes), 3), np.float64)
    for i in range(len(boxes)):
        if single[i, 0] >= 0:
            y, x = single[i, 0] - y0, single[i, 1] - x0
            if 0 <= y < height and 0 <= x < width:
                value = np.float64(values[y, x])
                sums[i, 0], sums[i, 1], sums[i, 2] = 1.0, value, value * value
            continue
        top, left, bottom, right = boxes[i]
        crossed = np.empty(starts[i + 1] - starts[i], np.float64)
        for y in range(max(top, y0), min(bottom, y0 + height)):
            met = _crossings(sides, starts[i], starts[i + 1], y + 0.5, crossed)
            for k in range(0, met - 1, 2):
                first, stop = _span(crossed[k], crossed[k + 1], max(left, x0), min(right, x0 + width))
                for x in range(first, stop):
                    value = np.float64(values[y - y0, x - x0])
                    sums[i, 0] += 1.0
                    sums[i, 1] += value
                    sums[i, 2] += value * value
    return sums


@jit
def _crossings(sides, start, stop, y, crossed):
    """Where a row meets the sides, in rising order; how many."""
    met = 0
    for k in range(start, stop):
        x0, y0, x1, y1 = sides[k]
        if (y0 <= y) != (y1 <= y):
            crossed[met] = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            met += 1
    for k in range(1, met):  # few: by insertion
        value, at = crossed[k], k
        while at > 0 and crossed[at - 1] > value:
            crossed[at] = crossed[at - 1]
            at -= 1
        crossed[at] = value
    return met


@jit
def _span(begin, end, left, right):
    """First pixel whose middle lies in [begin, end), and one past the last."""
    first = max(int(np.ceil(begin - 0.5)), left)
    return first, max(min(int(np.ceil(end - 0.5)), right), first)
