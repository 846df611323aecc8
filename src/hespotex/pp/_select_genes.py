"""Choose the genes to predict."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys, check_key
from .._logging import logger
from ..data.bridge import as_list
from ..data.counts import counts_of, library_size
from ..data.lazy_counts import as_lazy, is_lazy
from ..data.panel import Method, PanelSource, choose_panel
from ..data.provenance import record
from ..data.tables import AnnotatedTable, resolve_table
from ..data.transaction import restored_on_error
from ..errors import MissingKeyError
from ._free import check_slot_free

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["select_genes"]


def select_genes(
    sdatas: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    *,
    method: Method = "hvg",
    n_top: int = 1000,
    min_spots_fraction: float | None = None,
    min_spots: int | None = None,
    span: float = 0.3,
    layer: str | None = None,
    table_key: str | None = None,
    connectivity_key: str = Keys.CONNECTIVITIES,
    key_added: str = Keys.TARGET,
    copy: bool = False,
) -> list[str] | None:
    """Choose the genes to predict from the sections given, and from no other: pass training sections only.

    Only genes counted in every section can be chosen. Each region of a table counts as a section.

    Parameters
    ----------
    sdatas
        One or many sections with raw counts, in memory or on disk (:func:`hespotex.io.read_lazy`). Where genes have to be
        ranked, those on disk are read into memory as a sparse matrix.
    method
        ``"hvg"``
            the union over sections of their `n_top` highly variable genes (scanpy's ``seurat_v3`` on raw
            counts), as in HESpotEx; all shared genes where there are no more than `n_top`;
        ``"high_mean"``
            the `n_top` genes with the highest mean over sections of log1p CP10k;
        ``"most_variable"``
            the `n_top` genes with the highest mean variance within sections of log1p CP10k;
        ``"variance"``
            the same of raw counts, which favours highly expressed genes, as in iStar;
        ``"high_mean_and_spread"``
            the `n_top` genes that stand highest both by mean and by standard deviation of raw counts over all spots (the
            smallest intersection of the two lists), among the union over sections of 2,000 highly variable genes
            (scanpy's ``seurat``), as in HisDiff and Stem;
        ``"svg"``
            the `n_top` genes with the highest mean Moran's I of log1p CP10k, by squidpy on the graph of
            :func:`hespotex.pp.spatial_graph`.
    n_top
        Number of genes; per section for ``"hvg"``.
    min_spots_fraction
        Genes detected in a smaller share of all spots given are left out. By default 0.10 for ``"most_variable"``; 0.024
        for ``"hvg"`` with `n_top` below 1,100 (the share that HESpotEx's 1,000 spots are of its own data, applied
        after the union as there); none otherwise.
    min_spots
        The same as a number of spots (``1000`` as published); not together with `min_spots_fraction`.
    span
        Span of the loess fit of ``"hvg"``.
    layer
        Layer with the raw counts; ``X`` by default.
    table_key
        Table, where there are several.
    connectivity_key
        ``obsp`` key of the graph, for ``"svg"``.
    key_added
        Column of ``var`` to write.
    copy
        Return the genes and write nothing.

    Returns
    -------
    ``None``, or the genes sorted by name with ``copy=True``. Written otherwise:

    ``var[key_added]`` : bool
        whether a gene is to be predicted, in the table of every section;
    ``uns["hespotex"][key_added]``
        arguments and the number of sections.

    Raises
    ------
    CountsError
        If the matrix does not hold raw counts, or a gene name occurs twice.
    DataValueError
        If the panel is empty; if a section has too few spots or counts for ``"hvg"``; if `key_added` is taken by
        something that this function did not make, or is no legal key.
    MissingKeyError
        If `layer` or, for ``"svg"``, the graph is missing.

    See Also
    --------
    hespotex.tl.train, hespotex.tl.cross_validate

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=40)
    >>> hx.pp.select_genes(sdata, method="high_mean", n_top=5)
    >>> int(sdata["table"].var["hespotex_target"].sum())
    5
    """
    tables = [resolve_table(data, table_key=table_key) for data in as_list(sdatas)]
    if not copy:
        check_key(key_added)
        for table in tables:
            check_slot_free(table.adata, "var", key_added, maker="select_genes")
    graph_key = connectivity_key if method == "svg" else None
    sources = [
        source
        for number, table in enumerate(tables)
        for source in panel_sources(table, layer=layer, graph_key=graph_key, name=str(number))
    ]
    genes = choose_panel(
        sources, method=method, n_top=n_top, min_spots_fraction=min_spots_fraction, min_spots=min_spots, span=span
    )
    if copy:
        return list(genes)
    given: dict[str, Any] = {
        "method": method,
        "n_top": n_top,
        "min_spots_fraction": min_spots_fraction,
        "min_spots": min_spots,
        "span": span,
        "layer": layer,
    }
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(restored_on_error(table.adata))
            table.adata.var[key_added] = table.adata.var_names.isin(genes)
            record(
                table.adata,
                key_added,
                created_by="hespotex.pp.select_genes",
                params={name: value for name, value in given.items() if value is not None},
                n_sections=len(sources),
            )
    logger.info("chose %d genes (%s) from %d sections: var[%r]", len(genes), method, len(sources), key_added)
    return None


def panel_sources(
    table: AnnotatedTable, *, layer: str | None = None, graph_key: str | None = None, name: str = ""
) -> list[PanelSource]:
    """One source of a panel for each region of `table`."""
    adata = table.adata
    counts = counts_of(adata, layer, f"section {name!r}", lazy=True)
    if graph_key is not None and graph_key not in adata.obsp:
        raise MissingKeyError(f"obsp[{graph_key!r}] is missing; make it with hx.pp.spatial_graph(sdata)")
    graph = None if graph_key is None else adata.obsp[graph_key]
    sources = []
    for code in np.unique(table.region):
        rows = np.flatnonzero(table.region == code)
        whole = len(rows) == adata.n_obs
        own = counts if whole else as_lazy(counts).take(rows=rows) if is_lazy(counts) else counts[rows]
        sources.append(
            PanelSource(
                own,
                tuple(adata.var_names.astype(str)),
                total=library_size(own),
                graph=graph if graph is None or whole else graph[rows][:, rows],
                name=f"{name}:{code}" if not whole else name,
            )
        )
    return sources
