"""How well a perfect predictor could correlate with counts this sparse: split-half reliability by thinning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from ..data.units import normalize
from ..errors import DataValueError
from ._correlation import pearson

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ceiling", "Transform", "ceiling", "gene_ceiling", "reliable", "split_half"]

Transform = str | Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A unit of :data:`hespotex.data.UNITS`, or a function of (panel counts, library size)."""


def _transformed(counts: np.ndarray, library_size: np.ndarray, transform: Transform) -> np.ndarray:
    if callable(transform):
        return np.asarray(transform(counts, library_size), dtype=np.float64)
    return normalize(counts, library_size, transform)


def split_half(
    counts: np.ndarray | sparse.sparray | sparse.spmatrix,
    library_size: np.ndarray,
    transform: Transform = "log1p_cp10k",
    *,
    n_draws: int = 3,
    seed: int = 0,
) -> np.ndarray:
    """Correlation of two random halves of the counts of one section.

    Every molecule falls into one of two halves with probability 1/2; each half is transformed with its own
    library, of which the genes outside the panel are split as well.

    Parameters
    ----------
    counts
        Raw counts of the panel, (n, G).
    library_size
        Total count of each observation over *all* genes, (n,).
    transform
        The transform under which a model is scored: score and ceiling must share it.
    n_draws
        Random splits to average.
    seed
        Seed of the splits.

    Returns
    -------
    Mean correlation of the halves per gene, (G,); NaN for genes that are constant in every half.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import split_half
    >>> rate = np.linspace(100, 300, 50)[:, None]
    >>> bool(split_half(np.rint(rate), np.full(50, 10000.0))[0] > 0.8)
    True
    """
    panel = sparse.csr_array(counts).toarray() if sparse.issparse(counts) else np.asarray(counts)
    dense = np.rint(panel).astype(np.int64)
    library = np.rint(np.asarray(library_size, dtype=np.float64)).astype(np.int64)
    rest = library - dense.sum(axis=1)
    if (dense < 0).any() or (rest < 0).any():
        raise DataValueError(
            "library_size is below the sum of the panel, or counts are negative: raw counts are needed"
        )
    if n_draws < 1:
        raise DataValueError(f"n_draws={n_draws} must be at least 1")
    rng = np.random.default_rng(seed)
    total, defined = np.zeros(dense.shape[1]), np.zeros(dense.shape[1])
    for _ in range(n_draws):
        half = rng.binomial(dense, 0.5)
        half_library = half.sum(axis=1) + rng.binomial(rest, 0.5)
        r = pearson(
            _transformed(half, half_library, transform), _transformed(dense - half, library - half_library, transform)
        )
        total += np.nan_to_num(r)
        defined += ~np.isnan(r)
    return np.divide(total, defined, out=np.full(len(total), np.nan), where=defined > 0)


@dataclass(frozen=True)
class Ceiling:
    """Highest mean correlation reachable, averaged in two ways.

    Attributes
    ----------
    mean_first
        Split-half correlations averaged over sections before the root: less biased; used for ``r / ceiling``.
    pessimistic
        Each section's split-half correlation clipped at 0, root taken, then averaged.
    per_gene
        The summands of `mean_first`, (G,).
    """

    mean_first: float
    pessimistic: float
    per_gene: np.ndarray


def reliable(half: np.ndarray) -> np.ndarray:
    """Best reachable correlation with the full counts, from the correlation of their halves."""
    clipped = np.clip(half, 0, 1)
    return np.sqrt(2 * clipped / (1 + clipped))


def ceiling(halves: np.ndarray | Sequence[np.ndarray]) -> Ceiling:
    """Ceiling of the mean correlation from the split-half correlations of one or more sections.

    The full counts have reliability ``2 r / (1 + r)`` (Spearman-Brown), and no prediction correlates with
    them above its square root.

    Parameters
    ----------
    halves
        Output of :func:`split_half` for each section, (S, G) or (G,), genes in one order; NaN where undefined.

    Examples
    --------
    >>> from hespotex.metrics import ceiling
    >>> round(ceiling([[0.5]]).mean_first, 4)
    0.8165
    """
    table = np.atleast_2d(np.asarray(halves, dtype=np.float64))
    defined = ~np.isnan(table)
    counts = defined.sum(axis=0)
    mean = np.divide(np.nansum(table, axis=0), counts, out=np.full(table.shape[1], np.nan), where=counts > 0)
    genes = reliable(mean)
    per_section = [_mean(reliable(row)) for row in table]
    return Ceiling(_mean(genes), _mean(np.array(per_section)), genes)


def gene_ceiling(table: pd.DataFrame) -> pd.Series:
    """Ceiling of the gene of each row of a table of scores, from its column ``split_half``.

    Split-half correlations are averaged over the sections of a patient, then over patients, before the root.
    """
    sections = table.drop_duplicates(["patient", "section", "gene"])
    half = (
        sections.groupby(["patient", "gene"], observed=True)["split_half"].mean().groupby("gene", observed=True).mean()
    )
    return (
        table["gene"].map(dict(zip(half.index, reliable(half.to_numpy(dtype=np.float64)), strict=True))).astype(float)
    )


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
