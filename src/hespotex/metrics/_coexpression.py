"""Whether genes that vary together in the measurement do so in the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataValueError
from ._inputs import is_flat, is_undefined, pair_of

__all__ = ["Coexpression", "coexpression", "coexpression_score"]


@dataclass(frozen=True)
class Coexpression:
    """Agreement of two gene × gene correlation matrices, over pairs of different genes.

    Attributes
    ----------
    pearson
        Pearson r of the correlations of all pairs; NaN where they do not vary.
    mae
        Mean absolute difference of the correlations.
    bias
        Mean difference, predicted minus measured: positive where a prediction correlates too much.
    n_genes
        Genes that entered.
    p_value
        Share of permutations of the genes that agree as well, the observed order included (Mantel test); NaN without
        permutations or where `pearson` is.
    """

    pearson: float
    mae: float
    bias: float
    n_genes: int
    p_value: float = float("nan")


def coexpression(values: np.ndarray) -> np.ndarray:
    """Pearson r of every pair of genes over the observations, (G, G); NaN for constant genes.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import coexpression
    >>> coexpression(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])).round(6).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise DataValueError(f"values must be (n, G), got {values.ndim} dimensions")
    centred = values - values.mean(axis=0)
    norm = np.sqrt((centred * centred).sum(axis=0))
    scaled = np.divide(centred, norm, out=np.full_like(centred, np.nan), where=(norm > 0) & ~is_flat(values))
    return np.clip(scaled.T @ scaled, -1.0, 1.0)


def coexpression_score(
    measured: np.ndarray,
    predicted: np.ndarray,
    *,
    detected: np.ndarray | None = None,
    min_detected: float = 0.05,
    n_permutations: int = 0,
    seed: int = 0,
) -> Coexpression:
    """Compare gene–gene correlations within a section.

    Sparse counts weaken measured correlations and means are too correlated, so read the score beside that of two halves of
    the counts (:func:`split_half`) and, of a generative model, give single samples rather than their mean.

    Parameters
    ----------
    measured, predicted
        Observations × genes of one section, (n, G), in one unit.
    detected
        Share of observations in which a gene was counted, (G,); by default that of values above 0 of `measured`.
    min_detected
        Genes detected in fewer observations are left out.
    n_permutations
        Permutations of the genes for the p-value; at least 199 for one worth reading.
    seed
        Of the permutations.

    Raises
    ------
    DataValueError
        If shapes differ, values are not finite, or fewer than three genes remain.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import coexpression_score
    >>> measured = np.random.default_rng(0).gamma(2.0, size=(50, 6)).cumsum(axis=1)
    >>> coexpression_score(measured, measured).mae
    0.0
    """
    measured, predicted = pair_of(measured, predicted)
    share = (measured > 0).mean(axis=0) if detected is None else np.asarray(detected, dtype=np.float64)
    if share.shape != (measured.shape[1],):
        raise DataValueError(
            f"detected has shape {share.shape}; it must hold one share for each of {measured.shape[1]} genes"
        )
    kept = (share >= min_detected) & ~is_undefined(measured)
    n = int(kept.sum())
    if n < 3:
        raise DataValueError(
            f"{n} genes vary and are detected in {min_detected:.0%} of observations; at least 3 are needed"
        )
    truth = coexpression(measured[:, kept])
    guess = np.nan_to_num(coexpression(predicted[:, kept]))  # a flat prediction tells of no pair
    upper = np.triu_indices(n, 1)
    pairs = truth[upper]
    r = _pearson(pairs, guess[upper])
    p_value = float("nan")
    if n_permutations and np.isfinite(r):
        rng = np.random.default_rng(seed)
        orders = (rng.permutation(n) for _ in range(n_permutations))
        as_good = sum(_pearson(pairs, guess[np.ix_(order, order)][upper]) >= r for order in orders)
        p_value = (1 + as_good) / (1 + n_permutations)
    difference = guess[upper] - pairs
    return Coexpression(r, float(np.abs(difference).mean()), float(difference.mean()), n, p_value)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")
