"""Whether a matrix holds raw counts, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from ..errors import CountsError, MissingKeyError
from .lazy_counts import as_lazy, is_lazy

__all__ = ["check_counts", "check_names", "counts_of", "library_size"]

_BLOCK_ROWS = 4096


def _stored_blocks(counts: Any) -> Any:
    """The stored values of `counts` in blocks, so that a dense matrix is not copied whole."""
    if sparse.issparse(counts):
        yield counts.data
        return
    if is_lazy(counts):
        yield from (block.data for block in as_lazy(counts).blocks())
        return
    for start in range(0, counts.shape[0], _BLOCK_ROWS):
        yield np.asarray(counts[start : start + _BLOCK_ROWS])


def check_counts(counts: Any, where: str = "X") -> None:
    """Raise unless `counts` holds raw counts: finite whole numbers, none negative.

    Parameters
    ----------
    counts
        Matrix (n, G), sparse or dense, in memory or on disk. It is read only.
    where
        What the matrix is called in the message.

    Raises
    ------
    CountsError
        If a value is NaN or infinite, negative, or not whole (already normalised); the remedy is named.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.data.counts import check_counts
    >>> check_counts(np.array([[0, 2], [1, 0]]))
    """
    if getattr(counts, "ndim", 2) != 2:
        raise CountsError(f"{where}: counts must be observations x genes, got {counts.ndim} dimensions")
    for values in _stored_blocks(counts):
        if values.dtype == object or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
            raise CountsError(f"{where}: counts must be numbers, got dtype {values.dtype}")
        if np.issubdtype(values.dtype, np.complexfloating):
            raise CountsError(f"{where}: counts must be real numbers, got dtype {values.dtype}")
        floating = np.issubdtype(values.dtype, np.floating)
        if floating and not np.isfinite(values).all():
            raise CountsError(
                f"{where}: {int((~np.isfinite(values)).sum())} values are NaN or infinite; a gene that was not measured "
                "must be left out of the table, not filled"
            )
        if values.size and values.min() < 0:
            raise CountsError(
                f"{where}: negative values (down to {values.min():g}), as after scaling; raw counts are needed: name the "
                "layer that holds them (counts_layer= or layer=), or restore X from adata.raw"
            )
        if floating and (fraction := values != np.round(values)).any():
            example = values[fraction].flat[0]
            raise CountsError(
                f"{where}: values such as {example:.6g} are not whole numbers, so this was already normalised; raw counts "
                "are needed: name the layer that holds them (counts_layer= or layer=), or restore X from adata.raw"
            )


def check_names(names: Sequence[str], where: str = "gene names") -> None:
    """Raise if a name occurs twice.

    Raises
    ------
    CountsError
        Naming the first duplicates.
    """
    unique, times = np.unique(np.asarray(names, dtype=str), return_counts=True)
    if (times > 1).any():
        twice = unique[times > 1]
        raise CountsError(
            f"{where}: {len(twice)} occur more than once ({', '.join(twice[:5])}{' …' if len(twice) > 5 else ''}); decide "
            "which is meant, e.g. with adata.var_names_make_unique() or adata.obs_names_make_unique()"
        )


def library_size(counts: Any) -> np.ndarray:
    """Total count of each observation over all genes, (n,) float64."""
    if is_lazy(counts):
        return np.concatenate([library_size(block) for block in as_lazy(counts).blocks()])
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def counts_of(adata: Any, layer: str | None, where: str, *, lazy: bool = False) -> Any:
    """The matrix of an AnnData that should hold the counts, not yet checked.

    One that is on disk is read into memory unless the caller can read it in blocks, which `lazy` says.

    Raises
    ------
    MissingKeyError
        If there is no such layer.
    CountsError
        If there is no matrix at all.
    """
    if layer is not None and layer not in adata.layers:
        there = [key for key in adata.layers if key is not None]
        raise MissingKeyError(f"{where}: layer {layer!r} with the counts is missing; layers hold {there}")
    counts = adata.X if layer is None else adata.layers[layer]
    if counts is None:
        raise CountsError(f"{where} has no counts: X is empty")
    return as_lazy(counts, where).to_memory() if is_lazy(counts) and not lazy else counts
