"""A lattice of tiles on tissue, for slides without measured spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.geometry import Slide, image_transformations, resolve_slide
from ..data.lattice import lay_lattice
from ..data.tissue import tissue_outline
from ..errors import DataValueError, GeometryError
from ._free import check_elements_free, check_not_annotated

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData

__all__ = ["check_holds_a_tile", "make_tiles"]

_MOST_PLACES = 1e8  # of which each takes some tens of bytes; 2 µm apart on a slide of 20 x 20 mm


def make_tiles(
    sdata: SpatialData,
    *,
    diameter_um: float = 100.0,
    pitch_um: float = 200.0,
    lattice: Literal["square", "hex"] = "square",
    image_key: str | None = None,
    shapes_key: str | None = None,
    key_added: str = Keys.TILES,
    copy: bool = False,
) -> GeoDataFrame | None:
    """Lay a lattice of round tiles on the tissue, like the spots of an array.

    A tile is made where its centre lies in tissue. The lattice starts at the corner of the image, so that it is the
    same whatever tissue was found.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale and its tissue.
    diameter_um
        Diameter of a tile in µm; 100 as in classic Spatial Transcriptomics.
    pitch_um
        Distance of neighbouring tiles in µm.
    lattice
        ``"square"`` or ``"hex"``.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    shapes_key
        Tissue outlines; by default ``"tissue"``, LazySlide's ``"tissues"`` or squidpy's mask ``"<image>_tissue"``,
        whichever is there.
    key_added
        Name of the tiles.
    copy
        Return the tiles in place of writing them.

    Returns
    -------
    The tiles if `copy`, else ``None`` and they are written:

    ``shapes["tiles"]``
        Circles in level-0 pixels; the column ``tile_id`` equals the index. They carry the image's transformations.

    Raises
    ------
    MissingKeyError
        If no tissue was detected.
    GeometryError
        If the slide is smaller than one tile, no tile falls on tissue, or a table annotates tiles that would change.
    DataValueError
        If `key_added` is taken by something that this function did not make, or is no legal key.

    Examples
    --------
    >>> import hespotex as hx
    >>> hx.pp.detect_tissue(slide); hx.pp.make_tiles(slide, pitch_um=100, diameter_um=55, lattice="hex")  # doctest: +SKIP
    """
    if not diameter_um > 0 or not pitch_um > 0:
        raise DataValueError(f"diameter_um={diameter_um!r} and pitch_um={pitch_um!r} must be positive")
    if lattice not in ("square", "hex"):
        raise DataValueError(f"lattice={lattice!r} is unknown; possible: 'square', 'hex'")
    slide = resolve_slide(sdata, image_key=image_key)
    if not copy:
        check_elements_free(
            sdata,
            {key_added: "shapes"},
            key_added=key_added,
            maker="make_tiles",
            is_ours=lambda shapes: (
                {name for name in shapes.columns if not name.startswith(f"{Keys.QC}_")}
                == {Keys.TILE_ID, "radius", "geometry"}
            ),
        )
    check_holds_a_tile(slide, diameter_um)
    places = np.prod(np.array(slide.shape, dtype=float) * slide.mpp / pitch_um)
    if places > _MOST_PLACES:
        raise DataValueError(
            f"pitch_um={pitch_um!r}: a lattice over the slide would have {places:.2g} places; raise pitch_um (it is in µm)"
        )
    tissue = tissue_outline(sdata, slide, shapes_key)
    centres, _ = lay_lattice(slide.shape, pitch_um / slide.mpp, lattice)
    centres = centres[_inside(tissue, centres)]
    if len(centres) == 0:
        raise GeometryError(
            f"no tile of a lattice of {pitch_um:g} µm has its centre on the tissue ({tissue.area * slide.mpp**2:.0f} µm²); "
            f"lower pitch_um or check the tissue"
        )
    tiles = _shapes(sdata, slide, centres, diameter_um / 2 / slide.mpp)
    if copy:
        return tiles
    check_not_annotated(sdata, key_added, tiles)
    sdata[key_added] = tiles
    logger.info("make_tiles: %d tiles on tissue; wrote shapes[%r]", len(tiles), key_added)
    return None


def check_holds_a_tile(slide: Slide, diameter_um: float) -> None:
    """Raise a GeometryError if `slide` is smaller than one tile."""
    if min(slide.shape) * slide.mpp < diameter_um:
        raise GeometryError(
            f"the slide is smaller than one tile: {slide.shape[1]} x {slide.shape[0]} px at {slide.mpp:g} µm/px, a tile "
            f"measures {diameter_um:g} µm. If the scale is wrong, give the right one with mpp= or hx.pp.set_scale(sdata, mpp=...); "
            "else lower diameter_um"
        )


def _inside(tissue: BaseGeometry, centres: np.ndarray) -> np.ndarray:
    from shapely import contains_xy, prepare

    prepare(tissue)
    return contains_xy(tissue, centres[:, 0], centres[:, 1])


def _shapes(sdata: SpatialData, slide: Slide, centres: np.ndarray, radius_px: float) -> GeoDataFrame:
    from spatialdata.models import ShapesModel

    tiles = ShapesModel.parse(
        centres,
        geometry=0,
        radius=np.full(len(centres), radius_px),
        index=np.arange(len(centres)),
        transformations=image_transformations(sdata, slide.key),
    )
    tiles[Keys.TILE_ID] = np.arange(len(centres))
    return tiles
