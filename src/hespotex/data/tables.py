"""The table a function works on, and the shapes its rows stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._keys import Keys
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, GeometryError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from .geometry import Slide

__all__ = [
    "AnnotatedTable",
    "is_derived",
    "mark_table",
    "resolve_shapes_key",
    "resolve_slides",
    "resolve_table",
    "row_positions",
    "table_centres",
    "table_role",
]

# Which tables are meant when none is named: the measurement; else an embedding of tiles; never the rest.
_RANKS = {"measured": 0, "embedding": 1, "nuclei": 2, "truth": 2, "prediction": 3}
_LAZYSLIDE = {"region_key": "library_id", "instance_key": "tile_id"}  # how it connects its tables of features


@dataclass(frozen=True, eq=False)
class AnnotatedTable:
    """A table and what its rows annotate.

    Attributes
    ----------
    adata
        The table itself, not a copy.
    key
        Its name in ``sdata.tables``; ``None`` for a bare AnnData.
    regions
        Names of the shapes that rows annotate; empty for a bare AnnData.
    region
        Index into :attr:`regions` of each row, (n,) int.
    instances
        Id of each row in its shapes, (n,); the names of the observations for a bare AnnData.
    """

    adata: AnnData
    key: str | None
    regions: tuple[str, ...]
    region: np.ndarray
    instances: np.ndarray

    def rows_of(self, shapes_key: str) -> np.ndarray:
        """Positions of the rows that annotate `shapes_key`."""
        return np.flatnonzero(self.region == self.regions.index(shapes_key))


def resolve_table(
    data: SpatialData | AnnData, *, table_key: str | None = None, shapes_key: str | None = None
) -> AnnotatedTable:
    """The table of `data` that is meant.

    Parameters
    ----------
    data
        A SpatialData, or an AnnData, which is then the table.
    table_key
        Name in ``sdata.tables``; may be left out where one table annotates shapes (or `shapes_key`). Tables of
        nuclei and predictions, which hespotex writes itself, are only taken when named.
    shapes_key
        Shapes that the table has to annotate.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If no table fits, or several do.
    GeometryError
        If rows annotate shapes that are not there.
    DataValueError
        If the table has no rows.
    """
    from anndata import AnnData

    if isinstance(data, AnnData):
        if table_key is not None or shapes_key is not None:
            raise DataValueError("table_key= and shapes_key= name elements of a SpatialData; data is an AnnData")
        _check_rows(data, "the AnnData")
        return _of_anndata(data)
    if not hasattr(data, "tables"):
        raise DataTypeError(f"data must be a SpatialData or an AnnData, got {type(data).__name__}")
    key = _table_key(data, table_key, shapes_key)
    return _annotated(data, key, shapes_key)


def resolve_shapes_key(sdata: SpatialData, shapes_key: str | None = None, table_key: str | None = None) -> str:
    """The shapes that are meant: those named, those of the one table, or ``"tiles"`` of a slide without a table.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If nothing fits, or several do.
    """
    if shapes_key is not None:
        if shapes_key not in sdata.shapes:
            raise MissingKeyError(f"shapes_key={shapes_key!r} is not among the shapes {list(sdata.shapes)}")
        return shapes_key
    if table_key is not None or _candidates(sdata, None):
        table = resolve_table(sdata, table_key=table_key)
        if len(table.regions) > 1:
            raise AmbiguousKeyError(
                f"table {table.key!r} annotates {list(table.regions)}; name one with shapes_key=, for instance "
                f"shapes_key={table.regions[0]!r}"
            )
        return table.regions[0]
    if Keys.TILES in sdata.shapes:
        return Keys.TILES
    raise MissingKeyError(
        f"no table annotates shapes and there are no {Keys.TILES!r}; the shapes are {list(sdata.shapes)}. "
        f"Name one with shapes_key=, or lay tiles with hx.pp.make_tiles(sdata)"
    )


def row_positions(sdata: SpatialData, table: AnnotatedTable, shapes_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that annotate `shapes_key`, and the position of the shape that each one stands for.

    Raises
    ------
    GeometryError
        If a row has no shape, or an id occurs twice.
    """
    shapes = sdata.shapes[shapes_key].index
    rows = table.rows_of(shapes_key)
    instances = table.instances[rows]
    if not shapes.is_unique:
        raise GeometryError(f"ids of shapes {shapes_key!r} occur twice, such as {shapes[shapes.duplicated()][0]!r}")
    unique, count = np.unique(instances, return_counts=True)
    if len(unique) < len(instances):
        raise GeometryError(f"table {table.key!r}: instance {unique[count > 1][0]!r} of {shapes_key!r} occurs twice")
    positions = shapes.get_indexer(instances)
    missing = positions < 0
    if missing.any():
        example = instances[missing][0]
        kinds = {type(example).__name__, type(shapes[0]).__name__} if len(shapes) else set()
        types = (
            f" The table's ids are {type(example).__name__}, those of the shapes {type(shapes[0]).__name__}: give both "
            f"one type, for instance sdata[{shapes_key!r}].index = sdata[{shapes_key!r}].index.astype(str)"
            if len(kinds) == 2 and str(example) in {str(name) for name in shapes}
            else ""
        )
        raise GeometryError(
            f"{int(missing.sum())} of {len(rows)} rows of table {table.key!r} have no shape in {shapes_key!r}, "
            f"the first is {example!r}.{types}"
        )
    return rows, positions


