"""Label cells, superpixels or spots by what they express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys, check_key
from .._logging import logger
from .._settings import settings
from ..annotation import clusters, signatures
from ..annotation.bands import bands, meta_expression
from ..annotation.raster import from_raster, to_raster
from ..annotation.self_labelling import self_label, target_clusters
from ..annotation.tls import cluster_score
from ..data.provenance import read_record, record
from ..data.stored import StoredPrediction, find_prediction, read_prediction
from ..data.tables import resolve_table, row_positions
from ..errors import DataTypeError, DataValueError, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["annotate", "grid_of"]

_COMPONENTS = 50
_SAMPLE = 20_000  # rows that principal components are found on
_ROWS_AT_ONCE = 8192


def annotate(
    data: SpatialData | AnnData,
    markers: Mapping[str, Sequence[str]] | None = None,
    *,
    n_clusters: int | None = None,
    method: Literal["signatures", "self_labelling"] = "signatures",
    key: str | None = None,
    table_key: str | None = None,
    threshold: float = 0.01,
    num_required: int = 1,
    smooth: float = 2.0,
    min_size: int = 20,
    key_added: str | None = None,
    seed: int | None = None,
    copy: bool = False,
) -> pd.DataFrame | None:
    """Label what was predicted, by signatures of marker genes or by clusters of expression.

    With `markers`, each cell takes the type whose markers it expresses most: every marker is scaled to [0, 1] over the
    section, a type's score is the mean over its markers. With ``method="self_labelling"``, a small network divides the
    superpixels by colour and markers into areas, anew for each type, and the areas where the markers are high are the
    type's. With `n_clusters`, cells are clustered by expression; on a grid of superpixels the maps are smoothed before
    and small patches merged after, so that clusters are areas.

    Labels rest on predictions. Superpixels lean on their neighbours and on a few spots: no p-value is given, and none
    should be computed from their number. For statistics between areas see :func:`hespotex.tl.regions`.

    Parameters
    ----------
    data
        Object with a prediction of :func:`hespotex.tl.predict`, at any level.
    markers
        Marker genes of each type. Genes that were not predicted are left out.
    n_clusters
        Number of clusters, in place of `markers`.
    method
        What to do with `markers`: ``"signatures"`` at any level, ``"self_labelling"`` at superpixels with their colour.
    key, table_key
        The prediction; may be left out where there is only one.
    threshold
        Least score of a type; below it a cell is ``"Unclassified"``.
    num_required
        For self-labelling, how many of a type's markers must be high: all of them where it has fewer.
    smooth
        Standard deviation of the smoothing before clustering, in superpixels; 0 for none.
    min_size
        Connected patches of fewer superpixels join what surrounds them.
    key_added
        Name of the labels; ``"<key>_type"`` or ``"<key>_cluster"`` by default.
    seed
        Seed of the clustering.
    copy
        Return the labels in place of writing them.

    Returns
    -------
    A table (labels, and scores of types) if `copy`, else ``None`` and these are written to the table of the prediction:

    ``obs["<key_added>"]`` : categorical
        Type, or number of the cluster, 0 the largest. Categories are those that occur.
    ``obs["<key_added>_score"]``, ``obsm["<key_added>_scores"]``
        Score of the label and of all types, with `markers`; types in ``uns["hespotex"]["<key_added>"]["types"]``.

    Raises
    ------
    DataValueError
        If neither or both of `markers` and `n_clusters` are given, or a type has no marker among the genes.

    References
    ----------
    Scores and clustering are those of iStar :cite:p:`istar2024`, self-labelling that of TESLA :cite:p:`tesla2023`, repaired.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=40)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "interpolate")
    >>> hx.tl.annotate(sdata, {"tumour": ["TUMOUR1", "TUMOUR2"], "T cell": ["T_CELL1", "T_CELL2"]})
    >>> sdata["interpolate_superpixels"].obs["interpolate_type"].dtype.name
    'category'
    """
    import pandas as pd

    if (markers is None) == (n_clusters is None):
        raise DataValueError("give either markers= (genes of each type) or n_clusters=")
    adata, name, key = find_prediction(data, key, table_key)
    stored = read_prediction(adata, key)
    key_added = key_added or f"{key}_{'type' if markers is not None else 'cluster'}"
    check_key(key_added)
    if not copy:
        _check_free(adata, key_added)
    if markers is not None:
        if not isinstance(markers, Mapping):
            raise DataTypeError(f"markers must map each type to its genes, got {type(markers).__name__}")
        if method == "self_labelling":
            found = _by_areas(
                stored, markers, *_grid_and_colour(data, name), num_required, settings.seed if seed is None else seed
            )
        elif method == "signatures":
            found = _by_markers(stored, markers, threshold)
        else:
            raise DataValueError(f"method={method!r} is unknown; possible: 'signatures', 'self_labelling'")
    else:
        assert n_clusters is not None
        grid = grid_of(data, name)
        labels = _by_clusters(stored, grid, n_clusters, smooth, min_size, settings.seed if seed is None else seed)
        found = _Labels(labels, {"n_clusters": n_clusters, "smooth": smooth, "min_size": min_size})
    used = set(found.labels) - {""}  # squidpy takes no category without cells
    categories = [each for each in found.types if each in used] or sorted(used, key=_numeric)
    known = pd.Series(found.labels, dtype=object).where(found.labels != "", None)
    column = pd.Categorical(known, categories=pd.Index(list(categories)))
    table = pd.DataFrame({key_added: column}, index=adata.obs_names)
    if found.scores is not None:
        table[Keys.derived(key_added, "score")] = found.best
    if copy:
        for position, kind in enumerate(found.types[:-1]):
            assert found.scores is not None
            table[kind] = found.scores[:, position]
        return table
    for each in table:
        adata.obs[each] = table[each]
    if found.scores is not None:
        adata.obsm[Keys.derived(key_added, "scores")] = found.scores.astype(np.float32)
    record(
        adata,
        key_added,
        kind="annotation",
        prediction=key,
        types=found.types[:-1],
        params=found.params,
        created_by="hespotex.tl.annotate",
    )
    logger.info("annotate: wrote obs[%r]%s", key_added, f" of table {name!r}" if name else "")
    return None


@dataclass(frozen=True, eq=False)
class _Labels:
    """Labels ("" for none), what made them and, of types, their names (the last for none) and scores."""

    labels: np.ndarray
    params: Mapping[str, Any]
    types: Sequence[str] = ()
    scores: np.ndarray | None = None
    best: np.ndarray | None = None


def _numeric(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdigit() else (1 << 30, label)


def _by_markers(stored: StoredPrediction, markers: Mapping[str, Sequence[str]], threshold: float) -> _Labels:
    labels, best = signatures.cell_types(stored.values, list(stored.genes), markers, threshold=threshold)
    scores = np.column_stack(
        [signatures.signature_score(stored.values, list(stored.genes), genes) for genes in markers.values()]
    )
    types = [*map(str, markers), signatures.UNCLASSIFIED]
    return _Labels(labels.astype(str), {"threshold": threshold}, types, scores, best)


def _by_areas(
    stored: StoredPrediction,
    markers: Mapping[str, Sequence[str]],
    grid: np.ndarray,
    colour: np.ndarray,
    num_required: int,
    seed: int,
) -> _Labels:
    """Areas of each type by self-labelling; where several claim a superpixel, the one of the higher score."""
    place = {str(gene): column for column, gene in enumerate(stored.genes)}
    scores = np.zeros((len(stored.values), len(markers)))
    claimed = np.zeros(scores.shape, dtype=bool)
    for column, (name, genes) in enumerate(markers.items()):
        known = [place[gene] for gene in genes if gene in place]
        if not known:
            raise DataValueError(
                f"cell type {name!r}: none of its markers {list(genes)[:5]} is among the predicted genes"
            )
        values = np.nan_to_num(stored.values[:, known])
        values = np.log1p(np.maximum(values, 0)) if stored.unit == "counts" else values
        if flat := [
            str(stored.genes[gene]) for gene, each in zip(known, values.T, strict=True) if not np.ptp(each) > 0
        ]:
            raise DataValueError(f"cell type {name!r}: the markers {flat} are the same everywhere; leave them out")
        both = bands(colour, meta_expression(values, min(num_required, len(known))), grid)
        labels = self_label(both.image, seed=seed).labels
        targets, means = target_clusters(labels, both.image[..., 1], tissue=both.tissue)
        scores[:, column] = from_raster(cluster_score(labels, means), grid)
        claimed[:, column] = from_raster(np.isin(labels, targets), grid)
    types = [*map(str, markers), signatures.UNCLASSIFIED]
    allowed = np.where(claimed, scores, -1.0)
    best = np.where(claimed.any(axis=1), allowed.argmax(axis=1), len(markers))
    labels = np.array(types, dtype=object)[best].astype(str)
    return _Labels(labels, {"num_required": num_required}, types, scores, np.maximum(allowed.max(axis=1), 0.0))


def _by_clusters(
    stored: StoredPrediction, grid: np.ndarray | None, n_clusters: int, smooth: float, min_size: int, seed: int
) -> np.ndarray:
    values = _components(stored, seed)
    if grid is None:
        labels = clusters.kmeans(values, n_clusters, seed=seed)
    else:
        raster = clusters.segment(to_raster(values, grid), n_clusters, sigma=smooth, min_size=min_size, seed=seed)
        labels = from_raster(raster, grid)
    return np.where(labels >= 0, labels.astype(str), "")


def _components(stored: StoredPrediction, seed: int) -> np.ndarray:
    """Principal components of the expression, (m, k): of the composition where it is counts, NaN rows kept.

    They are found on a sample of the rows and taken of all of them block by block: copies of a map as large as the
    prediction would not fit beside it.
    """
    from sklearn.decomposition import PCA

    values = np.asarray(stored.values)
    starts = range(0, len(values), _ROWS_AT_ONCE)
    inside = np.flatnonzero(
        np.concatenate([np.isfinite(values[start : start + _ROWS_AT_ONCE]).all(axis=1) for start in starts])
    )

    def prepared(rows: np.ndarray) -> np.ndarray:
        some = values[rows].astype(np.float32)
        if stored.unit != "counts":
            return some
        total = some.sum(axis=1, keepdims=True)
        return np.log1p(np.maximum(some, 0) * np.divide(1e4, total, out=np.zeros_like(total), where=total > 0))

    size = min(_COMPONENTS, len(inside), values.shape[1])
    fitted = None
    if 0 < size < values.shape[1]:
        sample = np.sort(np.random.default_rng(seed).permutation(inside)[:_SAMPLE])
        fitted = PCA(n_components=size, random_state=seed).fit(prepared(sample))
    out = np.full((len(values), values.shape[1] if fitted is None else size), np.nan, dtype=np.float32)
    for start in range(0, len(inside), _ROWS_AT_ONCE):
        rows = inside[start : start + _ROWS_AT_ONCE]
        out[rows] = prepared(rows) if fitted is None else fitted.transform(prepared(rows))
    return out


def grid_of(data: SpatialData | AnnData, table_key: str | None) -> np.ndarray | None:
    """Rows and columns of superpixels on their grid, in the order of the table; ``None`` for all else."""
    if table_key is None or not hasattr(data, "shapes"):
        return None
    table = resolve_table(data, table_key=table_key)
    shapes = data.shapes[table.regions[0]]
    if len(table.regions) > 1 or not {Keys.GRID_ROW, Keys.GRID_COL} <= set(shapes.columns):
        return None
    rows, positions = row_positions(data, table, table.regions[0])
    grid = np.empty((table.adata.n_obs, 2), dtype=np.int64)
    grid[rows] = shapes[[Keys.GRID_ROW, Keys.GRID_COL]].to_numpy(dtype=np.int64)[positions]
    return grid


def _grid_and_colour(data: SpatialData | AnnData, table_key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Places on the grid and mean colours of superpixels, in the order of the table."""
    grid = grid_of(data, table_key)
    if grid is None or not hasattr(data, "shapes"):
        raise DataValueError(
            "method='self_labelling' works on superpixels (hx.pp.superpixels); take method='signatures' for nuclei and spots"
        )
    table = resolve_table(data, table_key=table_key)
    shapes_key = table.regions[0]
    source = resolve_table(data, shapes_key=shapes_key)
    if Keys.COLOUR not in source.adata.obsm:
        raise MissingKeyError(
            f"self-labelling sees the colour of shapes {shapes_key!r}; make it with hx.pp.embed(sdata, 'rgb', shapes_key={shapes_key!r})"
        )
    colour = np.full((len(data.shapes[shapes_key]), 3), np.nan, dtype=np.float32)
    rows, positions = row_positions(data, source, shapes_key)
    colour[positions] = np.asarray(source.adata.obsm[Keys.COLOUR])[rows]
    rows, positions = row_positions(data, table, shapes_key)
    out = np.empty((table.adata.n_obs, 3), dtype=np.float32)
    out[rows] = colour[positions]
    return grid, out


def _check_free(adata: AnnData, key: str) -> None:
    """Raise if labels would replace what :func:`annotate` did not make."""
    scores = Keys.derived(key, "scores")
    held = [f"obs[{name!r}]" for name in (key, Keys.derived(key, "score")) if name in adata.obs]
    held += [f"obsm[{scores!r}]"] * (scores in adata.obsm)
    if held and read_record(adata, key).get("created_by") != "hespotex.tl.annotate":
        raise DataValueError(
            f"labels under {key!r} would replace {held[0]}, which annotate did not make; choose another key_added="
        )
