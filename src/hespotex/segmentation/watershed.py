"""Nuclei without a network: the best regions of a component tree, grown by watershed to their own half-height.

Runs on any machine at several megapixels per second and core, and needs no weights. Nuclei that no threshold parts stay
together only if together they look like one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataTypeError, DataValueError, ImageFormatError
from ._appearance import Appearance, density_table, estimate_appearance, nuclear_density

__all__ = ["DIAMETER_UM", "Watershed", "estimate_diameter", "segment_watershed"]

DIAMETER_UM = 8.0  # of a typical nucleus in sections of human tissue

_SMOOTHING = 0.05  # of the diameter: chromatin texture goes, outlines stay
_MIN_SMOOTHING_PX = 0.5
_NECK = 0.1  # of the diameter: necks that much narrower than both sides part nuclei
_SPLIT_AREA = 0.9  # of a nucleus: smaller regions are one
_LEVELS = 20
_LOWEST = 0.5  # of the way from background to Otsu's threshold: faint nuclei are still there, most of the rest is gone
_DISTANCE = 0.75  # weight of the distance to the outline, in units of (threshold - background)
_HEIGHT = 0.55  # a nucleus ends at this share of its own contrast
_REACH = 0.3  # of the diameter: how far a region grows to get there
_MIN_PX = 3.0
_UNKNOWN_PX = 16.0
_SCALES_PX = 6.0 * 1.3 ** np.arange(10)
_NEARLY = 0.9  # of the best
_SHRINK = 0.75  # regions chosen with little regard to size hold clumps, too


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


_LOOSE = TreeOptions(min_area=0.04, max_area=10, spread=0.1)


@dataclass(frozen=True)
class Watershed:
    """Segmenter of RGB blocks with everything fixed that must not differ between blocks.

    Attributes
    ----------
    diameter_px
        Diameter of a typical nucleus in pixels.
    appearance
        Densities of nuclei and surroundings; of the block itself if ``None``.
    options
        What counts as a nucleus.
    """

    diameter_px: float
    appearance: Appearance | None = None
    options: TreeOptions = TreeOptions()

    def __post_init__(self) -> None:
        if not np.isfinite(self.diameter_px) or self.diameter_px < _MIN_PX:
            raise DataValueError(
                f"diameter_px={self.diameter_px!r}: nuclei of fewer than 3 px cannot be told apart; use a finer image"
            )

    @property
    def halo_px(self) -> int:
        """Width of the surroundings that decide what lies in a block."""
        return int(np.ceil((self.options.max_extent + 1.5) * self.diameter_px)) + 4

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Label image (h, w) int32 of an (h, w, 3) uint8 image."""
        look = self.appearance or estimate_appearance(rgb)
        return _segment(rgb, self.diameter_px, look, self.options)


def segment_watershed(
    rgb: np.ndarray,
    *,
    mpp: float | None = None,
    diameter_um: float = DIAMETER_UM,
    diameter_px: float | None = None,
) -> np.ndarray:
    """Outline nuclei in one image.

    Parameters
    ----------
    rgb
        Image, (h, w, 3) uint8.
    mpp
        µm per pixel. With neither `mpp` nor `diameter_px` the size of nuclei is estimated from the image.
    diameter_um
        Diameter of a typical nucleus in µm; used with `mpp`.
    diameter_px
        The same in pixels, in place of both.

    Returns
    -------
    (h, w) int32: 0 is background, 1…n are nuclei.

    Raises
    ------
    ImageFormatError
        If `rgb` is not an 8-bit RGB image.
    DataValueError
        If sizes are not positive, or a nucleus has fewer than 3 pixels across.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.full((60, 60, 3), 235, np.uint8)
    >>> y, x = np.mgrid[:60, :60]
    >>> for centre in (18, 42):
    ...     image[(y - 30) ** 2 + (x - centre) ** 2 < 64] = (90, 60, 150)
    >>> print(segment_watershed(image, mpp=0.5).max())
    2
    """
    check_rgb(rgb)
    if diameter_px is None and mpp is not None:
        if not (np.isfinite(mpp) and mpp > 0 and np.isfinite(diameter_um) and diameter_um > 0):
            raise DataValueError(f"mpp={mpp!r} and diameter_um={diameter_um!r} must be positive numbers")
        diameter_px = diameter_um / mpp
    if diameter_px is None:
        diameter_px = estimate_diameter(rgb)
    return Watershed(diameter_px)(rgb)


