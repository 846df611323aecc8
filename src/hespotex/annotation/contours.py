"""Outlines of tissue and of masks as the published TESLA draws them: edges, border following, filled polygons.

A contour is a closed chain of whole pixels, (k, 2) int of (column, row); a mask is (h, w) bool.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..errors import DataValueError

__all__ = [
    "contour_area",
    "contour_centre",
    "edges",
    "fill_contour",
    "follow_borders",
    "grey_levels",
    "image_contour",
    "leading_edge",
    "mask_contours",
    "scale_contour",
    "spot_contour",
]

_LUMA = np.array([9798, 19235, 3735])  # of red, green, blue, in parts of 2^15
_TAN_22 = 13573  # of 22.5 degrees, in parts of 2^15
# Steps (column, row) around a pixel, counterclockwise on the screen, from the one to the right.
_AROUND = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))


def grey_levels(image: np.ndarray) -> np.ndarray:
    """Luma of an 8-bit RGB image (h, w, 3), rounded, (h, w) int64."""
    return (np.asarray(image, dtype=np.int64) @ _LUMA + (1 << 14)) >> 15


def edges(grey: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny's edges by a 5 × 5 Sobel gradient of Euclidean length, without smoothing before, (h, w) bool.

    Parameters
    ----------
    grey
        Grey levels 0 to 255, (h, w).
    low, high
        Lengths of the gradient above which a crest is an edge if it hangs together with one above `high`.
    """
    from scipy import ndimage

    grey = np.asarray(grey, dtype=np.int64)
    smooth, slope = np.array([1, 4, 6, 4, 1]), np.array([-1, -2, 0, 2, 1])

    def gradient(along: int) -> np.ndarray:
        across = ndimage.correlate1d(grey, smooth, axis=1 - along, mode="nearest")
        return ndimage.correlate1d(across, slope, axis=along, mode="nearest")

    dx, dy = gradient(1), gradient(0)
    square = dx * dx + dy * dy
    padded = np.pad(square, 1)

    def at(row: int, column: int) -> np.ndarray:
        return padded[1 + row : 1 + row + square.shape[0], 1 + column : 1 + column + square.shape[1]]

    # Whole numbers decide the direction, so that it is the same everywhere.
    x, y = np.abs(dx), np.abs(dy) << 15
    flat, steep = x * _TAN_22, x * _TAN_22 + (x << 16)
    level = (y < flat) & (square > at(0, -1)) & (square >= at(0, 1))
    upright = (y > steep) & (square > at(-1, 0)) & (square >= at(1, 0))
    falling = (square > at(-1, -1)) & (square > at(1, 1))
    rising = (square > at(-1, 1)) & (square > at(1, -1))
    slanted = (y >= flat) & (y <= steep) & np.where((dx ^ dy) >= 0, falling, rising)
    crest = (square > low * low) & (level | upright | slanted)
    label, n = ndimage.label(crest, np.ones((3, 3)))
    strong = np.zeros(n + 1, dtype=bool)
    strong[label[crest & (square > high * high)]] = True
    strong[0] = False
    return strong[label]


def follow_borders(mask: np.ndarray) -> list[np.ndarray]:
    """All borders of `mask`, those of its pieces and those of its holes, as contours of its own pixels.

    Pieces hang together by corners, holes by sides. A border runs as Suzuki and Abe (1985) follow it.
    """
    from scipy import ndimage

    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    pieces, _ = ndimage.label(padded, np.ones((3, 3)))
    gaps, _ = ndimage.label(~padded)
    found = []
    for row, column in _first_pixels(pieces):
        found.append(_follow(padded, (column, row), (column - 1, row)))
    for row, column in _first_pixels(gaps)[1:]:  # the first gap is what lies outside
        found.append(_follow(padded, (column - 1, row), (column, row)))
    return [np.array(chain, dtype=np.int64) - 1 for chain in found]


