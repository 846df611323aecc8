"""Where things lie: images, spots and microns. The only module that composes SpatialData's transformations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import dask.array as da
    from spatialdata import SpatialData

__all__ = ["Level", "Slide", "resolve_slide", "shape_centres", "shape_radius"]


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a slide's pyramid: lazy (3, h, w) uint8 and the size of its pixel in pixels of level 0."""

    array: da.Array
    downsample: float


@dataclass(frozen=True, eq=False)
class Slide:
    """An H&E image as encoders and segmenters see it.

    Attributes
    ----------
    key
        Its name in ``sdata.images``.
    levels
        Pyramid, finest first.
    mpp
        µm per pixel of level 0, one isotropic number.
    to_microns
        Affine map of level-0 pixels (x, y, 1) to µm, (3, 3).
    """

    key: str
    levels: tuple[Level, ...]
    mpp: float
    to_microns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of level 0 in pixels."""
        height, width = self.levels[0].array.shape[-2:]
        return int(height), int(width)

    def level_for(self, mpp: float) -> Level:
        """The coarsest level that is not coarser than `mpp` (with 1 % slack); level 0 if none is.

        Raises
        ------
        ScaleError
            If `mpp` is finer than half the slide's own.
        """
        ...

    def microns(self, pixels: np.ndarray) -> np.ndarray:
        """Positions in µm of level-0 pixel positions (n, 2)."""
        ...


def resolve_slide(
    sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None, mpp: float | None = None
) -> Slide:
    """The one RGB image of `sdata` (or the one named), with its scale; see the storage contract for how mpp is found."""
    ...


def shape_centres(sdata: SpatialData, shapes_key: str, slide: Slide) -> np.ndarray:
    """Centres (x, y) of the shapes in level-0 pixels of `slide`, (n, 2), in the order of the shapes."""
    ...


def shape_radius(sdata: SpatialData, shapes_key: str, slide: Slide) -> Any:
    """Median radius in µm of the shapes (half the mean side for polygons)."""
    ...
