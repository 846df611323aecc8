"""Whether a prediction spreads as much as the measurement, or regresses to the mean."""

from __future__ import annotations

from typing import Final

import numpy as np

from ._inputs import NanPolicy, is_flat, is_undefined, pair_of

__all__ = ["OVERSMOOTHED", "clipped_fraction", "is_oversmoothed", "relative_variance_distance", "variance_ratio"]

OVERSMOOTHED: Final = 0.1  # variance ratio below which a well-correlated prediction is flagged


def variance_ratio(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Variance of the prediction over variance of the measurement, per gene; 1 is ideal.

    Parameters as in :func:`pearson`; (G,), NaN for constant or unmeasured genes, 0 for a flat prediction.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import variance_ratio
    >>> variance_ratio(np.array([0.0, 2.0]), np.array([0.0, 1.0]))
    array([0.25])
    """
    measured, predicted = pair_of(measured, predicted, nan_policy)
    defined = ~is_undefined(measured)
    truth = measured.var(axis=0, dtype=np.float64)
    guess = np.where(is_flat(predicted), 0.0, predicted.var(axis=0, dtype=np.float64))
    return np.divide(guess, truth, out=np.full(len(truth), np.nan), where=defined)


def relative_variance_distance(ratio: np.ndarray) -> float:
    """RVD: mean over genes of ``((var p - var y) / var y)^2``, from the :func:`variance_ratio` of a section.

    Undefined genes are left out; NaN if none is defined.

    Examples
    --------
    >>> from hespotex.metrics import relative_variance_distance
    >>> relative_variance_distance([1.0, 0.0])
    0.5
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    ratio = ratio[~np.isnan(ratio)]
    return float(((ratio - 1) ** 2).mean()) if ratio.size else float("nan")


def is_oversmoothed(correlation: np.ndarray, ratio: np.ndarray, *, high: float = 0.3) -> np.ndarray:
    """Genes (G,) that correlate at least `high` while their variance ratio is below :data:`OVERSMOOTHED`.

    Such a map has the right shape and almost no amplitude; it must be flagged wherever its correlation is shown.
    """
    return (np.asarray(correlation) >= high) & (np.asarray(ratio) < OVERSMOOTHED)


def clipped_fraction(predicted: np.ndarray) -> float:
    """Share of negative values, which a metric that needs mass clips at 0 and has to report."""
    return float((np.asarray(predicted) < 0).mean())