def table_centres(
    sdata: SpatialData, table: AnnotatedTable, slide: Slide | Mapping[str, Slide], *, microns: bool = False
) -> np.ndarray:
    """Centres of the shapes that the rows of `table` stand for, (n, 2), in row order.

    Parameters
    ----------
    sdata
        Object that holds the shapes.
    table
        As :func:`resolve_table` gives it.
    slide
        The slide, or one for each of the table's regions.
    microns
        Whether to return µm in place of level-0 pixels.
    """
    from .geometry import shape_centres

    centres = np.full((table.adata.n_obs, 2), np.nan)
    for name in table.regions:
        own = slide[name] if isinstance(slide, Mapping) else slide
        rows, positions = row_positions(sdata, table, name)
        pixels = shape_centres(sdata, name, own)[positions]
        centres[rows] = own.microns(pixels) if microns else pixels
    return centres


def resolve_slides(
    sdata: SpatialData, table: AnnotatedTable, image_key: str | Mapping[str, str] | None = None
) -> dict[str, Slide]:
    """The slide under each of the table's regions.

    Parameters
    ----------
    sdata
        Object that holds images and shapes.
    table
        As :func:`resolve_table` gives it.
    image_key
        The image, or one for each region; by default the only one that shares a coordinate system with the region.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If a region lies on no image, or on several.
    """
    from .geometry import find_image_key, resolve_slide

    if isinstance(image_key, Mapping) and (absent := [name for name in table.regions if name not in image_key]):
        raise MissingKeyError(f"image_key= names no image for {absent}, which the table annotates, too")
    slides: dict[str, Slide] = {}
    for name in table.regions:
        own = image_key[name] if isinstance(image_key, Mapping) else image_key
        slides[name] = resolve_slide(sdata, image_key=find_image_key(sdata, own, shapes_key=name))
    return slides


def _of_anndata(adata: AnnData) -> AnnotatedTable:
    """A bare AnnData; what it annotated when it was cut from a SpatialData still tells its regions apart."""
    from spatialdata.models import get_table_keys

    region = np.zeros(adata.n_obs, dtype=np.int64)
    if "spatialdata_attrs" in adata.uns:
        _, region_key, _ = get_table_keys(adata)
        if region_key in adata.obs:
            region = np.unique(adata.obs[region_key].astype(str), return_inverse=True)[1]
    return AnnotatedTable(adata=adata, key=None, regions=(), region=region, instances=adata.obs_names.to_numpy())


