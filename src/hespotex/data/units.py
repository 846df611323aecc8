"""Units of expression and the one function that turns counts into each.

A prediction carries the name of its unit, and comparing two units is an error.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
from scipy import sparse

from ..errors import DataValueError

__all__ = ["UNITS", "Unit", "check_unit", "normalize", "normalize_sparse"]

Unit = Literal["log1p_cp10k", "log1p_cpm_panel", "log1p_counts", "log2_counts", "counts"]
UNITS: Final[tuple[str, ...]] = get_args(Unit)
_PLAIN_LOGS: Final = {"log1p_counts": 1.0, "log2_counts": float(np.log(2.0))}  # natural log over base, no library size


def check_unit(unit: str) -> str:
    """Return `unit`, or raise if it is none of :data:`UNITS`."""
    if unit not in UNITS:
        raise DataValueError(f"unit={unit!r} is unknown; possible: {', '.join(map(repr, UNITS))}")
    return unit


def normalize(
    counts: np.ndarray | sparse.sparray | sparse.spmatrix, library_size: np.ndarray, unit: str = "log1p_cp10k"
) -> np.ndarray:
    """Counts of a gene panel in `unit`, dense float32.

    Parameters
    ----------
    counts
        Raw counts of the panel, (n, G).
    library_size
        Total count of each observation over *all* genes of the assay, (n,).
    unit
        ``"log1p_cp10k"``: log1p of counts per 10,000 of the full library (default);
        ``"log1p_cpm_panel"``: log1p of counts per million within the panel (HESpotEx as published);
        ``"log1p_counts"``: log1p of the counts (TESLA as published);
        ``"log2_counts"``: log2 of the counts plus one (HisDiff and Stem as published);
        ``"counts"``: unchanged.

    Notes
    -----
    An observation without counts stays all zero.
    """
    check_unit(unit)
    if sparse.issparse(counts):  # the same numbers, and nothing to do for the zeros
        stored = sparse.csr_array(counts)
        if not stored.has_canonical_format:
            stored = stored.copy()
            stored.sum_duplicates()
        return normalize_sparse(stored, library_size, unit).toarray()
    values = np.asarray(counts, dtype=np.float64)
    if unit == "counts":
        return values.astype(np.float32)
    if unit in _PLAIN_LOGS:
        return (np.log1p(values) / _PLAIN_LOGS[unit]).astype(np.float32)
    scale = _row_scale(values.sum(axis=1), library_size, unit)
    return np.log1p(values * scale[:, None]).astype(np.float32)


def normalize_sparse(
    counts: np.ndarray | sparse.sparray | sparse.spmatrix, library_size: np.ndarray, unit: str = "log1p_cp10k"
) -> sparse.csr_array:
    """The same as :func:`normalize`, CSR float32: every unit maps 0 to 0, so nothing is filled in."""
    check_unit(unit)
    values = sparse.csr_array(counts, dtype=np.float64)
    if unit in _PLAIN_LOGS:
        values.data = np.log1p(values.data) / _PLAIN_LOGS[unit]
    elif unit != "counts":
        scale = _row_scale(np.asarray(values.sum(axis=1)).ravel(), library_size, unit)
        values = sparse.csr_array(sparse.diags_array(scale) @ values)
        values.data = np.log1p(values.data)
    return sparse.csr_array(values.astype(np.float32))


def _row_scale(panel_size: np.ndarray, library_size: np.ndarray, unit: str) -> np.ndarray:
    """What each observation's counts are multiplied by before the logarithm; 0 where it has none."""
    if unit == "log1p_cp10k":
        total, target = np.asarray(library_size, dtype=np.float64), 1e4
    else:
        total, target = np.asarray(panel_size, dtype=np.float64), 1e6
    return np.divide(target, total, out=np.zeros_like(total), where=total > 0)
