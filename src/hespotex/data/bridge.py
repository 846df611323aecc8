"""The one bridge from SpatialData and AnnData to :class:`~hespotex.data.Section`.

Each region of a table is a section of its own: no edge joins two of them and statistics are taken per region.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .._keys import Keys
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    HespotexWarning,
    MissingKeyError,
    ScaleError,
)
from .counts import check_counts, check_names, counts_of, library_size
from .geometry import shape_centres
from .lazy_counts import LazyCounts, as_lazy, is_lazy
from .parts import Observed, PartsView, parts_view
from .section import Level, Section, Targets
from .tables import AnnotatedTable, resolve_slides, resolve_table, row_positions, table_centres

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = [
    "PartsWanted",
    "Region",
    "SectionView",
    "as_list",
    "attributes",
    "embedding_entry",
    "find_embedding",
    "regions_of",
    "views_of",
]


@dataclass(frozen=True, eq=False)
class SectionView:
    """A section, the rows of the table it was made from, and where its parts came from."""

    section: Section
    table: AnnotatedTable
    rows: np.ndarray
    parts: PartsView | None = None


@dataclass(frozen=True)
class PartsWanted:
    """What a method below the spot reads of the parts; arguments of :func:`hespotex.data.parts.parts_view`."""

    level: Level
    needs: tuple[str, ...]
    key: str | None = None
    embedding_key: str | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """Rows of a table that are one section: what a section is before anything was embedded.

    Attributes
    ----------
    data, table, rows
        The object, its table, and the rows of it.
    name
        Unique name.
    patient
        Patient; the section's own name where none is known, which `patient_known` tells.
    """

    data: SpatialData | AnnData
    table: AnnotatedTable
    rows: np.ndarray
    name: str
    patient: str
    patient_known: bool


def as_list(
    data: SpatialData | AnnData | Sequence[SpatialData | AnnData], name: str = "sdatas"
) -> list[SpatialData | AnnData]:
    """One object or several as a list; an error for anything else, which calls the argument `name`."""
    from anndata import AnnData
    from spatialdata import SpatialData

    if isinstance(data, str | PurePath):
        raise DataTypeError(
            f"{name} is the path {str(data)!r}, not a SpatialData or AnnData: read it first, an image with hx.io.read_image(path, mpp=...), "
            "a store with spatialdata.read_zarr(path)"
        )
    if not isinstance(data, SpatialData | AnnData | Iterable):
        raise DataTypeError(f"{name} must be SpatialData or AnnData, or several of them, got {type(data).__name__}")
    items = [data] if isinstance(data, SpatialData | AnnData) else list(data)
    if not items:
        raise DataValueError(f"{name} is empty: give at least one SpatialData or AnnData")
    for item in items:
        if not isinstance(item, SpatialData | AnnData):
            raise DataTypeError(f"{name} must hold SpatialData or AnnData objects, found {type(item).__name__}")
    return items


def attributes(data: SpatialData | AnnData) -> Mapping[str, Any]:
    """What the readers noted about a section: its name and patient."""
    from anndata import AnnData

    return data.uns.get(Keys.NAMESPACE, {}) if isinstance(data, AnnData) else data.attrs.get(Keys.NAMESPACE, {})


def embedding_entry(adata: AnnData, embedding_key: str) -> Mapping[str, Any]:
    """Provenance of an embedding; empty if it was not made by :func:`hespotex.pp.embed`."""
    return adata.uns.get(Keys.NAMESPACE, {}).get(embedding_key, {})


def find_embedding(adata: AnnData, embedding_key: str | None = None, *, where: str = "the table") -> str:
    """The ``obsm`` key of the embedding that is meant.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If there is none, or several and none is named.
    """
    if embedding_key is not None:
        if embedding_key not in adata.obsm:
            raise MissingKeyError(
                f"embedding_key={embedding_key!r} is not in obsm of {where}, which holds {sorted(adata.obsm)}; "
                "make an embedding with hx.pp.embed(sdata, encoder)"
            )
        return embedding_key
    candidates = [key for key in adata.obsm if key.startswith("X_") and "encoder" in embedding_entry(adata, key)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise AmbiguousKeyError(f"{where} holds several embeddings {sorted(candidates)}; name one with embedding_key=")
    raise MissingKeyError(
        f"{where} holds no image embedding (obsm: {sorted(adata.obsm)}); make one with hx.pp.embed(sdata), "
        "or name your own with embedding_key="
    )


def views_of(
    sdatas: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    *,
    genes: Sequence[str] | None = None,
    unit: str = "log1p_cp10k",
    embedding_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    counts_layer: str | None = None,
    groups: Sequence[str] | str | None = None,
    min_counts: int = 0,
    with_edges: bool = False,
    parts: PartsWanted | None = None,
) -> list[SectionView]:
    """One view for each region of each object.

    Parameters
    ----------
    sdatas
        One or many objects.
    genes
        Panel of the targets; ``None`` for sections without targets.
    unit
        Unit of the targets.
    embedding_key, table_key, shapes_key, image_key
        Where to read; each may be left out where there is one candidate.
    counts_layer
        Layer of the raw counts, ``X`` by default.
    groups
        Patient of each object, or the ``obs`` column that names it; what the readers noted by default.
    min_counts
        Observations with fewer counts (over all genes) are left out, with a warning.
    with_edges
        Whether the neighbour graph is needed.
    parts
        What is read of nuclei or superpixels; the observations then need no embedding. Where a table annotates several
        regions, `shapes_key` says which of them the parts lie in.

    Raises
    ------
    MissingKeyError
        If an embedding, graph or parts is missing; the ``pp`` call that makes it is named.
    """
    views: list[SectionView] = []
    places: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of each table, not of each of its regions
    for region in regions_of(sdatas, table_key=table_key, shapes_key=shapes_key, groups=groups):
        table = region.table
        if parts is not None:
            if (
                view := _fine_view(region, parts, shapes_key, image_key, genes, unit, counts_layer, min_counts)
            ) is not None:
                views.append(view)
            continue
        key = find_embedding(table.adata, embedding_key, where=f"section {region.name!r}")
        if id(table) not in places:
            places = {id(table): _coordinates(region.data, table, image_key, key)}
        coordinates, pixels = places[id(table)]
        views.append(
            _view(
                table,
                region.rows,
                region.name,
                region.patient,
                coordinates,
                pixels,
                genes=genes,
                unit=unit,
                embedding_key=key,
                counts_layer=counts_layer,
                min_counts=min_counts,
                with_edges=with_edges,
            )
        )
    return views


def regions_of(
    sdatas: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    *,
    table_key: str | None = None,
    shapes_key: str | None = None,
    groups: Sequence[str] | str | None = None,
) -> list[Region]:
    """Every region of every object with its name and patient; neither embedding nor image is needed.

    Arguments as in :func:`views_of`.

    Raises
    ------
    CountsError
        If a gene, or a spot of one region, is named twice.
    """
    items = as_list(sdatas)
    if groups is not None and not isinstance(groups, str) and len(groups) != len(items):
        raise DataValueError(f"groups names {len(groups)} patients for {len(items)} sections")
    found: list[Region] = []
    names: set[str] = set()
    for position, data in enumerate(items):
        table = resolve_table(data, table_key=table_key, shapes_key=shapes_key)
        noted = attributes(data)
        base = str(noted.get("name") or f"section{position}")
        check_names(table.adata.var_names, f"section {base!r}: gene names")
        codes = np.unique(table.region)
        for code in codes:
            rows = np.flatnonzero(table.region == code)
            name = base if len(codes) == 1 else f"{base}:{_region_name(table, int(code))}"
            while name in names:
                name += "'"
            names.add(name)
            # Within a section: another one may well use the same barcodes.
            check_names(table.adata.obs_names[rows], f"section {name!r}: names of spots")
            patient = _group(groups, position, table.adata, rows, noted, name)
            found.append(Region(data, table, rows, name, patient or name, patient_known=patient is not None))
    return found


def _region_name(table: AnnotatedTable, code: int) -> str:
    return table.regions[code] if table.regions else str(code)


def _group(
    groups: Sequence[str] | str | None,
    position: int,
    adata: AnnData,
    rows: np.ndarray,
    noted: Mapping[str, Any],
    name: str,
) -> str | None:
    column = groups if isinstance(groups, str) else Keys.PATIENT
    if groups is not None and not isinstance(groups, str):
        return str(groups[position])
    if column in adata.obs:
        values = adata.obs[column].iloc[rows].astype(str).unique()
        if len(values) > 1:
            raise DataValueError(
                f"obs[{column!r}] names {len(values)} patients within section {name!r}: {list(values)}"
            )
        return str(values[0])
    if isinstance(groups, str):
        raise MissingKeyError(f"groups={groups!r} is not a column of obs, which has {list(adata.obs)}")
    return str(noted["patient"]) if noted.get("patient") else None


def _coordinates(
    data: SpatialData | AnnData, table: AnnotatedTable, image_key: str | None, embedding_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Centres in µm and in pixels of the image."""
    from anndata import AnnData

    if not isinstance(data, AnnData):
        slides = resolve_slides(data, table, image_key)
        return table_centres(data, table, slides, microns=True), table_centres(data, table, slides)
    if Keys.SPATIAL not in data.obsm:
        raise MissingKeyError(f"the AnnData has no obsm[{Keys.SPATIAL!r}] with the positions of its observations")
    pixels = np.asarray(data.obsm[Keys.SPATIAL], dtype=np.float64)[:, :2]
    mpp = embedding_entry(data, embedding_key).get("slide_mpp")
    if mpp is None:
        raise ScaleError(
            f"the scale of obsm[{Keys.SPATIAL!r}] is unknown: the embedding was not made by hx.pp.embed. "
            f"Note it with adata.uns['hespotex'] = {{{embedding_key!r}: {{'slide_mpp': <µm per unit>}}}}"
        )
    return pixels * float(mpp), pixels


