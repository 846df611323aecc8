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


@dataclass(frozen=True, eq=False)
class _Cut:
    """Regions above one threshold: labels (h, w), and area and own score of each, index 0 being the background."""

    labels: np.ndarray
    area: np.ndarray
    score: np.ndarray


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
    options = options or TreeOptions()
    cuts = [_cut(image > level, diameter_px, options) for level in levels]
    chosen = _choose(cuts)
    labels = np.zeros(image.shape, dtype=np.int32)
    count = 0
    # From the widest regions to the narrowest: within one that is chosen, nothing else is.
    for cut, wanted in zip(cuts, chosen, strict=True):
        covered = np.zeros(len(cut.area), dtype=bool)
        covered[cut.labels[labels > 0]] = True
        new = np.flatnonzero(wanted & ~covered)
        if len(new):
            rename = np.zeros(len(cut.area), dtype=np.int32)
            rename[new] = np.arange(count + 1, count + 1 + len(new))
            count += len(new)
            labels += rename[cut.labels]
    return labels


def score_regions(
    labels: np.ndarray, count: int, diameter_px: float, options: TreeOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Area of each region 1…`count` and how much it looks like a nucleus (0 to 1), (count + 1,) each; 0 of background."""
    pixels = np.flatnonzero(labels)
    names = labels.ravel()[pixels]
    y, x = (axis.astype(np.float64) for axis in np.divmod(pixels, labels.shape[1]))
    area = np.bincount(names, minlength=count + 1).astype(np.float64)
    area[0] = 1.0  # keeps the divisions below finite
    mean_y, mean_x = (np.bincount(names, axis, count + 1) / area for axis in (y, x))
    y -= mean_y[names]
    x -= mean_x[names]
    # 1/12 is the variance within a pixel: without it thin regions have no area at all.
    yy, xx = (np.bincount(names, axis * axis, count + 1) / area + 1 / 12 for axis in (y, x))
    xy = np.bincount(names, x * y, count + 1) / area
    roundness = area / (4 * np.pi * np.sqrt(np.maximum(yy * xx - xy * xy, 1e-9)))
    return area, _score(area, roundness, _extent(labels, count), diameter_px, options)


def _cut(mask: np.ndarray, diameter_px: float, options: TreeOptions) -> _Cut:
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    return _Cut(labels, *score_regions(labels, count, diameter_px, options))


def _extent(labels: np.ndarray, count: int) -> np.ndarray:
    """Longer side of each region's bounding box, (count + 1,)."""
    from scipy import ndimage

    extent = np.zeros(count + 1)
    for name, box in enumerate(ndimage.find_objects(labels, count), start=1):
        extent[name] = max(box[0].stop - box[0].start, box[1].stop - box[1].start)
    return extent


def _score(
    area: np.ndarray, roundness: np.ndarray, extent: np.ndarray, diameter_px: float, options: TreeOptions
) -> np.ndarray:
    share = area / (np.pi / 4 * diameter_px**2)
    fit = np.clip((roundness - options.min_roundness) / (1 - options.min_roundness), 0, 1) ** options.sharpness
    beyond = np.maximum(np.abs(np.log(share)) - np.log(2), 0)
    score = fit * np.exp(-options.spread * beyond**2)
    score[(share < options.min_area) | (share > options.max_area) | (extent > options.max_extent * diameter_px)] = 0
    score[0] = 0
    return score


def _choose(cuts: list[_Cut]) -> list[np.ndarray]:
    """For each cut, which regions score at least what the best choice within them does."""
    best = cuts[-1].score
    chosen = [best > 0]
    for cut, finer in zip(reversed(cuts[:-1]), reversed(cuts[1:]), strict=True):
        parent = np.zeros(len(finer.area), dtype=np.int64)
        inside = np.flatnonzero(finer.labels)
        parent[finer.labels.ravel()[inside]] = cut.labels.ravel()[inside]
        weight = np.where(best > 0, finer.area, 0.0)
        total = np.bincount(parent, weight, len(cut.area))
        parts = np.bincount(parent, weight * best, len(cut.area)) / np.maximum(total, 1)
        wanted = (cut.score > 0) & (cut.score >= parts)
        chosen.append(wanted)
        best = np.where(wanted, cut.score, parts)
    return chosen[::-1]
