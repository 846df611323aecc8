"""Pool fine measurements into coarse spots, so that the truth below the spot is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from .._keys import Keys
from .._logging import logger
from ..data.counts import check_counts, counts_of
from ..data.geometry import (
    Slide,
    find_image_key,
    image_transformations,
    resolve_slide,
    shape_centres,
    shape_geometries,
    slide_element,
)
from ..data.lattice import lay_lattice
from ..data.shares import within_shares
from ..data.tables import AnnotatedTable, mark_table, resolve_table, row_positions
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, GeometryError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["coarsen"]

FINE = "fine"  # shapes and table of the truth in the result


def coarsen(
    sdata: SpatialData,
    *,
    pitch_um: float = 100.0,
    diameter_um: float = 55.0,
    lattice: Literal["square", "hex"] = "hex",
    merge: int | None = None,
    min_parts: int = 1,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    counts_layer: str | None = None,
) -> SpatialData:
    """Make a coarse section out of a fine one: pseudo-Visium from cells or bins, or spots merged in blocks.

    A spot of the new section counts what was counted in the cells whose centre it holds, and nothing else: its counts
    are sums of the truth. Train on it, predict the fine level, and compare.

    Parameters
    ----------
    sdata
        Section whose table has a row for each cell, bin or spot. It stays as it is.
    pitch_um, diameter_um, lattice
        Spots to lay; the defaults are those of Visium.
    merge
        In place of a lattice, merge `merge` × `merge` neighbouring spots of an array into one; its shape is the union
        of theirs. Blocks that lack one are left out.
    min_parts
        Spots that hold fewer cells are left out.
    table_key, shapes_key, image_key, counts_layer
        What to read; each may be left out where there is one candidate.

    Returns
    -------
    A new section with the same image: ``shapes["spots"]`` and ``tables["table"]`` (counts; ``obs["n_parts"]``), and the
    truth as ``shapes["fine"]`` and ``tables["fine_table"]``, which no function takes for the measurement unless named.

    Raises
    ------
    MissingKeyError
        If spots are to be merged that have no array positions.
    GeometryError
        If no spot holds a cell.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1600, n_genes=20)
    >>> merged = hx.tl.coarsen(sdata, merge=2)
    >>> merged["fine_table"].n_obs == sdata["table"].n_obs
    True
    """
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the shapes")
    table = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    if len(table.regions) > 1:
        raise AmbiguousKeyError(
            f"table {table.key!r} annotates {list(table.regions)}; split the object by region first"
        )
    own = table.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=own))
    counts = counts_of(table.adata, counts_layer, f"table {table.key!r}")
    check_counts(counts, f"table {table.key!r}")
    rows, positions = row_positions(sdata, table, own)
    centres = shape_centres(sdata, own, slide)[positions]
    if merge is not None:
        members, obs = _blocks(table, rows, merge)
        shapes = _merged_shapes(sdata, slide, own, positions, members)
    else:
        members, obs, shapes = _lattice(sdata, slide, centres, pitch_um, diameter_um, lattice)
    enough = np.diff(members.indptr) >= max(min_parts, 1)
    if not enough.any():
        raise GeometryError(
            f"no spot holds {max(min_parts, 1)} of the {len(rows)} cells; widen diameter_um, or lower min_parts"
        )
    members, obs, shapes = sparse.csr_array(members[enough]), obs[enough].copy(), shapes[enough]
    obs["n_parts"] = np.diff(members.indptr)
    pooled = sparse.csr_matrix(sparse.csr_array(members.astype(np.int64)) @ sparse.csr_array(counts)[rows])
    pooled.data = np.rint(pooled.data)
    result = _assemble(sdata, slide, table, own, pooled.astype(np.int32), obs, shapes)
    logger.info("coarsen: %d spots out of %d cells", len(obs), len(rows))
    return result


def _lattice(
    sdata: SpatialData,
    slide: Slide,
    centres: np.ndarray,
    pitch_um: float,
    diameter_um: float,
    kind: Literal["square", "hex"],
) -> tuple[sparse.csr_array, Any, Any]:
    """Cells of each spot of a lattice over the image, array positions, and circles."""
    import pandas as pd
    from spatialdata.models import ShapesModel

    if not (pitch_um > 0 and diameter_um > 0):
        raise DataValueError(f"pitch_um={pitch_um!r} and diameter_um={diameter_um!r} must be positive")
    if kind not in ("square", "hex"):
        raise DataValueError(f"lattice={kind!r} is unknown; possible: 'square', 'hex'")
    xy, array = lay_lattice(slide.shape, pitch_um / slide.mpp, kind)
    radius = diameter_um / 2 / slide.mpp
    ids = [f"{column}x{row}" for row, column in array.tolist()]
    obs = pd.DataFrame(array, columns=[Keys.ARRAY_ROW, Keys.ARRAY_COL], index=pd.Index(ids, dtype=object))
    shapes = ShapesModel.parse(
        xy, geometry=0, radius=radius, index=ids, transformations=image_transformations(sdata, slide.key)
    )
    return within_shares(xy, radius, centres), obs, shapes


def _blocks(table: AnnotatedTable, rows: np.ndarray, merge: int) -> tuple[sparse.csr_array, Any]:
    """Spots of each block of an array, and the block's own position."""
    import pandas as pd

    if merge < 2:
        raise DataValueError(f"merge={merge!r} must be at least 2")
    obs = table.adata.obs.iloc[rows]
    if not {Keys.ARRAY_ROW, Keys.ARRAY_COL} <= set(obs.columns):
        raise MissingKeyError(
            f"merge= goes by array positions: table {table.key!r} lacks obs[{Keys.ARRAY_ROW!r}] and obs[{Keys.ARRAY_COL!r}]"
        )
    row, column = (
        obs[name].to_numpy(dtype=np.float64).round().astype(int) for name in (Keys.ARRAY_ROW, Keys.ARRAY_COL)
    )
    # Where rows are staggered, as on Visium, every second column of a row is empty.
    staggered = len(np.unique((row + column) % 2)) == 1 and len(row) > 1
    block = np.column_stack([row // merge, column // (2 * merge if staggered else merge)])
    names, member = np.unique(block, axis=0, return_inverse=True)
    matrix = sparse.csr_array(
        (np.ones(len(rows)), (member.ravel(), np.arange(len(rows)))), shape=(len(names), len(rows))
    )
    whole = np.diff(matrix.indptr) == merge * merge
    ids = [f"{c}x{r}" for r, c in names[whole].tolist()]
    return sparse.csr_array(matrix[whole]), pd.DataFrame(
        names[whole], columns=[Keys.ARRAY_ROW, Keys.ARRAY_COL], index=pd.Index(ids, dtype=object)
    )


def _merged_shapes(sdata: SpatialData, slide: Slide, own: str, positions: np.ndarray, members: sparse.csr_array) -> Any:
    """Unions of the merged spots, in level-0 pixels."""
    import shapely
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    outlines = shape_geometries(sdata, own, slide).to_numpy()[positions]
    unions = [
        shapely.union_all(outlines[members.indices[start:stop]])
        for start, stop in zip(members.indptr[:-1], members.indptr[1:], strict=True)
    ]
    # SpatialData takes one kind of polygon per element.
    unions = [shapely.MultiPolygon([each]) if each.geom_type == "Polygon" else each for each in unions]
    frame = GeoDataFrame(geometry=unions, index=[f"m{number}" for number in range(len(unions))])
    return ShapesModel.parse(frame, transformations=image_transformations(sdata, slide.key)) if len(unions) else frame


def _assemble(
    sdata: SpatialData,
    slide: Slide,
    table: AnnotatedTable,
    own: str,
    counts: sparse.csr_matrix,
    obs: Any,
    shapes: Any,
) -> SpatialData:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData
    from spatialdata.models import TableModel, get_table_keys

    shapes.index = obs.index
    obs[Keys.REGION] = pd.Categorical([Keys.SPOTS] * len(obs))
    obs[Keys.INSTANCE] = obs.index.to_numpy(dtype=object)
    pooled = AnnData(X=counts, obs=obs, var=table.adata.var.copy(), obsm={Keys.SPATIAL: _centroids(shapes)})
    truth = _truth(table.adata, *get_table_keys(table.adata)[1:])
    elements = {
        slide.key: slide_element(sdata, slide.key),
        Keys.SPOTS: shapes,
        Keys.TABLE: TableModel.parse(pooled, region=Keys.SPOTS, region_key=Keys.REGION, instance_key=Keys.INSTANCE),
        FINE: sdata.shapes[own],
        f"{FINE}_table": truth,
    }
    for name in (Keys.TISSUE, Keys.TISSUE_LAZYSLIDE):
        if name in sdata.shapes:
            elements[name] = sdata.shapes[name]
    attrs = {**sdata.attrs}
    if Keys.NAMESPACE in attrs:  # a model of the fine section has seen the truth; it shall not answer here
        attrs[Keys.NAMESPACE] = {name: value for name, value in attrs[Keys.NAMESPACE].items() if name != "model"}
    return SpatialData.init_from_elements(elements, attrs=attrs)


def _centroids(shapes: Any) -> np.ndarray:
    centroid = shapes.geometry.centroid
    return np.column_stack([centroid.x, centroid.y])


def _truth(adata: AnnData, region_key: str, instance_key: str) -> AnnData:
    """The fine table under its new name, marked so that nothing takes it for the measurement."""
    import pandas as pd
    from spatialdata.models import TableModel

    fine = adata.copy()
    fine.uns.pop("spatialdata_attrs", None)
    fine.uns.pop(Keys.NAMESPACE, None)
    fine.obs[region_key] = pd.Categorical([FINE] * fine.n_obs)
    fine = TableModel.parse(fine, region=FINE, region_key=region_key, instance_key=instance_key)
    mark_table(fine, "truth")
    return fine
