"""Parting of nuclei that touch, where the outline has a neck."""

from __future__ import annotations

import numpy as np

__all__ = ["split_necks"]

_LEVELS = 8


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
    from scipy import ndimage

    expected = np.pi / 4 * diameter_px**2
    area = np.bincount(labels.ravel())
    following = len(area)
    slices = ndimage.find_objects(labels)
    for name in np.flatnonzero(area >= split_area * expected):
        if name == 0:
            continue
        window = labels[slices[name - 1]]
        waiting = [window == name]
        while waiting:
            mask = waiting.pop()
            parts = _part(mask, depth * diameter_px, min_area * expected)
            for part in parts[1:]:
                window[part] = following
                following += 1
            waiting += [part for part in parts if part.sum() >= split_area * expected]
    return labels


def _part(mask: np.ndarray, depth_px: float, min_area_px: float) -> list[np.ndarray]:
    """The parts of `mask` on either side of its lowest neck; none if it has no neck."""
    from scipy import ndimage
    from skimage.segmentation import watershed

    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    top = float(distance.max()) - depth_px
    if top <= 0:
        return []
    for level in np.linspace(0, top, _LEVELS):
        pieces, count = ndimage.label(distance > level)
        if count < 2:
            continue
        peaks = ndimage.maximum(distance, pieces, np.arange(count + 1))
        high = np.flatnonzero(peaks >= level + depth_px)
        high = high[high > 0]
        if len(high) < 2:
            continue
        seeds = np.zeros(count + 1, dtype=np.int32)
        seeds[high] = np.arange(1, len(high) + 1)
        labels = watershed(-distance, seeds[pieces], mask=mask)
        if np.bincount(labels[mask])[1:].min() >= min_area_px:
            return [labels == name for name in range(1, len(high) + 1)]
    return []
