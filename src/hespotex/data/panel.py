"""Which genes to predict: chosen from the counts of the sections given, and from nothing else.

The core of :func:`hespotex.pp.select_genes` and of the panels that :func:`hespotex.tl.cross_validate` chooses
anew in every fold. It works on count matrices; scanpy and squidpy are used for the two statistics they own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from scipy import sparse

from .._keys import Keys
from ..errors import CountsError, DataValueError, MissingKeyError
from .counts import check_counts, check_names, library_size
from .lazy_counts import as_lazy, is_lazy
from .units import normalize_sparse

__all__ = ["METHODS", "Method", "PanelSource", "choose_panel", "shared_genes"]

Method = Literal["hvg", "high_mean", "most_variable", "variance", "high_mean_and_spread", "svg"]
METHODS: Final[tuple[str, ...]] = get_args(Method)

# HESpotEx drops genes seen in fewer than 1,000 spots, whatever the number of spots; on its ten sections of about
# 4,200 spots that is this share. It does so only for panels asked for with fewer than 1,100 genes.
PAPER_FRACTION: Final = 0.024
PAPER_MAX_N_TOP: Final = 1100

HISDIFF_VARIABLE: Final = 2000  # of each section, that HisDiff ranks by mean and spread

_LOESS_GENES: Final = 3  # a parabola takes three points; with none, the installed loess takes the interpreter down
_GENES_AT_ONCE: Final = 512


@dataclass(frozen=True, eq=False)
class PanelSource:
    """What a panel is chosen from: one section.

    Attributes
    ----------
    counts
        Raw counts, sparse (n, G), in memory or on disk.
    genes
        Names of the columns.
    total
        Library size of each observation, (n,); the row sums of `counts` by default.
    graph
        Neighbour graph, sparse (n, n); needed by ``"svg"`` only.
    name
        Name for messages.
    """

    counts: Any
    genes: tuple[str, ...]
    total: np.ndarray | None = None
    graph: Any = None
    name: str = "section"

    def __post_init__(self) -> None:
        check_counts(self.counts, f"section {self.name!r}")
        object.__setattr__(self, "genes", tuple(map(str, self.genes)))
        if self.counts.shape[1] != len(self.genes):
            raise DataValueError(f"section {self.name!r}: {len(self.genes)} names for {self.counts.shape[1]} genes")
        check_names(self.genes, f"section {self.name!r}: gene names")
        if self.counts.shape[0] == 0:
            raise CountsError(f"section {self.name!r} has no observations")
        if self.total is None:
            object.__setattr__(self, "total", library_size(self.counts))

    def columns(self, genes: Sequence[str]) -> sparse.csc_array:
        """Counts of `genes` in that order."""
        place = {gene: column for column, gene in enumerate(self.genes)}
        columns = np.array([place[gene] for gene in genes], dtype=np.int64)
        if is_lazy(self.counts):
            return sparse.csc_array(as_lazy(self.counts).take(columns=columns).to_memory())
        return sparse.csc_array(sparse.csc_array(self.counts)[:, columns])

    def n_stored(self, genes: Sequence[str]) -> np.ndarray:
        """Number of observations that `genes` were counted in, one by one."""
        if not is_lazy(self.counts):
            return np.diff(self.columns(genes).indptr)
        n_genes = self.counts.shape[1]
        found = sum(np.bincount(block.indices, minlength=n_genes) for block in as_lazy(self.counts).blocks())
        place = {gene: column for column, gene in enumerate(self.genes)}
        return np.asarray(found)[[place[gene] for gene in genes]]

    def column_sums(self) -> np.ndarray:
        """Total count of each gene."""
        blocks = as_lazy(self.counts).blocks() if is_lazy(self.counts) else [self.counts]
        return np.sum([np.asarray(block.sum(axis=0, dtype=np.float64)).ravel() for block in blocks], axis=0)


def shared_genes(sources: Sequence[PanelSource]) -> list[str]:
    """Genes counted at least once in every section, sorted by name."""
    if not sources:
        raise DataValueError("sdatas is empty: a panel is chosen from at least one section")
    shared: set[str] | None = None
    for source in sources:
        seen = source.column_sums() > 0
        names = {gene for gene, present in zip(source.genes, seen, strict=True) if present}
        shared = names if shared is None else shared & names
    return sorted(shared or ())


def choose_panel(
    sources: Sequence[PanelSource],
    *,
    method: str = "hvg",
    n_top: int = 1000,
    min_spots_fraction: float | None = None,
    min_spots: int | None = None,
    span: float = 0.3,
) -> tuple[str, ...]:
    """Names of the panel, sorted; see :func:`hespotex.pp.select_genes` for the methods.

    Raises
    ------
    DataValueError
        If no gene is left, or an argument is out of range.
    """
    if method not in METHODS:
        raise DataValueError(f"method={method!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
    if n_top < 1:
        raise DataValueError(f"n_top={n_top} must be at least 1")
    if min_spots_fraction is not None and not 0 <= min_spots_fraction < 1:
        raise DataValueError(f"min_spots_fraction={min_spots_fraction} must lie in [0, 1)")
    if min_spots is not None and (min_spots < 0 or min_spots_fraction is not None):
        raise DataValueError("give min_spots >= 0 or min_spots_fraction, not both")
    genes = shared_genes(sources)
    if not genes:
        raise DataValueError("the gene panel is empty: the sections share no gene that is counted in all of them")

    n_spots = sum(source.counts.shape[0] for source in sources)
    needed = _spots_needed(method, n_top, min_spots_fraction, min_spots, n_spots)
    counts: list[sparse.csc_array] = []
    if method == "hvg" and len(genes) <= n_top:  # all of them, without a look at the values
        detected = np.sum([source.n_stored(genes) for source in sources], axis=0) >= needed
    else:
        counts = [source.columns(genes) for source in sources]
        detected = np.sum([np.diff(matrix.indptr) for matrix in counts], axis=0) >= needed
    if not counts:
        chosen = detected
    elif method == "hvg":
        # As published: first the union over sections, then the filter, so that it also thins a list taken whole.
        chosen = _highly_variable(sources, counts, n_top, span) & detected
    else:
        if method == "high_mean_and_spread":
            statistic = _worse_rank(sources, counts)
        else:
            statistic = np.mean([_STATISTICS[method](*pair) for pair in zip(sources, counts, strict=True)], axis=0)
        score = np.where(detected, statistic, -np.inf)
        order = np.argsort(-score, kind="stable")[:n_top]  # genes are sorted: ties go to the earlier name
        chosen = np.zeros(len(genes), dtype=bool)
        chosen[order[np.isfinite(score[order])]] = True
    if not chosen.any():
        raise DataValueError(
            f"the gene panel is empty: of {len(genes)} shared genes none passes method={method!r}, n_top={n_top} and "
            f"detection in {needed:g} of {n_spots} spots; lower min_spots_fraction="
        )
    return tuple(gene for gene, keep in zip(genes, chosen, strict=True) if keep)


def _spots_needed(method: str, n_top: int, fraction: float | None, absolute: int | None, n_spots: int) -> float:
    """Number of spots, over all sections, a gene has to be detected in."""
    if absolute is not None:
        return absolute
    if fraction is None:
        if method == "hvg":
            fraction = PAPER_FRACTION if n_top < PAPER_MAX_N_TOP else 0.0
        else:
            # "Most variable" is dominated by a few bright spots of rare genes unless those are left out.
            fraction = 0.10 if method == "most_variable" else 0.0
    return fraction * n_spots


def _highly_variable(
    sources: Sequence[PanelSource], counts: Sequence[sparse.csc_array], n_top: int, span: float
) -> np.ndarray:
    """Union over sections of scanpy's ``seurat_v3`` genes."""
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    n_genes = counts[0].shape[1]
    union = np.zeros(n_genes, dtype=bool)
    names = pd.Index([str(column) for column in range(n_genes)])
    for source, matrix in zip(sources, counts, strict=True):
        section = AnnData(sparse.csr_matrix(matrix).astype(np.float64), var=pd.DataFrame(index=names))
        what = (
            f"section {source.name!r}: method='hvg' fits no trend of variance to its {matrix.shape[0]} spots and "
            f"{n_genes} shared genes"
        )
        advice = "choose method='high_mean', or leave the section out"
        n_vary = _n_varying(matrix)
        if span * n_vary < _LOESS_GENES:
            raise DataValueError(f"{what}, of which {n_vary} vary, at span={span:g}; {advice}")
        try:
            found = sc.pp.highly_variable_genes(
                section, flavor="seurat_v3", n_top_genes=n_top, span=span, inplace=False
            )
        except ValueError as error:  # loess, where means coincide: few spots, few counts
            raise DataValueError(f"{what} ({error}); raise span (now {span:g}), or {advice}") from error
        union |= found["highly_variable"].to_numpy(dtype=bool)
    return union


