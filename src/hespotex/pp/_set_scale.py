"""The physical scale of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.geometry import find_image_key, level0_shape, pixel_maps
from ..data.lattice import detect_lattice
from ..data.wsi import has_reader, set_reader_mpp
from ..errors import DataValueError, GeometryError, ScaleError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["set_scale"]


def set_scale(
    sdata: SpatialData,
    *,
    mpp: float | None = None,
    pitch_um: float | None = None,
    image_key: str | None = None,
    shapes_key: str | None = None,
) -> None:
    """Say how large a pixel is.

    Writes a transformation to the coordinate system ``"microns"`` on the image, and on every element that shares a
    coordinate system with it. On disk it is only after ``sdata.write_transformations()``.

    Parameters
    ----------
    sdata
        Object with the image.
    mpp
        µm per pixel of the image's finest level.
    pitch_um
        In place of `mpp`: distance of neighbouring spots in µm, such as 200 for classic Spatial Transcriptomics
        and 100 for Visium. Their distance in pixels is measured.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    shapes_key
        The spots that `pitch_um` refers to; may be left out where one table annotates shapes.

    Raises
    ------
    ScaleError
        If not just one of `mpp` and `pitch_um` is given, or it is not positive.
    GeometryError
        If the spots lie on no lattice.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=512, n_spots=4)  # doctest: +SKIP
    >>> hx.pp.set_scale(sdata, mpp=0.5)  # doctest: +SKIP
    """
    from spatialdata.transformations import Affine, set_transformation

    given = mpp if mpp is not None else pitch_um
    if given is None or (mpp is not None and pitch_um is not None):
        raise ScaleError("give just one of mpp= (µm per pixel) and pitch_um= (distance of neighbouring spots in µm)")
    if not np.isfinite(given) or given <= 0:
        raise ScaleError(f"{'mpp' if mpp is not None else 'pitch_um'}={given!r} must be a positive number of µm")
    key = find_image_key(sdata, image_key)
    level0_shape(sdata, key)
    maps = pixel_maps(sdata, key)
    if mpp is None:
        mpp = given / _pitch_px(sdata, maps, shapes_key)
    scale = np.diag([mpp, mpp, 1.0])
    if key == Keys.WSI and has_reader(sdata):
        set_reader_mpp(sdata, float(mpp))
        del maps["images", key]
    for (kind, name), to_pixels in maps.items():
        affine = Affine(scale @ to_pixels, input_axes=("x", "y"), output_axes=("x", "y"))
        set_transformation(getattr(sdata, kind)[name], affine, Keys.MICRONS)
    logger.info(
        "set_scale: image %r has %.4g µm/px; wrote coordinate system %r of %s",
        *(key, mpp, Keys.MICRONS, [name for _, name in maps]),
    )


def _pitch_px(sdata: SpatialData, maps: dict[tuple[str, str], Any], shapes_key: str | None) -> float:
    from ..data.tables import resolve_shapes_key

    name = resolve_shapes_key(sdata, shapes_key)
    if ("shapes", name) not in maps:
        raise GeometryError(f"shapes {name!r} share no coordinate system with the image")
    centroids = sdata.shapes[name].geometry.centroid
    matrix = maps["shapes", name]
    xy = np.column_stack([centroids.x, centroids.y]) @ matrix[:2, :2].T + matrix[:2, 2]
    lattice = detect_lattice(xy)
    if lattice is None:
        raise GeometryError(f"shapes {name!r} lie on no square or hexagonal lattice; give mpp= in place of pitch_um=")
    if lattice.pitch <= 0:
        raise DataValueError(f"shapes {name!r} coincide")
    return lattice.pitch
