"""Outlines of labelled regions, by walking along the sides of their pixels."""

from __future__ import annotations

import numpy as np

from ._jit import jit

__all__ = ["hull_areas", "sum_dye", "trace_outlines"]

# Directions of travel on the corners of pixels: east, south, west, north; (dy, dx) of each.
_DY = np.array([0, 1, 0, -1])
_DX = np.array([1, 0, -1, 0])


@jit
def trace_outlines(labels, wanted):
    """Longest outline of each wanted label.

    It runs through the middles of pixel sides, as marching squares does on a mask, so corners of pixels are cut. Pixels
    that touch at a corner only are not connected. Holes are left out.

    Parameters
    ----------
    labels
        (h, w) int32, 0 is background.
    wanted
        Whether to trace a label, (highest + 1,) bool.

    Returns
    -------
    vertices
        Twice (x, y) of all vertices in pixels, (m, 2) int32.
    starts
        Where the outline of each label starts, (highest + 1,); -1 without one.
    lengths
        Number of its vertices.
    turns
        Number of its corners.
    """
    height, width = labels.shape
    count = len(wanted)
    starts, lengths, turns = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    visited = np.zeros((height, width), np.bool_)
    vertices = np.empty((4096, 2), np.int32)
    used = 0
    for y in range(height):
        for x in range(width):
            name = labels[y, x]
            if name == 0 or not wanted[name] or visited[y, x] or (y > 0 and labels[y - 1, x] == name):
                continue
            begin, corners, doubled_area = used, 0, 0
            row, column, direction = y, x, 0
            while True:
                if used == len(vertices):
                    longer = np.empty((2 * used, 2), np.int32)
                    longer[:used] = vertices
                    vertices = longer
                # The side from corner (row, column) on, with the region to its right.
                if direction == 0:
                    visited[row, column] = True
                vertices[used, 0] = 2 * column + _DX[direction]
                vertices[used, 1] = 2 * row + _DY[direction]
                if used > begin:
                    doubled_area += (
                        vertices[used - 1, 0] * vertices[used, 1] - vertices[used, 0] * vertices[used - 1, 1]
                    )
                used += 1
                row += _DY[direction]
                column += _DX[direction]
                if not _is(labels, *_ahead(row, column, direction, 1), name):
                    direction = (direction + 1) % 4
                    corners += 1
                elif _is(labels, *_ahead(row, column, direction, 0), name):
                    direction = (direction + 3) % 4
                    corners += 1
                if row == y and column == x and direction == 0:
                    break
            doubled_area += vertices[used - 1, 0] * vertices[begin, 1] - vertices[begin, 0] * vertices[used - 1, 1]
            if doubled_area > 0 and used - begin > lengths[name]:
                starts[name], lengths[name], turns[name] = begin, used - begin, corners
            else:
                used = begin
    return vertices[:used], starts, lengths, turns


@jit
def _ahead(row, column, direction, right):
    """Pixel (y, x) to the right or left ahead of a corner."""
    if direction == 0:
        return row - 1 + right, column
    if direction == 1:
        return row, column - right
    if direction == 2:
        return row - right, column - 1
    return row - 1, column - 1 + right


@jit
def _is(labels, y, x, name):
    return 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and labels[y, x] == name


@jit
def hull_areas(vertices, lengths):
    """Areas in pixels of the convex hulls of outlines that lie one after the other, by Andrew's monotone chain."""
    out = np.empty(len(lengths))
    begin = 0
    for item in range(len(lengths)):
        outline = vertices[begin : begin + lengths[item]]
        begin += lengths[item]
        # Only the ends of each row can be corners of the hull, and rows are in order already.
        top, bottom = outline[0, 1], outline[0, 1]
        for at in range(len(outline)):
            top, bottom = min(top, outline[at, 1]), max(bottom, outline[at, 1])
        rows = bottom - top + 1
        left, right = np.full(rows, 2**31 - 1, np.int64), np.full(rows, -(2**31), np.int64)
        for at in range(len(outline)):
            row = outline[at, 1] - top
            left[row], right[row] = min(left[row], outline[at, 0]), max(right[row], outline[at, 0])
        out[item] = (_side_area(right, 1) - _side_area(left, -1)) / 8
    return out


@jit
def _side_area(ends, sign):
    """Twice the signed area between the y axis and the convex chain over `ends`, bulging to the right for `sign` 1."""
    x, y = np.empty(len(ends), np.int64), np.empty(len(ends), np.int64)
    used = 0
    for row in range(len(ends)):
        while (
            used >= 2
            and sign
            * (
                (x[used - 1] - x[used - 2]) * (row - y[used - 2])
                - (ends[row] - x[used - 2]) * (y[used - 1] - y[used - 2])
            )
            <= 0
        ):
            used -= 1
        x[used], y[used] = ends[row], row
        used += 1
    area = 0
    for at in range(1, used):
        area += (x[at] + x[at - 1]) * (y[at] - y[at - 1])
    return area


@jit
def sum_dye(labels, rgb, table, count):
    """Sums of the amount of a dye and of its square over each label, (2, `count` + 1); `table` is (channel, value)."""
    out = np.zeros((2, count + 1))
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            name = labels[y, x]
            if name:
                amount = float(table[0, rgb[y, x, 0]] + table[1, rgb[y, x, 1]] + table[2, rgb[y, x, 2]])
                out[0, name] += amount
                out[1, name] += amount * amount
    return out