def _annotated(sdata: SpatialData, key: str, shapes_key: str | None) -> AnnotatedTable:
    from spatialdata.models import get_table_keys

    adata = sdata.tables[key]
    _check_rows(adata, f"table {key!r}")
    if "spatialdata_attrs" not in adata.uns:
        raise MissingKeyError(
            f"table {key!r} annotates no shapes; connect it with "
            f"spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)"
        )
    _, region_key, instance_key = get_table_keys(adata)
    named = adata.obs[region_key].astype(str).to_numpy()
    # Not what the table declares but what its rows say: a filtered table may have lost a region.
    regions = tuple(dict.fromkeys(named))
    if absent := [name for name in regions if name not in sdata.shapes]:
        raise GeometryError(
            f"table {key!r} annotates {absent}, which are not among the shapes {list(sdata.shapes)}"
            + (
                " (labels cannot be used; convert them with spatialdata.to_circles)"
                if set(absent) <= set(sdata.labels)
                else ""
            )
        )
    if shapes_key is not None and shapes_key not in regions:
        raise MissingKeyError(f"table {key!r} annotates {list(regions)}, not shapes_key={shapes_key!r}")
    index = {name: position for position, name in enumerate(regions)}
    return AnnotatedTable(
        adata=adata,
        key=key,
        regions=regions,
        region=np.array([index[name] for name in named], dtype=np.int64),
        instances=adata.obs[instance_key].to_numpy(),
    )


def _table_key(sdata: SpatialData, table_key: str | None, shapes_key: str | None) -> str:
    there = list(sdata.tables)
    if table_key is not None:
        if table_key not in there:
            raise MissingKeyError(f"table_key={table_key!r} is not among the tables {there}")
        return table_key
    candidates = _candidates(sdata, shapes_key)
    if len(candidates) == 1:
        return candidates[0]
    of = f" that annotates {shapes_key!r}" if shapes_key else " that annotates shapes"
    if not candidates:
        raise MissingKeyError(f"there is no table{of}; the tables are {there}")
    raise AmbiguousKeyError(f"there are several tables{of}, name one with table_key=: {candidates}")


def _candidates(sdata: SpatialData, shapes_key: str | None) -> list[str]:
    """Tables that may be meant: measured ones first, then embeddings of tiles; others only if asked for by shapes."""
    from spatialdata.models import get_table_keys

    ranked: dict[int, list[str]] = {}
    for key, adata in sdata.tables.items():
        if "spatialdata_attrs" not in adata.uns:
            continue
        regions, _, _ = get_table_keys(adata)
        regions = {regions} if isinstance(regions, str) else set(regions)
        wanted = regions & set(sdata.shapes) if shapes_key is None else regions & {shapes_key}
        rank = _RANKS[table_role(key, adata)]
        if wanted and (shapes_key is not None or rank < _RANKS["nuclei"]):
            ranked.setdefault(rank, []).append(key)
    found = ranked[min(ranked)] if ranked else []
    if len(found) > 1 and min(ranked) == _RANKS["embedding"]:
        # Of the tables of features that LazySlide made, one for each network, none is more meant than another.
        return [key for key in found if Keys.TABLE_ROLE in sdata.tables[key].uns.get(Keys.NAMESPACE, {})]
    return found


def table_role(key: str, adata: AnnData) -> str:
    """``"measured"``, or what hespotex made the table for: ``"embedding"``, ``"nuclei"``, ``"prediction"`` or ``"truth"``.

    LazySlide's features of tiles are an embedding, too.
    """
    role = adata.uns.get(Keys.NAMESPACE, {}).get(Keys.TABLE_ROLE)
    if role in _RANKS:
        return str(role)
    return "nuclei" if key == Keys.NUCLEI_TABLE else "embedding" if _is_of_lazyslide(adata) else "measured"


def is_derived(adata: AnnData) -> bool:
    """Whether the table was made from an image: by hespotex, or LazySlide's features of tiles."""
    return Keys.TABLE_ROLE in adata.uns.get(Keys.NAMESPACE, {}) or _is_of_lazyslide(adata)


def _is_of_lazyslide(adata: AnnData) -> bool:
    attrs = adata.uns.get("spatialdata_attrs", {})
    return all(attrs.get(key) == value for key, value in _LAZYSLIDE.items())


def mark_table(adata: AnnData, role: Literal["embedding", "nuclei", "prediction", "truth"]) -> None:
    """Note in a table of our making what it is for, so that it is not taken for the measurement."""
    adata.uns.setdefault(Keys.NAMESPACE, {})[Keys.TABLE_ROLE] = role


def _check_rows(adata: AnnData, what: str) -> None:
    if adata.n_obs == 0:
        raise DataValueError(f"{what} has no observations")
