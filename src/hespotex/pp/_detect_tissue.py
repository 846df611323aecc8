"""Where the tissue lies on a slide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._tasks import check_client, iter_tasks
from ..data.geometry import Slide, image_transformations, resolve_slide
from ..errors import DataValueError, GeometryError
from ..image.stream import WorkingGrid, block_corners, iter_blocks, working_grid
from ..image.tissue import mask_polygons, tissue_mask
from ._free import check_elements_free

if TYPE_CHECKING:
    from distributed import Client
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["detect_tissue"]

WORKING_UM = 16.0
BLOCK_SOURCE_PX = 2048


def detect_tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    min_area_um2: float = 50_000.0,
    max_hole_um2: float = 40_000.0,
    key_added: str = Keys.TISSUE,
    copy: bool = False,
    client: Client | None = None,
    progress_bar: bool | None = None,
) -> GeoDataFrame | None:
    """Outline the tissue by how much light it absorbs.

    Glass may be tinted, or blackened out; grey objects such as pen, shadow and printed frames are left out. The
    slide is read at 16 µm per pixel.

    squidpy has a detector, too (``squidpy.experimental.im.detect_tissue``), which takes the corners for glass
    and thresholds grey values. On eight slides of the kinds used in the field it took glass for tissue in three,
    with black, grey or little background, hence our own. :func:`make_tiles` reads the mask that squidpy's writes.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    min_area_um2
        Smaller pieces are dropped.
    max_hole_um2
        Smaller holes are filled.
    key_added
        Name of the outlines.
    copy
        Return the outlines in place of writing them.
    client
        A ``dask.distributed.Client``, whose workers read the slide: of use where it has to be read at full size, as an
        image without coarser levels. They need the file under the same path.
    progress_bar
        The setting by default.

    Returns
    -------
    The outlines if `copy`, else ``None`` and they are written:

    ``shapes["tissue"]``
        Polygons in level-0 pixels, largest first, with their ``area_um2``. They carry the image's transformations.

    Raises
    ------
    GeometryError
        If no tissue is found.
    DataValueError
        If `key_added` is taken by something that this function did not make, or is no legal key.

    Examples
    --------
    >>> import hespotex as hx
    >>> hx.pp.detect_tissue(slide)  # doctest: +SKIP
    """
    if min_area_um2 < 0 or max_hole_um2 < 0:
        raise DataValueError(f"min_area_um2={min_area_um2!r} and max_hole_um2={max_hole_um2!r} must not be negative")
    check_client(client)
    slide = resolve_slide(sdata, image_key=image_key)
    if not copy:
        check_elements_free(
            sdata,
            {key_added: "shapes"},
            key_added=key_added,
            maker="detect_tissue",
            is_ours=lambda shapes: set(shapes.columns) == {"area_um2", "geometry"},
        )
    grid = working_grid(slide, max(WORKING_UM, slide.mpp))
    mask = tissue_mask(
        _overview(slide, grid, client, progress_bar=progress_bar),
        grid.mpp,
        min_area_um2=min_area_um2,
        max_hole_um2=max_hole_um2,
    )
    if not mask.any():
        raise GeometryError(
            f"no stained tissue of at least {min_area_um2:g} µm² was found on image {slide.key!r}; lower min_area_um2, "
            f"or add outlines of your own as shapes[{Keys.TISSUE!r}]"
        )
    tissue = _shapes(sdata, slide, grid, mask)
    if copy:
        return tissue
    sdata[key_added] = tissue
    logger.info("detect_tissue: %d pieces; wrote shapes[%r]", len(tissue), key_added)
    return None


def _overview(slide: Slide, grid: WorkingGrid, client: Client | None, *, progress_bar: bool | None) -> np.ndarray:
    """The whole slide at the grid's resolution, (h, w, 3) uint8."""
    overview = np.empty((*grid.shape, 3), dtype=np.uint8)
    block_px = max(1, int(BLOCK_SOURCE_PX / max(grid.step)))
    how = {"mpp": grid.mpp, "block_px": block_px}
    if client is None:
        parts = _parts(None, slide, how, progress_bar=progress_bar)
    else:
        corners = block_corners(grid, block_px)
        rows = np.split(corners, np.flatnonzero(np.diff(corners[:, 0])) + 1)
        results = iter_tasks(_parts_of_row, rows, shared={"slide": slide, "how": how}, client=client)
        parts = (part for row in results for part in row)
    for place, pixels in parts:
        overview[place] = pixels
    return overview


def _parts(
    corners: np.ndarray | None, slide: Slide, how: dict[str, Any], *, progress_bar: bool | None
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    for block in iter_blocks(slide, **how, corners=corners, progress_bar=progress_bar):
        yield block.place, block.pixels[block.core]


def _parts_of_row(corners: np.ndarray, slide: Slide, how: dict[str, Any]) -> list[Any]:
    return list(_parts(corners, slide, how, progress_bar=False))


def _shapes(sdata: SpatialData, slide: Slide, grid: WorkingGrid, mask: np.ndarray) -> GeoDataFrame:
    from geopandas import GeoDataFrame
    from shapely.affinity import scale
    from spatialdata.models import ShapesModel

    polygons = [
        scale(polygon, xfact=grid.factor[0], yfact=grid.factor[1], origin=(0, 0)) for polygon in mask_polygons(mask)
    ]
    frame = GeoDataFrame({"area_um2": [polygon.area * slide.mpp**2 for polygon in polygons]}, geometry=polygons)
    return ShapesModel.parse(frame, transformations=image_transformations(sdata, slide.key))
