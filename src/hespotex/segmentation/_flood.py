"""Growth of regions into their surroundings, the darkest first: a watershed of a narrow band."""

from __future__ import annotations

import numpy as np

from ._jit import jit, longer

__all__ = ["grow_regions"]

_STEPS = 512  # heights told apart; pixels of one height are taken in the order in which they were reached
_FREE = -1


@jit
def grow_regions(image, labels, count, lowest, highest, share, reach):
    """Let regions flood what lies around them, each down to a share of its own mean.

    Parameters
    ----------
    image
        (h, w) float32, bright where there is something to flood.
    labels
        (h, w) int32, 1…`count` or 0; changed in place.
    lowest
        Pixels at or below it stay dry.
    highest
        Pixels at or above it are flooded first. Not the image's own maximum, or blocks of a slide would differ.
    share
        A region ends where `image` falls below this share of the region's mean. So all of it stays connected.
    reach
        Steps from pixel to pixel, over any side, that the flood goes beyond the regions.
    """
    height, width = image.shape
    flat, names = image.ravel(), labels.ravel()
    total, size = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for pixel in range(len(names)):
        if names[pixel]:
            total[names[pixel]] += flat[pixel]
            size[names[pixel]] += 1
    floor = np.zeros(count + 1, np.float32)
    for name in range(1, count + 1):
        floor[name] = share * total[name] / max(size[name], 1)

    # Pixels in reach, by breadth first; `slot` numbers them and the border pixels they are reached from.
    slot = np.full(len(names), _FREE, np.int32)
    room = 1024
    pixels = np.empty(room, np.int32)
    used = 0
    for pixel in range(len(names)):
        if names[pixel] and _has_free_side(pixel, names, flat, lowest, height, width):
            if used == room:
                room *= 2
                pixels = longer(pixels, room)
            pixels[used] = pixel
            slot[pixel] = used
            used += 1
    border = used
    start = 0
    for _ in range(reach):
        stop = used
        for at in range(start, stop):
            for side in range(4):
                other = _neighbour(pixels[at], side, height, width)
                if other < 0 or slot[other] != _FREE or names[other] or flat[other] <= lowest:
                    continue
                if used == room:
                    room *= 2
                    pixels = longer(pixels, room)
                pixels[used] = other
                slot[other] = used
                used += 1
        start = stop

    scale = _STEPS / max(highest - lowest, 1e-6)
    head, tail, following = np.full(_STEPS, -1, np.int32), np.full(_STEPS, -1, np.int32), np.full(used, -1, np.int32)
    for at in range(border):
        _append(_depth(flat[pixels[at]], highest, scale), at, head, tail, following)
    for step in range(_STEPS):
        while head[step] >= 0:
            at = head[step]
            head[step] = following[at]
            name = names[pixels[at]]
            for side in range(4):
                other = _neighbour(pixels[at], side, height, width)
                if other < 0 or slot[other] < 0 or names[other] or flat[other] < floor[name]:
                    continue
                names[other] = name
                _append(max(_depth(flat[other], highest, scale), step), slot[other], head, tail, following)


@jit
def _neighbour(pixel, side, height, width):
    """Flat position above, left, right or below of `pixel`; -1 beyond the border."""
    if side == 0:
        return pixel - width if pixel >= width else -1
    if side == 1:
        return pixel - 1 if pixel % width else -1
    if side == 2:
        return pixel + 1 if (pixel + 1) % width else -1
    return pixel + width if pixel < (height - 1) * width else -1


@jit
def _has_free_side(pixel, names, flat, lowest, height, width):
    for side in range(4):
        other = _neighbour(pixel, side, height, width)
        if other >= 0 and not names[other] and flat[other] > lowest:
            return True
    return False


@jit
def _depth(value, highest, scale):
    return min(max(int((highest - value) * scale), 0), _STEPS - 1)


@jit
def _append(step, item, head, tail, following):
    following[item] = -1
    if head[step] < 0:
        head[step] = item
    else:
        following[tail[step]] = item
    tail[step] = item
