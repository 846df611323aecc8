"""A fine grid on tissue: the cells that super-resolution methods predict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.geometry import Slide, image_transformations, resolve_slide
from ..data.tissue import tissue_outline
from ..errors import DataValueError, GeometryError, ScaleError
from ._free import check_elements_free, check_not_annotated

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData

__all__ = ["superpixels"]

MIN_PX = 2.0  # a cell of fewer pixels across holds no more than its colour
MIN_TISSUE = 0.05  # cells of which less lies in tissue are left out
_CELLS_AT_ONCE = 200_000
_COLUMNS = {Keys.SUPERPIXEL_ID, Keys.GRID_ROW, Keys.GRID_COL, Keys.SIZE_UM, "geometry"}


def superpixels(
    sdata: SpatialData,
    size_um: float = 8.0,
    *,
    image_key: str | None = None,
    shapes_key: str | None = None,
    key_added: str = Keys.SUPERPIXELS,
    copy: bool = False,
) -> GeoDataFrame | None:
    """Lay a grid of square cells on the tissue.

    The grid starts at the corner of the image, so that it is the same whatever tissue was found. Cells at the border of
    the tissue are cut to it: what a spot covers of a cell is then exactly the tissue that both share. Cells of which
    less than a twentieth lies in tissue are left out.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale and its tissue.
    size_um
        Side of a cell in µm. At 8 µm, the usual size, a cell is about as large as a nucleus.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    shapes_key
        Tissue outlines; by default ``"tissue"``, LazySlide's ``"tissues"`` or squidpy's mask ``"<image>_tissue"``,
        whichever is there.
    key_added
        Name of the grid.
    copy
        Return the cells in place of writing them.

    Returns
    -------
    The cells if `copy`, else ``None`` and they are written:

    ``shapes["superpixels"]``
        Polygons in level-0 pixels, row by row, with ``superpixel_id`` (equal to the index), ``row`` and ``col`` on the
        grid and ``size_um``. They carry the image's transformations.

    Raises
    ------
    MissingKeyError
        If no tissue was detected.
    ScaleError
        If a cell would be smaller than two pixels of the image; the size that can be had is named.
    GeometryError
        If no cell falls on tissue, or a table annotates cells that would change.
    DataValueError
        If `key_added` is taken by something that this function did not make, or is no legal key.

    See Also
    --------
    hespotex.pp.embed : features of the cells, with ``shapes_key="superpixels"``.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> float(sdata["superpixels"].area.max()) == (16 / 0.5) ** 2
    True
    """
    if not (np.isfinite(size_um) and size_um > 0):
        raise DataValueError(f"size_um={size_um!r} must be a positive number of µm")
    slide = resolve_slide(sdata, image_key=image_key)
    if size_um < MIN_PX * slide.mpp * (1 - 1e-6):
        raise ScaleError(
            f"size_um={size_um:g} is {size_um / slide.mpp:.2g} pixels of image {slide.key!r} ({slide.mpp:.3g} µm/px): it "
            f"shows nothing that fine. The smallest cells it allows are size_um={MIN_PX * slide.mpp:.3g}"
        )
    if not copy:
        check_elements_free(
            sdata,
            {key_added: "shapes"},
            key_added=key_added,
            maker="superpixels",
            is_ours=lambda shapes: set(shapes.columns) == _COLUMNS,
        )
    cells = _shapes(sdata, slide, *_cells(tissue_outline(sdata, slide, shapes_key), slide, size_um), size_um)
    if copy:
        return cells
    check_not_annotated(sdata, key_added, cells)
    sdata[key_added] = cells
    logger.info("superpixels: %d cells of %g µm on tissue; wrote shapes[%r]", len(cells), size_um, key_added)
    return None


def _cells(tissue: BaseGeometry, slide: Slide, size_um: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Polygons in level-0 pixels and their rows and columns on the grid, in order of rows."""
    import shapely

    side = size_um / slide.mpp
    height, width = slide.shape
    tissue = tissue.intersection(shapely.box(0, 0, width, height))
    if tissue.is_empty:
        raise GeometryError(
            f"the tissue does not lie on image {slide.key!r}; find it anew with hx.pp.detect_tissue(sdata)"
        )
    left, top, right, bottom = tissue.bounds
    columns = np.arange(int(left // side), int(np.ceil(right / side)))
    rows = np.arange(int(top // side), int(np.ceil(bottom / side)))
    shapely.prepare(tissue)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for band in np.array_split(rows, max(1, len(rows) * len(columns) // _CELLS_AT_ONCE)):
        row, column = np.repeat(band, len(columns)), np.tile(columns, len(band))
        boxes = shapely.box(column * side, row * side, (column + 1) * side, (row + 1) * side)
        kept = shapely.contains(tissue, boxes)
        cut = np.flatnonzero(~kept & shapely.intersects(tissue, boxes))
        pieces = _polygonal(shapely.intersection(tissue, boxes[cut]))
        enough = shapely.area(pieces) >= MIN_TISSUE * side**2
        boxes[cut[enough]] = pieces[enough]
        kept[cut[enough]] = True
        found.append((boxes[kept], row[kept], column[kept]))
    polygons, row, column = (np.concatenate(part) for part in zip(*found, strict=True))
    if len(polygons) == 0:
        raise GeometryError(
            f"no cell of {size_um:g} µm lies on the tissue ({tissue.area * slide.mpp**2:.0f} µm²); lower size_um or check "
            "the tissue"
        )
    return polygons, row, column


def _polygonal(geometries: np.ndarray) -> np.ndarray:
    """The areas of what an intersection left; where borders only touch, it leaves lines and points beside them."""
    import shapely

    mixed = shapely.get_type_id(geometries) == shapely.GeometryType.GEOMETRYCOLLECTION
    for index in np.flatnonzero(mixed):
        parts = shapely.get_parts(geometries[index])
        geometries[index] = shapely.union_all(parts[shapely.get_dimensions(parts) == 2])
    geometries[shapely.get_dimensions(geometries) < 2] = shapely.Polygon()
    return geometries


def _shapes(
    sdata: SpatialData, slide: Slide, polygons: np.ndarray, row: np.ndarray, column: np.ndarray, size_um: float
) -> GeoDataFrame:
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    index = np.arange(len(polygons))
    frame = GeoDataFrame(
        {
            Keys.SUPERPIXEL_ID: index,
            Keys.GRID_ROW: row.astype(np.int32),
            Keys.GRID_COL: column.astype(np.int32),
            Keys.SIZE_UM: np.float64(size_um),
        },
        geometry=polygons,
        index=index,
    )
    return ShapesModel.parse(frame, transformations=image_transformations(sdata, slide.key))
