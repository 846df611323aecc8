"""Areas of a section: core and edge of a tumour, niches; and how measured expression differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .._keys import Keys, check_key
from .._logging import logger
from .._settings import settings
from ..annotation.clusters import kmeans
from ..annotation.core_edge import core_edge
from ..annotation.tls import tls_score as score_of_scores
from ..data.counts import check_counts, counts_of, library_size
from ..data.geometry import Slide, find_image_key, resolve_slide, shape_centres, shape_geometries, shape_radii
from ..data.parts import Observed, share_matrix
from ..data.provenance import read_record, record
from ..data.tables import AnnotatedTable, is_derived, resolve_table, row_positions
from ..data.units import normalize
from ..errors import DataTypeError, DataValueError, MissingKeyError
from ._annotate import annotate, grid_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["rank_regions", "regions", "tls_score"]

OUTSIDE, EDGE, CORE = "outside", "edge", "core"
_MIN_SPOTS = 3
_GENES_AT_ONCE = 1000


def regions(
    sdata: SpatialData,
    labels: str,
    target: str | Sequence[str] | None = None,
    *,
    table_key: str,
    depth_um: float = 100.0,
    min_cells: int = 20,
    n_niches: int | None = None,
    radius_um: float = 60.0,
    image_key: str | None = None,
    spots_table_key: str | None = None,
    key_added: str | None = None,
    seed: int | None = None,
) -> None:
    """Divide labelled cells into core and edge of a tissue, or into niches of like surroundings.

    The measured spots get the region that most of what they cover lies in, so that :func:`rank_regions` can compare
    regions by what was measured.

    Parameters
    ----------
    sdata
        Object that holds the labelled table.
    labels
        Column of ``obs`` with labels, such as :func:`hespotex.tl.annotate` writes.
    target
        Labels that make up the tissue, such as ``"tumour"``: every connected piece of it is divided into an edge and a
        core. The cells must be superpixels.
    table_key
        Table that holds `labels`.
    depth_um
        Width of the edge in µm, from the border of the tissue inwards.
    min_cells
        Pieces of fewer superpixels count as outside.
    n_niches
        Number of niches, in place of `target`: clusters of the composition of labels around each cell.
    radius_um
        Reach of the surroundings for niches.
    image_key
        Image that cells and spots lie on; may be left out where there is only one.
    spots_table_key
        Table of the spots; may be left out where there is one. Without spots only the cells are labelled. Spots on
        other slides have no region.
    key_added
        Name of the result; ``"<labels>_region"`` or ``"<labels>_niche"`` by default.
    seed
        Seed of the clustering.

    Returns
    -------
    ``None``; written to the table of the cells and, where there is one, to that of the spots:

    ``obs["<key_added>"]`` : categorical
        ``"core"``, ``"edge"``, ``"outside"``, or the number of the niche, 0 the largest. Spots have none where no
        region has more than half of the cells that they cover, or where less than half of them lies on superpixels.
    ``obs["<key_added>_component"]``, ``obs["<key_added>_depth_um"]``
        Of cells, with `target`: connected piece (0 the largest, −1 outside) and distance from the border.

    Raises
    ------
    MissingKeyError
        If the column is not there.
    DataValueError
        If neither or both of `target` and `n_niches` are given, or no cell has a label of `target`.

    References
    ----------
    Core and edge follow TESLA :cite:p:`tesla2023`; its shrunken contour is replaced by a width in µm.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1200, n_genes=40)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "interpolate")
    >>> hx.tl.annotate(sdata, {"tumour": ["TUMOUR1"], "stroma": ["FIBROBLAST1"]})
    >>> hx.tl.regions(sdata, "interpolate_type", "tumour", table_key="interpolate_superpixels")
    >>> "core" in set(sdata["interpolate_superpixels"].obs["interpolate_type_region"])
    True
    """
    import pandas as pd

    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the cells")
    if (target is None) == (n_niches is None):
        raise DataValueError("give either target= (labels of a tissue, for core and edge) or n_niches=")
    table = resolve_table(sdata, table_key=table_key)
    adata = table.adata
    if labels not in adata.obs:
        raise MissingKeyError(
            f"labels={labels!r} is not a column of obs of table {table_key!r}, which has {list(adata.obs)}; make it with "
            "hx.tl.annotate(sdata, ...)"
        )
    key_added = key_added or f"{labels}_{'region' if target is not None else 'niche'}"
    check_key(key_added)
    _check_free(adata, key_added, ("component", "depth_um") if target is not None else ())
    names = adata.obs[labels].astype(object).where(adata.obs[labels].notna(), "").astype(str).to_numpy()
    params: dict[str, object]
    if target is not None:
        wanted = [target] if isinstance(target, str) else list(target)
        found, component, depth = _core_edge(sdata, table, names, wanted, depth_um, min_cells)
        categories = [CORE, EDGE, OUTSIDE]
        params = {"target": wanted, "depth_um": depth_um, "min_cells": min_cells}
        extra = {"component": component, "depth_um": depth}
    else:
        assert n_niches is not None
        niche = _niches(sdata, table, names, n_niches, radius_um, image_key, settings.seed if seed is None else seed)
        found = np.where(niche >= 0, niche.astype(str), "")
        categories = [str(number) for number in range(int(niche.max()) + 1)]
        params, extra = {"n_niches": n_niches, "radius_um": radius_um}, {}
    spots = _spots(sdata, spots_table_key)
    if spots is not None:
        _check_free(spots.adata, key_added)
        code = pd.Index(categories).get_indexer(pd.Index(found, dtype=object))
        of_spots = _of_spots(sdata, spots, table, code, categories, image_key)
    column = pd.Series(found, dtype=object, index=adata.obs_names)
    adata.obs[key_added] = pd.Categorical(column.where(column != "", None), categories=pd.Index(categories))
    for what, values in extra.items():
        adata.obs[Keys.derived(key_added, what)] = values
    record(adata, key_added, kind="regions", labels=labels, params=params, created_by="hespotex.tl.regions")
    if spots is not None:
        spots.adata.obs[key_added] = of_spots
        record(spots.adata, key_added, kind="regions", labels=labels, params=params, created_by="hespotex.tl.regions")
    logger.info("regions: wrote obs[%r] of %r%s", key_added, table_key, "" if spots is None else f" and {spots.key!r}")


def rank_regions(
    sdata: SpatialData | AnnData,
    region: str,
    *,
    table_key: str | None = None,
    counts_layer: str | None = None,
    groups: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Genes that differ between regions, by the spots that were measured and nothing else.

    Predictions are not tested: thousands of superpixels made from a few hundred spots would give any p-value one likes.
    Spots are compared by Wilcoxon's rank-sum test, each region against the others given, with Benjamini and Hochberg's
    correction. Neighbouring spots are alike, so that p-values are still too small: they rank genes.

    Parameters
    ----------
    sdata
        Object whose spots have the column `region`.
    region
        Column of ``obs`` that :func:`regions` (or any annotation) wrote to the table of the spots.
    table_key
        The table; may be left out where there is one.
    counts_layer
        Raw counts; ``X`` by default.
    groups
        Regions to compare, such as ``["core", "edge"]``; all by default. Regions of fewer than three spots are left out.

    Returns
    -------
    A row per region and gene: ``region``, ``gene``, ``n_in``, ``n_out`` (spots), ``mean_in``, ``mean_out`` (log1p of counts
    per 10,000), ``log2_fold_change`` (of mean counts per 10,000), ``p_value``, ``p_adjusted``; sorted by fold change.

    Raises
    ------
    MissingKeyError
        If the column, or a region of `groups` in it, is not there.
    DataValueError
        If fewer than two regions have three spots, or the table is no measurement.
    CountsError
        If the table holds no raw counts.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1600, n_genes=40)
    >>> sdata["table"].obs["half"] = ["left" if x < 800 else "right" for x in sdata["table"].obsm["spatial"][:, 0]]
    >>> list(hx.tl.rank_regions(sdata, "half").columns)[:2]
    ['region', 'gene']
    """
    import pandas as pd
    from scipy.stats import false_discovery_control, mannwhitneyu

    table = resolve_table(sdata, table_key=table_key)
    adata = table.adata
    if is_derived(adata):
        raise DataValueError(
            f"table {table.key!r} holds predictions, which are not tested: its rows are made from far fewer measured spots. Name "
            "the table of the spots"
        )
    if region not in adata.obs:
        raise MissingKeyError(f"region={region!r} is not a column of obs, which has {list(adata.obs)}")
    counts = counts_of(adata, counts_layer, "the table of the spots")
    check_counts(counts, "the table of the spots")
    total = library_size(counts)
    named = adata.obs[region].astype(object).where(adata.obs[region].notna(), "").astype(str).to_numpy()
    there = sorted(set(named) - {""})
    chosen = there if groups is None else [groups] if isinstance(groups, str) else list(map(str, groups))
    if absent := [name for name in chosen if name not in there]:
        raise MissingKeyError(f"groups={absent} are not in obs[{region!r}], which has {there}")
    kept = np.isin(named, chosen) & (total > 0)
    enough = [name for name in chosen if (named[kept] == name).sum() >= _MIN_SPOTS]
    if len(enough) < 2:
        raise DataValueError(
            f"obs[{region!r}]: {len(enough)} of {chosen} have {_MIN_SPOTS} spots or more; two are needed to compare"
        )
    kept &= np.isin(named, enough)
    counts, total, named = counts[np.flatnonzero(kept)], total[kept], named[kept]
    rows = []
    for name in enough:
        found = []
        for start in range(0, adata.n_vars, _GENES_AT_ONCE):  # ranks of all genes at once would take too much memory
            values = normalize(counts[:, start : start + _GENES_AT_ONCE], total)
            inside, outside = values[named == name], values[named != name]
            p = mannwhitneyu(inside, outside, axis=0).pvalue
            p = np.where(np.isfinite(p), p, 1.0)  # a gene that is the same everywhere differs nowhere
            high, low = np.expm1(inside).mean(axis=0), np.expm1(outside).mean(axis=0)
            change = np.log2((high + 1e-2) / (low + 1e-2))
            found.append(np.stack([inside.mean(axis=0), outside.mean(axis=0), change, p]))
        mean_in, mean_out, change, p = np.concatenate(found, axis=1)
        n_in = int((named == name).sum())
        rows.append(
            pd.DataFrame(
                {
                    "region": name,
                    "gene": adata.var_names.astype(str),
                    "n_in": n_in,
                    "n_out": len(named) - n_in,
                    "mean_in": mean_in,
                    "mean_out": mean_out,
                    "log2_fold_change": change,
                    "p_value": p,
                    "p_adjusted": false_discovery_control(p),
                }
            ).sort_values("log2_fold_change", ascending=False)
        )
    return pd.concat(rows, ignore_index=True)


