"""Choice of the most nucleus-like regions in the component tree of an image.

Thresholds from low to high cut an image into nested regions: clumps fall apart into nuclei, then nuclei into
chromatin. No single threshold suits all nuclei, but each nucleus is a good ellipse of the right size at some of
them. So every region gets a score, and of each region and the best choice among its parts the better one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["TreeOptions", "score_regions", "select_regions"]


@dataclass(frozen=True)
class TreeOptions:
    """What counts as a nucleus. Areas are shares of the area expected of one nucleus, lengths of its diameter.

    Attributes
    ----------
    min_area, max_area
        Regions outside this range are never nuclei.
    max_extent
        Nor are those with a longer bounding box. It bounds how far the choice at a place can depend on pixels around.
    spread
        How fast the score falls beyond half and double the expected area, per squared log.
    min_roundness
        Share of its ellipse that a region must fill to score at all.
    sharpness
        Exponent of that share.
    """

    min_area: float = 0.14
    max_area: float = 6.0
    max_extent: float = 4.0
    spread: float = 1.0
    min_roundness: float = 0.4
    sharpness: float = 3.0

    def shape(self, diameter_px: float) -> tuple[float, ...]:
        """Expected area and longest extent in pixels, and the numbers that have no unit."""
        area, extent = np.pi / 4 * diameter_px**2, self.max_extent * diameter_px
        return (
            area,
            extent,
            float(self.min_area),
            float(self.max_area),
            float(self.spread),
            float(self.min_roundness),
            float(self.sharpness),
        )


def select_regions(
    image: np.ndarray, levels: np.ndarray, diameter_px: float, options: TreeOptions | None = None
) -> np.ndarray:
    """Non-overlapping regions of `image` that look most like nuclei.

    Parameters
    ----------
    image
        Nuclei are bright, (h, w).
    levels
        Thresholds, rising, (k,).
    diameter_px
        Diameter of a typical nucleus.
    options
        What counts as a nucleus.

    Returns
    -------
    (h, w) int32 labels 1…n; 0 elsewhere.
    """
    from ._components import choose_regions

    options = options or TreeOptions()
    if image.size == 0:
        return np.zeros(image.shape, dtype=np.int32)
    above = np.searchsorted(np.asarray(levels), image, side="left").astype(np.uint8)
    labels, _ = choose_regions(above, len(levels), options.shape(diameter_px))
    return labels


def score_regions(
    labels: np.ndarray, count: int, diameter_px: float, options: TreeOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Area of each region 1…`count` and how much it looks like a nucleus (0 to 1), (count + 1,) each; 0 of background."""
    from ._components import likeness, region_sums

    sums = region_sums(labels, count)
    shape = options.shape(diameter_px)
    scores = [0.0] + [likeness(row, *shape) if row[0] else 0.0 for row in sums[1:]]
    return sums[:, 0].astype(np.float64), np.array(scores)
