"""Normalise counts for depth, beside the counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from .._keys import Keys, check_key
from .._logging import logger
from ..data.bridge import as_list
from ..data.counts import check_counts, check_names, counts_of, library_size
from ..data.provenance import record
from ..data.tables import resolve_table
from ..data.transaction import restored_on_error
from ..data.units import check_unit, normalize_sparse
from ..errors import DataValueError, HespotexWarning, MissingKeyError
from ._free import check_slot_free

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["normalize_counts"]


def normalize_counts(
    data: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    *,
    unit: str = "log1p_cp10k",
    layer: str | None = None,
    table_key: str | None = None,
    target_key: str = Keys.TARGET,
    key_added: str | None = None,
    copy: bool = False,
) -> sparse.csr_matrix | list[sparse.csr_matrix] | None:
    """Normalise the counts of each spot for its depth.

    Models need no such layer, as they normalise what they read; this is for looking at the measurement in the
    unit of a prediction. ``X`` is never touched.

    Parameters
    ----------
    data
        One or many sections with raw counts.
    unit
        ``"log1p_cp10k"``: log1p of counts per 10,000 of the full library (default). ``"log1p_cpm_panel"``: log1p of counts
        per million within the target genes, as HESpotEx does; it depends on the panel, and lets depth pass for signal.
    layer
        Layer with the raw counts; ``X`` by default.
    table_key
        Table, where there are several.
    target_key
        ``var`` column of the panel (:func:`hespotex.pp.select_genes`), for ``"log1p_cpm_panel"``.
    key_added
        Where to write; the name of the unit by default.
    copy
        Return the matrix (a list of them for several sections) and write nothing.

    Returns
    -------
    ``None``, or with ``copy=True`` CSR float32 (n, genes). Written otherwise:

    ``layers[key_added]`` : CSR float32
        for ``"log1p_cp10k"``, all genes;
    ``obsm[key_added]`` : CSR float32
        for ``"log1p_cpm_panel"``, the target genes, named in ``uns["hespotex"][key_added]["genes"]``;
    ``uns["hespotex"][key_added]``
        unit and arguments.

    Raises
    ------
    CountsError
        If the matrix does not hold raw counts, or a gene name occurs twice.
    MissingKeyError
        If `layer`, or the panel of ``"log1p_cpm_panel"``, is missing.
    DataValueError
        If `key_added` is taken by something that this function did not make, or is no legal key.

    Warns
    -----
    HespotexWarning
        If spots have no counts at all; they stay zero.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=40)
    >>> hx.pp.normalize_counts(sdata)
    >>> "log1p_cp10k" in sdata["table"].layers
    True
    """
    check_unit(unit)
    if unit == "counts":
        raise DataValueError(
            "unit='counts' is what the table holds already; possible: 'log1p_cp10k', 'log1p_cpm_panel'"
        )
    key = unit if key_added is None else key_added
    tables = [resolve_table(item, table_key=table_key).adata for item in as_list(data, "data")]
    slot = "obsm" if unit == "log1p_cpm_panel" else "layers"
    if not copy:
        check_key(key)
        for adata in tables:
            check_slot_free(adata, slot, key, maker="normalize_counts")
    results: list[sparse.csr_matrix] = []
    panels: list[list[str]] = []
    for number, adata in enumerate(tables):
        counts = counts_of(adata, layer, f"section {number}")
        check_counts(counts, f"section {number}")
        check_names(adata.var_names, "gene names")
        total = library_size(counts)
        if empty := int((total == 0).sum()):
            warnings.warn(
                f"{empty} of {len(total)} spots have no counts; they stay zero", HespotexWarning, stacklevel=2
            )
        panel = np.ones(adata.n_vars, dtype=bool)
        if unit == "log1p_cpm_panel":
            if target_key not in adata.var:
                raise MissingKeyError(f"var[{target_key!r}] is missing; choose genes with hx.pp.select_genes(sdata)")
            panel = adata.var[target_key].to_numpy(dtype=bool)
            counts = counts[:, np.flatnonzero(panel)]
        panels.append(adata.var_names[panel].astype(str).tolist())
        results.append(sparse.csr_matrix(normalize_sparse(counts, total, unit)))
    if copy:
        return results if isinstance(data, Sequence) else results[0]
    with ExitStack() as stack:
        for adata, values, genes in zip(tables, results, panels, strict=True):
            stack.enter_context(restored_on_error(adata))
            getattr(adata, slot)[key] = values
            named = {"genes": genes} if slot == "obsm" else {}
            record(adata, key, created_by="hespotex.pp.normalize_counts", unit=unit, **named)
    logger.info("normalised %d sections to %s: %r", len(tables), unit, key)
    return None
