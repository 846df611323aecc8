"""Maps of features over superpixels: the published shift ensemble and smoothing, and their repaired forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ...data.section import Rows, rows_of
from ...errors import DataValueError

__all__ = [
    "HIPT_BOXES",
    "SmoothedRows",
    "box_filter",
    "feature_map",
    "pad_white",
    "rgb_map",
    "shift_ensemble",
    "smoothed",
]

SIDE = 16  # pixels of a superpixel
PATCH = 256  # pixels of a patch of the transformers
SHIFT = 64  # pixels between two shifts
HIPT_BOXES = (
    (192, 16),
    (384, 4),
    (3, 1),
)  # columns of features of the encoder hipt, and the box they are averaged over

Maps = Sequence[np.ndarray]


def pad_white(image: np.ndarray, multiple: int = PATCH) -> np.ndarray:
    """The image (H, W, 3) with white below and to the right, so that its sides are multiples of `multiple`."""
    pad = [(0, -size % multiple) for size in image.shape[:2]]
    return np.pad(image, [*pad, (0, 0)], constant_values=255)


def rgb_map(image: np.ndarray) -> np.ndarray:
    """Mean colour of superpixels in [0, 1], (H/16, W/16, 3) float32."""
    height, width = (size // SIDE for size in image.shape[:2])
    pixels = image[: height * SIDE, : width * SIDE].reshape(height, SIDE, width, SIDE, 3)
    return (pixels.mean(axis=(1, 3), dtype=np.float64) / 255).astype(np.float32)


def box_filter(values: np.ndarray, side: int, *, centred: bool) -> np.ndarray:
    """Means over squares of superpixels along the first two axes, (h, w, …); beyond the border values are reflected.

    As published, output *i* is the mean of ``i - side / 2`` to ``i + side / 2 - 1``, half a superpixel off for an even
    `side`; `centred` takes the next odd side.

    Examples
    --------
    >>> import numpy as np
    >>> impulse = np.eye(1, 21, 10)
    >>> np.flatnonzero(box_filter(impulse, 4, centred=False)[0]).tolist()
    [9, 10, 11, 12]
    """
    from scipy.ndimage import uniform_filter1d

    if side == 1:
        return np.asarray(values)
    side += centred and side % 2 == 0
    for axis in (0, 1):
        values = uniform_filter1d(values, side, axis=axis, mode="reflect")
    return values


def shift_ensemble(
    image: np.ndarray, extract: Callable[[np.ndarray], Maps], *, stride: int = SHIFT, legacy: bool = False
) -> list[np.ndarray]:
    """Mean of maps over shifts of the grid of patches, a list of (H/16, W/16, c) float32.

    Parameters
    ----------
    image
        RGB, (H, W, 3) uint8, sides multiples of 16.
    extract
        From an image whose sides are smaller by whole patches, if at all, to its maps (h/16, w/16, c).
    stride
        Pixels between two shifts; 64 gives 16 of them.
    legacy
        As published: shifts stay within the image and their sum is divided by their number, so that the first twelve
        rows and columns are drawn towards 0, and the last sixteen are set to 0. Otherwise the image is continued by its
        edge and every superpixel is the mean of all shifts.

    Raises
    ------
    DataValueError
        If the sides are no multiples of 16, or as published not larger than 256.
    """
    if any(size % SIDE for size in image.shape[:2]):
        raise DataValueError(f"image of {image.shape[:2]} pixels: its sides must be multiples of {SIDE}; use pad_white")
    if legacy and min(image.shape[:2]) <= PATCH:
        raise DataValueError(f"image of {image.shape[:2]} pixels: shifts within it need sides of more than {PATCH}")
    margin = 0 if legacy else PATCH
    source = np.pad(image, [(margin, margin), (margin, margin), (0, 0)], mode="edge")
    height, width = source.shape[:2]
    offsets = list(product(range(0, PATCH, stride), repeat=2))
    total: list[np.ndarray] = []
    for top, left in offsets:
        maps = extract(source[top : height - PATCH + top, left : width - PATCH + left])
        if not total:
            total = [np.zeros((height // SIDE, width // SIDE, each.shape[2]), dtype=np.float32) for each in maps]
        y, x = top // SIDE, left // SIDE
        for sum_, each in zip(total, maps, strict=True):
            sum_[y : y + each.shape[0], x : x + each.shape[1]] += each
    edge = PATCH // SIDE
    if not legacy:
        return [sum_[edge:-edge, edge:-edge] / len(offsets) for sum_ in total]
    for sum_ in total:
        sum_ /= len(offsets)
        sum_[-edge:], sum_[:, -edge:] = 0, 0
    return total


def feature_map(image: np.ndarray, extract: Callable[[np.ndarray], Maps], *, legacy: bool = False) -> np.ndarray:
    """Features of all superpixels of an image: regional, local, colour; (H/16, W/16, 579) float32 for HIPT.

    Parameters
    ----------
    image
        RGB at 0.5 µm per pixel, (H, W, 3) uint8; white is added below and to the right.
    extract
        From an image to its regional and local maps, such as
        :func:`hespotex.encoders.hipt.image_maps` with its two networks.
    legacy
        As published, with its attenuated and empty borders and its smoothing that is half a superpixel off.
    """
    image = pad_white(image)
    maps = [*shift_ensemble(image, extract, legacy=legacy), rgb_map(image)]
    sides = [side for _, side in HIPT_BOXES]
    smooth = [box_filter(values, side, centred=not legacy) for values, side in zip(maps, sides, strict=True)]
    return np.concatenate(smooth, axis=2)


@dataclass(frozen=True, eq=False)
class SmoothedRows:
    """Features of superpixels, averaged over squares of those that are there; read block by block.

    Attributes
    ----------
    source
        Features, (m, d); any row field.
    grid
        Row and column of each superpixel, (m, 2). Where blocks of rows are near each other on the grid, little is read
        more than once.
    boxes
        Numbers of columns and the side of the square over which these are averaged, in superpixels.
    centred
        See :func:`box_filter`.
    """

    source: Rows
    grid: np.ndarray
    boxes: tuple[tuple[int, int], ...] = HIPT_BOXES
    centred: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Superpixels × features."""
        return int(self.source.shape[0]), int(self.source.shape[1])

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Smoothed features of some superpixels, (b, d) float32; NaN on and beside lines of which one is not finite."""
        grid = np.asarray(self.grid) - np.min(self.grid, axis=0)
        own = grid[rows]
        if not len(own):
            return np.empty((0, self.shape[1]), dtype=np.float32)
        reach = max(side for _, side in self.boxes)
        last = int(grid[:, 0].max())
        top, bottom = max(int(own[:, 0].min()) - reach, 0), min(int(own[:, 0].max()) + reach, last)
        near = np.flatnonzero((grid[:, 0] >= top) & (grid[:, 0] <= bottom))
        place = (grid[near, 0] - top, grid[near, 1])
        shape = (bottom - top + 1, int(grid[:, 1].max()) + 1)
        features = rows_of(self.source, near).astype(np.float32, copy=False)
        present = np.zeros(shape, dtype=np.float32)
        present[place] = 1
        out, column = [], 0
        for width, side in self.boxes:
            raster = np.zeros((*shape, width), dtype=np.float32)
            raster[place] = features[:, column : column + width]
            column += width
            weight = box_filter(present, side, centred=self.centred)
            smooth = box_filter(raster, side, centred=self.centred)
            at = (own[:, 0] - top, own[:, 1])
            out.append(smooth[at] / weight[at][:, None])
        return np.concatenate(out, axis=1)


def smoothed(features: Rows, grid: np.ndarray | None, smooth: str) -> Rows:
    """The features of the encoder ``hipt`` smoothed, any others as they are."""
    if smooth == "none" or grid is None or features.shape[1] != sum(width for width, _ in HIPT_BOXES):
        return features
    return SmoothedRows(features, grid, centred=smooth == "centred")