def _worse_rank(sources: Sequence[PanelSource], counts: Sequence[sparse.csc_array]) -> np.ndarray:
    """Minus the worse of a gene's two ranks, by mean and by spread of raw counts over all sections' spots.

    The k best are then the intersection of two lists of the highest, which is how HisDiff and Stem put it. Ranked is
    the union over sections of their highly variable genes (scanpy's ``seurat`` flavour), all others are left out.
    """
    candidates = _dispersed(sources, counts)
    n = sum(matrix.shape[0] for matrix in counts)
    means = sum(np.asarray(matrix.sum(axis=0, dtype=np.float64)).ravel() for matrix in counts) / n
    squares = [np.asarray(matrix.astype(np.float64).power(2).sum(axis=0)).ravel() for matrix in counts]
    variances = sum(squares) / n - means**2
    ranks = np.zeros(len(means))
    for values in (means, variances):
        order = np.argsort(-np.where(candidates, np.round(values, 9), -np.inf), kind="stable")
        ranks[order] = np.maximum(ranks[order], np.arange(len(order)))
    return np.where(candidates, -ranks, -np.inf)


def _dispersed(sources: Sequence[PanelSource], counts: Sequence[sparse.csc_array]) -> np.ndarray:
    """Union over sections of the most dispersed genes of log-normalised counts."""
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    n_genes = counts[0].shape[1]
    if n_genes <= HISDIFF_VARIABLE:
        return np.ones(n_genes, dtype=bool)
    union = np.zeros(n_genes, dtype=bool)
    names = pd.Index([str(column) for column in range(n_genes)])
    for source, matrix in zip(sources, counts, strict=True):
        assert source.total is not None
        filled = np.asarray(source.total) > 0
        values = sparse.csr_matrix(matrix).astype(np.float64)[filled]
        total = np.asarray(source.total, dtype=np.float64)[filled]
        values = sparse.csr_matrix(sparse.diags_array(np.median(total) / total) @ values)
        section = AnnData(values.log1p(), var=pd.DataFrame(index=names))
        found = sc.pp.highly_variable_genes(section, flavor="seurat", n_top_genes=HISDIFF_VARIABLE, inplace=False)
        union |= found["highly_variable"].to_numpy(dtype=bool)
    return union