def _view(
    table: AnnotatedTable,
    rows: np.ndarray,
    name: str,
    group: str,
    coordinates: np.ndarray,
    pixels: np.ndarray,
    *,
    genes: Sequence[str] | None,
    unit: str,
    embedding_key: str,
    counts_layer: str | None,
    min_counts: int,
    with_edges: bool,
) -> SectionView:
    adata = table.adata
    rows, targets = _targets(adata, rows, name, genes, unit, counts_layer, min_counts)
    everything = len(rows) == adata.n_obs
    features = adata.obsm[embedding_key]
    extras = {
        key: adata.obs[key].to_numpy(dtype=np.float64)[rows]
        for key in (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW)
        if key in adata.obs
    }
    section = Section(
        name=name,
        ids=adata.obs_names.to_numpy()[rows],
        features=features if everything else features[rows],
        coordinates=coordinates[rows],
        edges=_edges(adata, rows, name) if with_edges else None,
        targets=targets,
        group=group,
        extras={"pixel": pixels[rows], **extras},
    )
    return SectionView(section, table, rows)


def _targets(
    adata: AnnData,
    rows: np.ndarray,
    name: str,
    genes: Sequence[str] | None,
    unit: str,
    counts_layer: str | None,
    min_counts: int,
) -> tuple[np.ndarray, Targets | None]:
    """Measured expression, and the rows that have enough of it; without `genes` all rows and no targets."""
    if genes is None:
        return rows, None
    counts, total = _counts(adata, rows, genes, counts_layer, name)
    enough = total >= min_counts
    if not enough.any():
        raise DataValueError(
            f"section {name!r}: none of its {len(rows)} observations has min_counts={min_counts} counts or more; leave "
            "the section out, or lower min_counts"
        )
    if not enough.all():
        warnings.warn(
            f"section {name!r}: {int((~enough).sum())} of {len(rows)} observations have fewer than {min_counts} "
            "counts and are left out",
            HespotexWarning,
            stacklevel=4,
        )
        rows, total = rows[enough], total[enough]
        counts = counts.take(rows=enough) if isinstance(counts, LazyCounts) else counts[enough]
    return rows, Targets(counts, total, tuple(genes), unit)


