"""Parting of nuclei that touch, where the outline has a neck."""

from __future__ import annotations

import numpy as np

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
    from ._components import region_sums
    from ._necks import part_at_necks

    expected = np.pi / 4 * diameter_px**2
    sums = region_sums(labels, int(labels.max(initial=0)))
    part_at_necks(labels, sums, depth * diameter_px, min_area * expected, split_area * expected)
    return labels
