"""Tissue masks of other tools, as outlines on a slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import GeometryError
from .geometry import Slide, pixel_maps

if TYPE_CHECKING:
    from shapely.geometry import Polygon
    from spatialdata import SpatialData

__all__ = ["polygons_of_mask"]

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