def tls_score(
    sdata: SpatialData,
    markers: Mapping[str, Sequence[str]],
    *,
    key: str | None = None,
    table_key: str | None = None,
    num_required: int = 3,
    key_added: str = "tls_score",
    seed: int | None = None,
) -> None:
    """Score tertiary lymphoid structures: where areas of several kinds of cells coincide.

    Parameters
    ----------
    sdata
        Object with a prediction at superpixels, and their colours.
    markers
        Markers of each kind of cells: B cells, CD4+ T cells, dendritic cells, and CXCL13, as published.
    key, table_key
        The prediction; may be left out where there is only one.
    num_required
        How many of the kinds must coincide.
    key_added
        Name of the score.
    seed
        Seed of the self-labelling.

    Returns
    -------
    ``None``; ``obs["<key_added>"]`` of the superpixels is written: 0, or 0.5 to 1.

    Raises
    ------
    DataValueError
        If fewer kinds than `num_required` are given, or a kind has no marker among the genes.

    References
    ----------
    TESLA :cite:p:`tesla2023`.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=40)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "tesla")
    >>> kinds = {"B": ["B_CELL1"], "T": ["T_CELL1"], "DC": ["INTERFERON1"]}
    >>> hx.tl.tls_score(sdata, kinds, num_required=2)
    >>> float(sdata["tesla_superpixels"].obs["tls_score"].max())
    1.0
    """
    from ..data.stored import find_prediction

    check_key(key_added)
    if not isinstance(markers, Mapping):
        raise DataTypeError(f"markers must map each kind of cells to its genes, got {type(markers).__name__}")
    if not 1 <= num_required <= len(markers):
        raise DataValueError(f"num_required={num_required!r} must be between 1 and {len(markers)}, the kinds given")
    adata, name, key = find_prediction(sdata, key, table_key)
    _check_free(adata, key_added)
    found = annotate(
        sdata, markers, method="self_labelling", key=key, table_key=name, seed=seed, key_added="_kinds", copy=True
    )
    assert found is not None
    adata.obs[key_added] = score_of_scores([found[kind].to_numpy() for kind in markers], num_required)
    record(
        adata,
        key_added,
        kind="score",
        prediction=key,
        params={"num_required": num_required},
        created_by="hespotex.tl.tls_score",
    )
    logger.info("tls_score: wrote obs[%r] of table %r", key_added, name)


