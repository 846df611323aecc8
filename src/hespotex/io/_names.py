"""Duplicate names: an error by default, never a silent choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import DataValueError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

__all__ = ["Duplicates", "check_duplicates", "shorten", "unique_genes", "unique_spots"]

Duplicates = Literal["error", "first", "sum"]


def check_duplicates(duplicates: str) -> None:
    """Raise if the choice is none of those offered."""
    if duplicates not in ("error", "first", "sum"):
        raise DataValueError(f"duplicates={duplicates!r} is unknown; possible: 'error', 'first', 'sum'")


def shorten(names: list[str] | pd.Index, limit: int = 8) -> str:
    """The first names of a list, and how many follow."""
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def unique_spots(names: pd.Index, where: str, advice: str = "leave out all but one of each") -> None:
    """Raise if a spot is named twice; `advice` says what mends it."""
    if not names.is_unique:
        raise DataValueError(
            f"{where}: spots named more than once: {shorten(names[names.duplicated()].unique())}; {advice}"
        )


def unique_genes(
    counts: csr_matrix, genes: pd.Index, duplicates: Duplicates, where: str
) -> tuple[csr_matrix, pd.Index]:
    """Columns of `counts` with unique names, in the order of first appearance.

    Raises
    ------
    DataValueError
        If a gene is named twice and `duplicates` is ``"error"``.
    """
    from scipy import sparse

    if genes.is_unique:
        return counts, genes
    repeated = genes[genes.duplicated()].unique()
    if duplicates == "error":
        raise DataValueError(
            f"{where}: genes named more than once: {shorten(repeated)}. "
            "Pass duplicates='sum' to add their counts, or duplicates='first' to keep the first column"
        )
    if duplicates == "first":
        kept = np.flatnonzero(~genes.duplicated())
        return counts[:, kept], genes[kept]
    unique = genes.unique()
    codes = unique.get_indexer(genes)
    ones = np.ones(len(codes), dtype=counts.dtype)
    merge = sparse.csr_matrix((ones, (np.arange(len(codes)), codes)), shape=(len(codes), len(unique)))
    return sparse.csr_matrix(counts @ merge), unique


def unique_anndata(adata: AnnData, duplicates: Duplicates, where: str) -> AnnData:
    """`adata` with unique names; ``"sum"`` is refused, since what its layers mean is not known here."""
    unique_spots(adata.obs_names, where, "see adata.obs_names_make_unique()")
    if adata.var_names.is_unique:
        return adata
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if duplicates != "first":
        raise DataValueError(
            f"{where}: genes named more than once: {shorten(repeated)}. Pass duplicates='first' to keep the first "
            "column, or call adata.var_names_make_unique() before"
        )
    return adata[:, ~adata.var_names.duplicated()].copy()
