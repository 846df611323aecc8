"""Tissue on a slide as outlines, whoever found it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..errors import GeometryError, MissingKeyError
from .geometry import Slide, pixel_maps, shape_geometries

if TYPE_CHECKING:
    from shapely.geometry import Polygon
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData

__all__ = ["polygons_of_mask", "tissue_outline"]

MASK_UM = 8.0  # resolution at which a mask is read: squidpy stores it as large as the image


def polygons_of_mask(sdata: SpatialData, labels_key: str, slide: Slide) -> list[Polygon]:
    """Outlines in level-0 pixels of what is not 0 in ``labels[labels_key]``.

    Raises
    ------
    GeometryError
        If the mask shares no coordinate system with the image.
    """
    from shapely.affinity import affine_transform
    from spatialdata import get_pyramid_levels
    from xarray import DataArray

    from ..image.tissue import mask_polygons

    matrix = pixel_maps(sdata, slide.key).get(("labels", labels_key))
    if matrix is None:
        raise GeometryError(f"labels {labels_key!r} share no coordinate system with image {slide.key!r}")
    labels = sdata.labels[labels_key]
    finest = labels if isinstance(labels, DataArray) else next(iter(get_pyramid_levels(labels)))
    pixel_um = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))) * slide.mpp
    step = max(1, int(MASK_UM / pixel_um))
    mask = np.asarray(finest.transpose("y", "x").data[::step, ::step]) > 0
    linear = matrix[:2, :2] * step
    to_image = [*linear[0], *linear[1], matrix[0, 2], matrix[1, 2]]
    return [affine_transform(polygon, to_image) for polygon in mask_polygons(mask)]


def tissue_outline(sdata: SpatialData, slide: Slide, shapes_key: str | None) -> BaseGeometry:
    """Union of the tissue outlines in level-0 pixels: those named, ours, LazySlide's, or squidpy's mask.

    Raises
    ------
    MissingKeyError
        If there are none.
    """
    from shapely import make_valid, union_all

    known = [shapes_key] if shapes_key else [Keys.TISSUE, Keys.TISSUE_LAZYSLIDE]
    for name in known:
        if name in sdata.shapes:
            return union_all(make_valid(shape_geometries(sdata, name, slide).to_numpy()))
    mask = f"{slide.key}{Keys.TISSUE_MASK_SUFFIX}"
    if shapes_key is None and mask in sdata.labels:
        return union_all(polygons_of_mask(sdata, mask, slide))
    if shapes_key is not None:
        raise MissingKeyError(f"shapes_key={shapes_key!r} is not among the shapes {list(sdata.shapes)}")
    raise MissingKeyError(
        f"there is no tissue on the slide yet (shapes {list(sdata.shapes)}); find it with hx.pp.detect_tissue(sdata)"
    )