def _core_edge(
    sdata: SpatialData, table: AnnotatedTable, names: np.ndarray, wanted: Sequence[str], depth_um: float, min_cells: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Region, piece and depth of each cell."""
    grid = grid_of(sdata, table.key)
    if grid is None:
        raise DataValueError(
            f"core and edge are areas: table {table.key!r} must be of superpixels (hx.pp.superpixels), not of single cells"
        )
    is_target = np.isin(names, list(wanted))
    if not is_target.any():
        raise DataValueError(
            f"target={list(wanted)}: no cell has such a label; the labels are {sorted(set(names) - {''})}"
        )
    size_um = float(sdata.shapes[table.regions[0]][Keys.SIZE_UM].iloc[0])
    divided = core_edge(grid, is_target, size_um, depth_um=depth_um, min_cells=min_cells)
    region = np.where(divided.component < 0, OUTSIDE, np.where(divided.is_core, CORE, EDGE))
    return region, divided.component, divided.depth_um


def _niches(
    sdata: SpatialData,
    table: AnnotatedTable,
    names: np.ndarray,
    n_niches: int,
    radius_um: float,
    image_key: str | None,
    seed: int,
) -> np.ndarray:
    """Cluster of each cell by the composition of labels within reach; −1 for cells without a label."""
    from scipy.spatial import cKDTree

    if not radius_um > 0:
        raise DataValueError(f"radius_um={radius_um!r} must be positive")
    shapes_key = table.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=shapes_key))
    rows, positions = row_positions(sdata, table, shapes_key)
    xy = np.empty((table.adata.n_obs, 2))
    xy[rows] = slide.microns(shape_centres(sdata, shapes_key, slide)[positions])
    known = np.flatnonzero(names != "")
    kinds, code = np.unique(names[known], return_inverse=True)
    one_hot = sparse.csr_array((np.ones(len(known)), (np.arange(len(known)), code)), shape=(len(known), len(kinds)))
    tree = cKDTree(xy[known])
    composition = np.empty((len(known), len(kinds)))
    for start in range(0, len(known), 4096):  # the neighbours of all cells at once would take too much memory
        some = slice(start, start + 4096)
        near = tree.query_ball_point(xy[known[some]], radius_um)
        indptr = np.concatenate([[0], np.cumsum([len(each) for each in near])])
        columns = np.concatenate([np.asarray(each, dtype=np.int64) for each in near])
        around = sparse.csr_array((np.ones(len(columns)), columns, indptr), shape=(len(near), len(known)))
        counts = (around @ one_hot).toarray()
        composition[some] = counts / counts.sum(axis=1, keepdims=True)
    niche = np.full(len(names), -1)
    niche[known] = kmeans(composition, n_niches, seed=seed)
    return niche


def _spots(sdata: SpatialData, table_key: str | None) -> AnnotatedTable | None:
    """The measured table, if there is one."""
    try:
        table = resolve_table(sdata, table_key=table_key)
    except MissingKeyError:
        if table_key is not None:
            raise
        return None
    return None if is_derived(table.adata) else table


def _of_spots(
    sdata: SpatialData,
    spots: AnnotatedTable,
    table: AnnotatedTable,
    code: np.ndarray,
    categories: Sequence[str],
    image_key: str | None,
) -> Any:
    """The region that most of what a spot covers lies in."""
    import pandas as pd

    fine = table.regions[0]
    shapes = sdata.shapes[fine]
    size_um = float(shapes[Keys.SIZE_UM].iloc[0]) if Keys.SIZE_UM in shapes else None
    rows, positions = row_positions(sdata, table, fine)
    region = np.full(spots.adata.n_obs, -1)
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=fine))
    pixels = shape_centres(sdata, fine, slide)[positions]
    for own in spots.regions:
        if len(spots.regions) > 1 and find_image_key(sdata, None, shapes_key=own) != slide.key:
            continue  # spots of another slide
        of_table, shape_of_row = row_positions(sdata, spots, own)
        share = share_matrix(sdata, slide, Observed(own, shape_of_row), fine, positions, pixels, size_um)
        labelled = code[rows] >= 0
        one_hot = sparse.csr_array(
            (np.ones(int(labelled.sum())), (np.flatnonzero(labelled), code[rows][labelled])),
            shape=(len(rows), len(categories)),
        )
        covered = (share @ one_hot).toarray()
        total = np.asarray(share.sum(axis=1)).ravel()
        clear = covered.max(axis=1) > total / 2
        if size_um is not None:
            clear &= total >= _areas(sdata, own, slide)[shape_of_row] / (size_um / slide.mpp) ** 2 / 2
        region[of_table] = np.where(clear, covered.argmax(axis=1), -1)
    return pd.Categorical.from_codes(region, categories=pd.Index(categories))


def _areas(sdata: SpatialData, shapes_key: str, slide: Slide) -> np.ndarray:
    """Area of each of the shapes in level-0 pixels."""
    radii = shape_radii(sdata, shapes_key, slide)
    if radii is not None:
        return np.pi * radii**2
    return shape_geometries(sdata, shapes_key, slide).area.to_numpy()


def _check_free(adata: AnnData, key: str, companions: Sequence[str] = ()) -> None:
    """Raise if a column would be replaced that no function of this module made."""
    maker = str(read_record(adata, key).get("created_by", ""))
    held = [name for name in (key, *(Keys.derived(key, what) for what in companions)) if name in adata.obs]
    if held and maker not in ("hespotex.tl.regions", "hespotex.tl.tls_score"):
        raise DataValueError(
            f"obs[{held[0]!r}] is there already and was made by something else; choose another key_added="
        )