def _fine_view(
    region: Region,
    wanted: PartsWanted,
    shapes_key: str | None,
    image_key: str | None,
    genes: Sequence[str] | None,
    unit: str,
    counts_layer: str | None,
    min_counts: int,
) -> SectionView | None:
    """A section with parts below its spots; ``None`` for a region of the table that `shapes_key` does not mean."""
    table, sdata = region.table, region.data
    if not table.regions:
        raise DataTypeError(
            f"section {region.name!r} is an AnnData; a method that predicts below the spot needs the SpatialData that holds "
            "its nuclei or superpixels"
        )
    own = table.regions[int(table.region[region.rows[0]])]
    if shapes_key is not None and own != shapes_key:
        return None
    if len(table.regions) > 1 and shapes_key is None:
        raise AmbiguousKeyError(
            f"table {table.key!r} annotates {list(table.regions)}; say with shapes_key= in which of them to look at the parts"
        )
    slide = resolve_slides(sdata, table, image_key)[own]
    rows, targets = _targets(table.adata, region.rows, region.name, genes, unit, counts_layer, min_counts)
    of_table, shape_of_row = row_positions(sdata, table, own)
    positions = np.empty(table.adata.n_obs, dtype=np.int64)
    positions[of_table] = shape_of_row
    view = parts_view(
        sdata,
        slide,
        Observed(own, positions[rows]),
        level=wanted.level,
        needs=wanted.needs,
        parts_key=wanted.key,
        embedding_key=wanted.embedding_key,
    )
    pixels = shape_centres(sdata, own, slide)[positions[rows]]
    section = Section(
        name=region.name,
        ids=table.adata.obs_names.to_numpy()[rows],
        features=np.zeros((len(rows), 0), dtype=np.float32),
        coordinates=slide.microns(pixels),
        targets=targets,
        group=region.patient,
        parts=view.parts,
        extras={"pixel": pixels},
    )
    return SectionView(section, table, rows, view)