def _first_pixels(label: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of the first pixel of each label from 1 on, in order."""
    values, first = np.unique(label, return_index=True)
    return [divmod(int(place), label.shape[1]) for value, place in zip(values, first, strict=True) if value > 0]


def _follow(mask: np.ndarray, start: tuple[int, int], outside: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels of the border that passes `start` next to the pixel `outside`."""

    def turn(centre: tuple[int, int], begin: int, sense: int) -> int | None:
        for step in range(8):
            direction = (begin + sense * step) % 8
            if mask[centre[1] + _AROUND[direction][1], centre[0] + _AROUND[direction][0]]:
                return direction
        return None

    def towards(a: tuple[int, int], b: tuple[int, int]) -> int:
        return _AROUND.index((b[0] - a[0], b[1] - a[1]))

    direction = turn(start, towards(start, outside), -1)
    if direction is None:
        return [start]
    last = (start[0] + _AROUND[direction][0], start[1] + _AROUND[direction][1])
    chain, current, before = [], start, last
    while True:
        chain.append(current)
        direction = turn(current, towards(current, before) + 1, 1)
        assert direction is not None  # at least where it came from
        after = (current[0] + _AROUND[direction][0], current[1] + _AROUND[direction][1])
        if after == start and current == last:
            return chain
        before, current = current, after


def contour_area(contour: np.ndarray) -> float:
    """Area of the polygon through the pixels' centres."""
    return abs(float(_crosses(contour).sum())) / 2


def contour_centre(contour: np.ndarray) -> tuple[int, int]:
    """Centroid (column, row) of the polygon, cut to whole pixels.

    Raises
    ------
    DataValueError
        If it has no area.
    """
    cross = _crosses(contour)
    if cross.sum() == 0:
        raise DataValueError(f"a contour of {len(contour)} pixels encloses no area and has no centroid")
    a = np.asarray(contour, dtype=np.float64)
    column, row = ((a + np.roll(a, -1, axis=0)) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
    return int(column), int(row)


def _crosses(contour: np.ndarray) -> np.ndarray:
    a = np.asarray(contour, dtype=np.float64)
    b = np.roll(a, -1, axis=0)
    return a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]


def scale_contour(contour: np.ndarray, factor: float) -> np.ndarray:
    """The contour enlarged or shrunk about its centroid, cut to whole pixels."""
    centre = np.array(contour_centre(contour))
    return np.trunc((contour - centre) * factor + centre).astype(np.int64)


def fill_contour(contour: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside the polygon or on its sides, (h, w) bool.

    Examples
    --------
    >>> import numpy as np
    >>> int(fill_contour(np.array([[1, 1], [3, 1], [3, 4], [1, 4]]), (6, 6)).sum())
    12
    """
    from skimage import draw

    contour = np.asarray(contour, dtype=np.int64)
    mask = draw.polygon2mask(shape, contour[:, ::-1])
    sides = [contour]
    far = np.roll(contour, -1, axis=0)
    for a, b in zip(contour, far, strict=True):
        if np.abs(b - a).max() > 1:
            sides.append(_line(*sorted([tuple(a), tuple(b)], key=lambda point: point[0])))
    column, row = np.concatenate(sides).T
    inside = (column >= 0) & (row >= 0) & (row < shape[0]) & (column < shape[1])
    mask[row[inside], column[inside]] = True
    return mask


def _line(a: tuple[int, int], b: tuple[int, int]) -> np.ndarray:
    """Pixels (column, row) of Bresenham's line; of two equally near ones that nearer to the row or column of `a`."""
    a_, step = np.array(a), np.subtract(b, a)
    length = int(np.abs(step).max())
    along = np.arange(length + 1)[:, None]
    return a_ + np.sign(step) * ((2 * along * np.abs(step) + length - 1) // (2 * length))


def image_contour(image: np.ndarray) -> np.ndarray:
    """Contour of the tissue on an 8-bit RGB image (h, w, 3): the border of its edges that encloses the largest area."""
    return _largest(_edge_contours(grey_levels(image)))


def mask_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Contours of the edges of a mask, as the published program takes them from it."""
    return _edge_contours(np.where(mask, 0, 255))


def _edge_contours(grey: np.ndarray) -> list[np.ndarray]:
    from scipy import ndimage

    square = np.ones((3, 3))
    closed = ndimage.binary_erosion(ndimage.binary_dilation(edges(grey), square), square, border_value=1)
    return follow_borders(closed)


def _largest(contours: list[np.ndarray]) -> np.ndarray:
    if not contours:
        raise DataValueError("nothing stands out: there is no edge to take a contour from")
    return max(contours, key=contour_area)


def spot_contour(
    line: np.ndarray,
    along: np.ndarray,
    across: np.ndarray,
    *,
    axis: Literal["row", "column"],
    lattice: Literal["hexagon", "square"] = "hexagon",
) -> np.ndarray:
    """Contour of the tissue from the spots on it, by the first and the last spot of each line of the array.

    Parameters
    ----------
    line
        Array row, or array column, of each spot, (n,).
    along
        Pixel position along the axis that `line` counts on, (n,).
    across
        Pixel position along the other, (n,).
    axis
        Whether `line` counts rows or columns.
    lattice
        On ``"hexagon"`` neighbouring lines are taken in pairs, so that the contour ends one line early.
    """
    values = np.unique(line)
    groups = zip(values[:-1], values[1:], strict=True) if lattice == "hexagon" else zip(values, strict=True)
    members = [np.isin(line, group) for group in groups]
    if not members:
        raise DataValueError("the spots lie on one line of the array; no contour runs around them")
    start = [along[rows].min() for rows in members]
    far = np.column_stack([start, [across[rows].max() for rows in members]])
    near = np.column_stack([start, [across[rows].min() for rows in members]])
    chain = np.trunc(np.concatenate([far, near[::-1]])).astype(np.int64)
    return chain[:, ::-1] if axis == "row" else chain


def leading_edge(labels: np.ndarray, targets: np.ndarray, *, min_area: float = 2000.0) -> np.ndarray:
    """Pixels of the outlines of target regions, drawn two pixels wide, (h, w) bool.

    Parameters
    ----------
    labels
        Label image, (h, w).
    targets
        Labels whose outlines are drawn.
    min_area
        Outlines that enclose less, in pixels, are left out.
    """
    from scipy import ndimage

    drawn, slanted = np.zeros(labels.shape, dtype=bool), []
    for target in np.asarray(targets).ravel():
        for contour in mask_contours(labels == target):
            if contour_area(contour) > min_area:
                drawn[contour[:, 1], contour[:, 0]] = True
                # A pen two pixels wide that moves over a corner also marks the pixels beside both its ends.
                after = np.roll(contour, -1, axis=0)
                step = after - contour
                over_corner = np.abs(step).min(axis=1) > 0
                beside = np.column_stack([-step[:, 1], step[:, 0]])[over_corner]
                ends = (contour[over_corner], after[over_corner])
                slanted += [end + side for end in ends for side in (beside, -beside)]
    drawn = ndimage.binary_dilation(drawn)
    if slanted:
        column, row = np.concatenate(slanted).T
        inside = (column >= 0) & (row >= 0) & (row < labels.shape[0]) & (column < labels.shape[1])
        drawn[row[inside], column[inside]] = True
    return drawn
