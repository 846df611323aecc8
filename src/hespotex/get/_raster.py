"""A superpixel prediction as an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..annotation.raster import to_raster
from ..data.blockwise import check_fits
from ..data.stored import find_prediction, read_prediction
from ..data.tables import resolve_table, row_positions
from ..errors import DataTypeError, DataValueError, GeometryError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

__all__ = ["raster"]


def raster(
    sdata: SpatialData,
    key: str | None = None,
    *,
    genes: Sequence[str] | str | None = None,
    table_key: str | None = None,
    write: bool = False,
) -> DataArray:
    """A prediction at superpixels as an image with a channel per gene.

    Parameters
    ----------
    sdata
        Object in which :func:`hespotex.tl.predict` stored the prediction.
    key
        Key of the prediction; may be left out where there is only one.
    genes
        Genes to draw, in this order; all by default.
    table_key
        Table to look in; all are searched by default.
    write
        Also write it as ``images["<table>_raster"]``.

    Returns
    -------
    (genes, y, x) float32, NaN where there is no superpixel, with the transformations that lay it over the slide.

    Raises
    ------
    DataValueError
        If the prediction is not one of superpixels, lacks a gene, the image would not fit into memory, or its name is
        taken.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=20)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "interpolate")
    >>> hx.get.raster(sdata, "interpolate").dims
    ('c', 'y', 'x')
    """
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Sequence as Composed
    from spatialdata.transformations import get_transformation

    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the superpixels")
    adata, name, key = find_prediction(sdata, key, table_key)
    stored = read_prediction(adata, key)
    table = resolve_table(sdata, table_key=name)
    shapes: GeoDataFrame = sdata.shapes[table.regions[0]]
    if not {Keys.GRID_ROW, Keys.GRID_COL, Keys.SIZE_UM} <= set(shapes.columns):
        raise DataValueError(
            f"prediction {key!r} is of shapes {table.regions[0]!r}, which are no superpixels; only a grid makes an image"
        )
    wanted = list(stored.genes) if genes is None else [genes] if isinstance(genes, str) else list(genes)
    if not wanted:
        raise DataValueError("genes is empty: name at least one gene, or leave it out for all")
    if write and (place := f"{name}{Keys.RASTER}") in sdata and place not in sdata.images:
        raise DataValueError(f"the raster would be called {place!r}, as another element is; rename that one")
    column_of = {gene: column for column, gene in enumerate(stored.genes)}
    if missing := [gene for gene in wanted if gene not in column_of]:
        raise DataValueError(f"genes: prediction {key!r} has not {', '.join(map(repr, missing[:10]))}")
    rows, positions = row_positions(sdata, table, table.regions[0])
    grid = shapes[[Keys.GRID_ROW, Keys.GRID_COL]].to_numpy(dtype=np.int64)[positions]
    low = grid.min(axis=0)
    height, width = (grid.max(axis=0) - low + 1).tolist()
    check_fits(height * width, len(wanted), 3, "a raster")  # the chosen values, laid out, and with genes in front
    values = stored.values[np.ix_(rows, np.array([column_of[gene] for gene in wanted]))]
    image = np.ascontiguousarray(to_raster(values, grid).transpose(2, 0, 1))
    to_pixels = _to_pixels(shapes, low)
    transformations = {
        system: Composed([to_pixels, own]) for system, own in get_transformation(shapes, get_all=True).items()
    }
    element = Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=wanted, transformations=transformations)
    if write:
        sdata[f"{name}{Keys.RASTER}"] = element
    return element


def _to_pixels(shapes: GeoDataFrame, low: np.ndarray) -> Any:
    """Map of raster pixels to the intrinsic coordinates of the cells, from the corners of a whole one."""
    from spatialdata.transformations import Affine

    area = shapes.geometry.area.to_numpy()
    whole = int(np.argmax(area))
    left, top, right, bottom = shapes.geometry.iloc[whole].bounds
    side = right - left
    if abs(bottom - top - side) > 1e-6 * side:
        raise GeometryError("the superpixels are no squares; lay them with hx.pp.superpixels(sdata)")
    row, column = (int(shapes[name].iloc[whole]) for name in (Keys.GRID_ROW, Keys.GRID_COL))
    x, y = left + (low[1] - column) * side, top + (low[0] - row) * side
    return Affine([[side, 0, x], [0, side, y], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
