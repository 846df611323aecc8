"""Gaussian blur and capped distances of whole blocks, row by row."""

from __future__ import annotations

import numpy as np

from ._jit import jit

__all__ = ["capped_distance", "gaussian_taps", "look_up", "quantised_relief", "smooth"]


def gaussian_taps(sigma: float, truncate: float = 3.0) -> np.ndarray:
    """Weights of a Gaussian from its middle outwards, float32; those of both sides sum to 1."""
    at = np.arange(int(truncate * sigma + 0.5) + 1)
    taps = np.exp(-0.5 * (at / sigma) ** 2)
    return (taps / (2 * taps.sum() - taps[0])).astype(np.float32)


@jit
def look_up(channel, table):
    """``table[channel]`` of a (h, w) uint8 image."""
    height, width = channel.shape
    out = np.empty((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            out[y, x] = table[channel[y, x]]
    return out


@jit
def smooth(image, taps):
    """Separable blur of (h, w) float32, mirrored at the borders as ``scipy.ndimage`` does by default."""
    height, width = image.shape
    radius = len(taps) - 1
    out = np.empty_like(image)
    row = np.empty(width + 2 * radius, np.float32)
    middle = row[radius : radius + width]
    for y in range(height):
        middle[:] = taps[0] * image[y]
        for k in range(1, radius + 1):
            above, below, tap = image[_mirrored(y - k, height)], image[_mirrored(y + k, height)], taps[k]
            for x in range(width):
                middle[x] += tap * (above[x] + below[x])
        for k in range(1, radius + 1):
            row[radius - k] = middle[_mirrored(-k, width)]
            row[radius + width - 1 + k] = middle[_mirrored(width - 1 + k, width)]
        target = out[y]
        target[:] = taps[0] * middle
        for k in range(1, radius + 1):
            left, right, tap = row[radius - k : radius - k + width], row[radius + k : radius + k + width], taps[k]
            for x in range(width):
                target[x] += tap * (left[x] + right[x])
    return out


@jit
def _mirrored(index, size):
    while index < 0 or index >= size:
        index = -index - 1 if index < 0 else 2 * size - index - 1
    return index


@jit
def capped_distance(image, above, cap):
    """Euclidean distance to the nearest pixel not `above`, at most `cap`; (h, w) float32.

    Beyond the border there is nothing. It looks no further than `cap`, so that it costs little.
    """
    height, width = image.shape
    reach = int(np.ceil(cap))
    along = np.empty((height, width), np.int32)
    for y in range(height):
        steps = reach
        for x in range(width):
            steps = min(steps + 1, reach) if image[y, x] > above else 0
            along[y, x] = steps
        steps = reach
        for x in range(width - 1, -1, -1):
            steps = min(steps + 1, reach) if image[y, x] > above else 0
            nearest = min(steps, along[y, x])
            along[y, x] = nearest * nearest
    out = np.empty((height, width), np.float32)
    best = np.empty(width, np.int32)
    for y in range(height):
        best[:] = along[y]
        for step in range(1, reach):
            square = step * step
            if y >= step:
                other = along[y - step]
                for x in range(width):
                    best[x] = min(best[x], other[x] + square)
            if y + step < height:
                other = along[y + step]
                for x in range(width):
                    best[x] = min(best[x], other[x] + square)
        for x in range(width):
            out[y, x] = min(np.sqrt(np.float32(best[x])), cap)
    return out


@jit
def quantised_relief(image, distance, lowest, weight, top, steps):
    """How many of `steps` even thresholds from `lowest` to `top`, itself left out, ``image + weight * distance`` exceeds.

    0 where `image` alone does not exceed `lowest`; (h, w) uint8.
    """
    height, width = image.shape
    out = np.empty((height, width), np.uint8)
    scale, low, share = np.float32(steps / (top - lowest)), np.float32(lowest), np.float32(weight)
    for y in range(height):
        for x in range(width):
            value = image[y, x]
            above = np.ceil((value + share * distance[y, x] - low) * scale)
            out[y, x] = min(int(above), steps) if value > low else 0
    return out