def _n_varying(counts: sparse.csc_array) -> int:
    """Number of genes that differ between spots; sums of whole numbers are exact."""
    values = counts.astype(np.float64)
    total = np.asarray(values.sum(axis=0)).ravel()
    squares = np.asarray(values.multiply(values).sum(axis=0)).ravel()
    return int((counts.shape[0] * squares > total**2).sum())


def _log_normalised(source: PanelSource, counts: sparse.csc_array) -> sparse.csc_array:
    """Log1p of counts per 10,000 of the full library, kept sparse."""
    assert source.total is not None
    return sparse.csc_array(normalize_sparse(counts, source.total, "log1p_cp10k")).astype(np.float64)


def _means(source: PanelSource, counts: sparse.csc_array) -> np.ndarray:
    return np.asarray(_log_normalised(source, counts).sum(axis=0)).ravel() / counts.shape[0]


def _variances(source: PanelSource, counts: sparse.csc_array) -> np.ndarray:
    return _variance_of_columns(_log_normalised(source, counts))


def _raw_variances(source: PanelSource, counts: sparse.csc_array) -> np.ndarray:
    return _variance_of_columns(counts.astype(np.float64))


def _variance_of_columns(values: sparse.csc_array) -> np.ndarray:
    """Variance of each gene without ever making a dense matrix: stored values centred, the zeros counted."""
    n, mean = values.shape[0], np.asarray(values.sum(axis=0)).ravel() / values.shape[0]
    stored = np.diff(values.indptr)
    column = np.repeat(np.arange(values.shape[1]), stored)
    squares = np.bincount(column, weights=(values.data - mean[column]) ** 2, minlength=values.shape[1])
    return (squares + (n - stored) * mean**2) / n


def _morans_i(source: PanelSource, counts: sparse.csc_array) -> np.ndarray:
    """Moran's I of each gene by squidpy, on spots that have a neighbour; constant genes last."""
    import pandas as pd
    import squidpy as sq
    from anndata import AnnData

    if source.graph is None:
        raise MissingKeyError(
            f"section {source.name!r} has no neighbour graph, which method='svg' needs; make it with hx.pp.spatial_graph(sdata)"
        )
    graph = sparse.csr_matrix(source.graph)
    linked = np.diff(graph.indptr) > 0
    if linked.sum() < 3:
        raise DataValueError(f"section {source.name!r}: fewer than three spots have a neighbour")
    graph = graph[linked][:, linked]
    values = sparse.csc_matrix(sparse.csr_matrix(_log_normalised(source, counts))[linked])
    varies = np.flatnonzero(_variances(source, counts) > 1e-12)
    result = np.full(counts.shape[1], -np.inf)
    for start in range(0, len(varies), _GENES_AT_ONCE):  # a dense matrix of all genes may not fit in memory
        columns = varies[start : start + _GENES_AT_ONCE]
        names = pd.Index(columns.astype(str))
        section = AnnData(
            values[:, columns].toarray(), var=pd.DataFrame(index=names), obsp={Keys.CONNECTIVITIES: graph}
        )
        table = sq.gr.spatial_autocorr(
            section,
            connectivity_key=Keys.CONNECTIVITIES,
            mode="moran",
            genes=list(names),
            n_perms=None,
            corr_method=None,
            copy=True,
            show_progress_bar=False,
        )
        found = table["I"].reindex(names).to_numpy(dtype=np.float64)
        result[columns] = np.where(np.isfinite(found), found, -np.inf)
    return result


_STATISTICS: Final = {
    "high_mean": _means,
    "most_variable": _variances,
    "variance": _raw_variances,
    "svg": _morans_i,
}