def _edges(adata: AnnData, rows: np.ndarray, name: str) -> sparse.csr_array:
    if Keys.CONNECTIVITIES not in adata.obsp:
        raise MissingKeyError(
            f"section {name!r} has no neighbour graph obsp[{Keys.CONNECTIVITIES!r}]; make it with hx.pp.spatial_graph(sdata)"
        )
    graph = sparse.csr_array(adata.obsp[Keys.CONNECTIVITIES])
    return graph if len(rows) == adata.n_obs else sparse.csr_array(graph[rows][:, rows])


def _counts(
    adata: AnnData, rows: np.ndarray, genes: Sequence[str], counts_layer: str | None, name: str
) -> tuple[sparse.csr_array | LazyCounts, np.ndarray]:
    """Counts of the panel, CSR (n, G) or yet on disk, and the total over all genes, (n,)."""
    import pandas as pd

    source = counts_of(adata, counts_layer, f"section {name!r}", lazy=True)
    check_counts(source, f"section {name!r}")
    columns = adata.var_names.get_indexer(pd.Index(list(genes)))
    if (columns < 0).any():
        missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
        raise MissingKeyError(f"section {name!r} lacks {len(missing)} of {len(genes)} genes: {', '.join(missing[:10])}")
    total = library_size(source)[rows]
    if is_lazy(source):
        lazy = as_lazy(source, f"section {name!r}")
        every_gene = np.array_equal(columns, np.arange(adata.n_vars))
        return lazy.take(
            rows=None if len(rows) == adata.n_obs else rows, columns=None if every_gene else columns
        ), total
    panel = sparse.csr_array(source[:, columns])
    return panel[rows], total
