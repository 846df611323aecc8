"""Errors of a prediction, per gene within one section, and skill against the training mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from ..errors import DataValueError
from ._inputs import NanPolicy, is_undefined, pair_of, per_gene

__all__ = ["deviance_explained", "mae", "mse", "nrmse", "r2", "rmse"]


def _scored(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    measured: np.ndarray,
    predicted: np.ndarray,
    nan_policy: str,
) -> np.ndarray:
    """`score` of all genes; unmeasured and constant ones are NaN."""
    measured, predicted = pair_of(measured, predicted, nan_policy)
    result = per_gene(score, measured, predicted)
    result[is_undefined(measured)] = np.nan
    return result


def mse(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Mean squared error of every gene, (G,); NaN where the gene was not measured or is constant.

    Parameters as in :func:`pearson`. A constant measurement is left out like everywhere else, so that all
    metrics of a table speak of the same genes.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import mse
    >>> mse(np.array([0.0, 2.0]), np.array([1.0, 2.0]))
    array([0.5])
    """
    return _scored(_mean_square, measured, predicted, nan_policy)


def _mean_square(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return ((measured - predicted) ** 2).mean(axis=0)


def rmse(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Root of :func:`mse`, (G,)."""
    return np.sqrt(mse(measured, predicted, nan_policy=nan_policy))


def mae(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Mean absolute error of every gene, (G,); rules as in :func:`mse`."""
    return _scored(lambda y, p: np.abs(y - p).mean(axis=0), measured, predicted, nan_policy)


def nrmse(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """:func:`rmse` over the standard deviation (population) of the measurement, (G,); NaN for constant genes."""

    def ratio(y: np.ndarray, p: np.ndarray) -> np.ndarray:
        spread = y.std(axis=0)
        return np.divide(
            np.sqrt(_mean_square(y, p)), spread, out=np.full(y.shape[1], np.nan), where=np.nan_to_num(spread) > 0
        )

    return _scored(ratio, measured, predicted, nan_policy)


def r2(
    measured: np.ndarray,
    predicted: np.ndarray,
    training_mean: np.ndarray | None,
    *,
    nan_policy: NanPolicy = "raise",
) -> np.ndarray:
    """Share of squared error removed relative to predicting the training mean.

    Parameters
    ----------
    measured, predicted, nan_policy
        As in :func:`pearson`.
    training_mean
        Mean of each gene over the training observations in the same unit, (G,): the error of a legal
        predictor; NaN for a gene that training did not measure, whose result is NaN too. ``None`` takes the section's own mean, which no predictor may know: descriptive only.

    Returns
    -------
    (G,): ``1 - sum (y - p)^2 / sum (y - m)^2``; NaN for constant or unmeasured genes.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import r2
    >>> r2(np.array([0.0, 2.0]), np.array([0.0, 1.0]), np.array([1.0]))
    array([0.5])
    """
    measured, predicted = pair_of(measured, predicted, nan_policy)
    if training_mean is None:
        reference = measured.mean(axis=0, dtype=np.float64)
    else:
        reference = np.asarray(training_mean, dtype=np.float64).ravel()
        if reference.shape != (measured.shape[1],) or np.isinf(reference).any():
            raise DataValueError(f"training_mean must be {measured.shape[1]} finite values, one per gene")
    unexplained = per_gene(_mean_square, measured, predicted)
    baseline = per_gene(_mean_square, measured, np.broadcast_to(reference, measured.shape))
    defined = ~is_undefined(measured) & ~np.isnan(reference)
    return 1 - np.divide(unexplained, baseline, out=np.full(measured.shape[1], np.nan), where=defined)


def deviance_explained(
    counts: np.ndarray,
    predicted: np.ndarray,
    library_size: np.ndarray,
    training_share: np.ndarray,
    *,
    family: Literal["poisson", "nb"] = "poisson",
    dispersion: np.ndarray | float = 1.0,
    nan_policy: NanPolicy = "raise",
) -> np.ndarray:
    """Share of count deviance removed relative to a model that knows only the size factors.

    Parameters
    ----------
    counts
        Raw counts, (n, G).
    predicted
        Expected counts, (n, G); negative values are clipped at 0 (:func:`clipped_fraction` reports how many).
    library_size
        Total count of each observation over all genes, (n,).
    training_share
        Share of each gene in all training counts, (G,); the reference expects ``library_size * share``.
    family
        ``"poisson"``, or ``"nb"`` with variance ``m + dispersion * m**2``.
    dispersion
        One number or (G,), fitted on training data; used by ``"nb"``.

    Returns
    -------
    (G,); NaN where the counts are constant.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import deviance_explained
    >>> counts = np.array([[0.0], [4.0]])
    >>> deviance_explained(counts, counts, np.array([10.0, 10.0]), np.array([0.2]))
    array([1.])
    """
    if family not in ("poisson", "nb"):
        raise DataValueError(f"family={family!r} is unknown; possible: 'poisson', 'nb'")
    counts, predicted = pair_of(counts, predicted, nan_policy)
    if np.nanmin(counts, initial=0) < 0:
        raise DataValueError("counts has negative values")
    expected = np.asarray(library_size, dtype=np.float64)[:, None] * np.asarray(training_share, dtype=np.float64)
    over = np.broadcast_to(np.asarray(dispersion, dtype=np.float64), (counts.shape[1],))
    if family == "nb" and not (over > 0).all():
        raise DataValueError("dispersion must be positive for family='nb'")

    def deviance(mean: np.ndarray) -> np.ndarray:
        from scipy.special import xlogy

        y, m = counts.astype(np.float64), np.maximum(mean, 1e-12)  # a mean of 0 makes any count infinitely unlikely
        if family == "poisson":
            return 2 * (xlogy(y, y / m) - (y - m)).sum(axis=0)
        return 2 * (xlogy(y, y / m) - (y + 1 / over) * np.log((1 + over * y) / (1 + over * m))).sum(axis=0)

    reference, left = deviance(expected), deviance(predicted.astype(np.float64))
    defined = ~is_undefined(counts) & (reference > 0)
    return 1 - np.divide(left, reference, out=np.full(counts.shape[1], np.nan), where=defined)