def estimate_diameter(rgb: np.ndarray) -> float:
    """Diameter in pixels of the typical nucleus in an image of unknown scale.

    The image is segmented with diameters from 6 to 64 px and little regard to size. Of those at which the most of what
    is dark lies in regions that look like nuclei, the largest is taken, because grains of chromatin can pass for nuclei
    in nearly as many pixels as the nuclei that hold them. It is right within a factor; the answer is the diameter of a
    disc of its regions' median area, each counting by the square root of its area, so that debris does not decide.

    Parameters
    ----------
    rgb
        Image with nuclei, (h, w, 3) uint8.

    Returns
    -------
    Diameter in pixels; 16 where no nuclei are found.
    """
    from ._components import score_regions

    check_rgb(rgb)
    look = estimate_appearance(rgb)
    dark = nuclear_density(rgb, look.white) > look.threshold
    explained, typical = [0.0], [_UNKNOWN_PX]
    for diameter in _SCALES_PX[: 1 + np.searchsorted(_SCALES_PX, min(rgb.shape[:2]) / 2)]:
        labels = _segment(rgb, float(diameter), look, _LOOSE)
        area, score = score_regions(labels, int(labels.max()), _LOOSE.shape(float(diameter)))
        explained.append(float(score[labels[dark]].sum()))
        typical.append(_SHRINK * _disc_of_median(area[1:]))
    good = np.flatnonzero(np.array(explained) >= _NEARLY * max(explained))
    return max(typical[good[-1]] if max(explained) > 0 else _UNKNOWN_PX, _MIN_PX)


def _disc_of_median(area: np.ndarray) -> float:
    """Diameter of a disc of the median area, weighted by square roots of areas; 0 without any."""
    if not area.size:
        return 0.0
    area = np.sort(area)
    weight = np.cumsum(np.sqrt(area))
    return float(2 * np.sqrt(area[np.searchsorted(weight, weight[-1] / 2)] / np.pi))


def check_rgb(rgb: np.ndarray) -> None:
    """Raise unless `rgb` is an (h, w, 3) uint8 array."""
    if not isinstance(rgb, np.ndarray):
        raise DataTypeError(f"rgb must be an array, got {type(rgb).__name__}")
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ImageFormatError(f"rgb must be (h, w, 3) uint8, got {rgb.shape} {rgb.dtype}")


def _segment(rgb: np.ndarray, diameter_px: float, look: Appearance, options: TreeOptions) -> np.ndarray:
    """Labels; all in units where the background is 0 and Otsu's threshold 1."""
    from ._components import choose_regions
    from ._flood import grow_regions
    from ._necks import split_necks
    from ._smooth import capped_distance, gaussian_taps, look_up, quantised_relief, smooth

    nothing = np.zeros(rgb.shape[:2], dtype=np.int32)
    if not look.has_nuclei or rgb.size == 0:
        return nothing
    unit = look.threshold - look.background
    table = (density_table(look.white) - np.float32(look.background)) / np.float32(unit)
    if table[rgb[..., 0].min()] <= _LOWEST:  # glass costs no more than this
        return nothing
    dye = smooth(
        look_up(rgb[..., 0], table.astype(np.float32)),
        gaussian_taps(max(_SMOOTHING * diameter_px, _MIN_SMOOTHING_PX)),
    )
    radius = diameter_px / 2
    depth = smooth(
        capped_distance(dye, np.float32(_LOWEST + 0.1), np.float32(radius)), gaussian_taps(_SMOOTHING * diameter_px)
    )
    top = max((look.top - look.background) / unit + _DISTANCE / 2, _LOWEST + 0.1)
    levels = quantised_relief(dye, depth, _LOWEST, _DISTANCE / radius, top, _LEVELS)
    labels, count = choose_regions(levels, _LEVELS, options.shape(diameter_px))
    if not count:
        return nothing
    reach = max(1, round(_REACH * diameter_px))
    grow_regions(dye, labels, count, np.float32(_LOWEST), np.float32(top), _HEIGHT, reach)
    split_necks(labels, diameter_px, depth=_NECK, min_area=options.min_area, split_area=_SPLIT_AREA)
    kept = np.bincount(labels.ravel()) >= options.min_area * np.pi / 4 * diameter_px**2
    kept[0] = False
    names = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return names[labels]
