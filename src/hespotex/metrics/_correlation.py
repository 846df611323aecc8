"""Correlation of measured and predicted expression, per gene within one section."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._inputs import NanPolicy, is_flat, is_undefined, pair_of, per_gene

__all__ = ["pearson", "spearman"]


def _unit_columns(values: np.ndarray) -> np.ndarray:
    """Columns centred and scaled to length 1; a column without spread becomes 0."""
    centred = values - values.mean(axis=0)
    largest = np.abs(centred).max(axis=0)
    centred = np.divide(centred, largest, out=np.zeros_like(centred), where=largest > 0)  # squares cannot underflow
    length = np.sqrt((centred * centred).sum(axis=0))
    return np.divide(centred, length, out=centred, where=length > 0)


def _correlation(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return np.clip((_unit_columns(measured) * _unit_columns(predicted)).sum(axis=0), -1, 1)


def _rank_correlation(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return _correlation(rankdata(measured, axis=0), rankdata(predicted, axis=0))


def _with_rules(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], measured: np.ndarray, predicted: np.ndarray, nan_policy: str
) -> np.ndarray:
    measured, predicted = pair_of(measured, predicted, nan_policy)
    undefined, flat = is_undefined(measured), is_flat(predicted)
    result = np.where(flat, 0.0, np.nan)
    scored = ~undefined & ~flat
    result[scored] = per_gene(score, measured[:, scored], predicted[:, scored])
    result[undefined] = np.nan
    return result


def pearson(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Pearson correlation of every gene over the observations of one section.

    Parameters
    ----------
    measured, predicted
        (n, G) in the same unit and order; (n,) is one gene. A column of NaN in `measured` is an unmeasured gene.
    nan_policy
        ``"raise"``, or ``"zero"`` to read values of `predicted` that are not finite as 0.

    Returns
    -------
    (G,) float64. NaN where the measurement is constant (variance up to 1e-12) or missing; 0 where the
    prediction is constant, as a flat map is a wrong answer, not a missing one.

    Raises
    ------
    DataValueError
        If shapes differ, nothing is given, or values are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import pearson
    >>> measured = np.array([[0.0, 1, 5], [1, 1, 6], [2, 1, 7]])
    >>> predicted = np.array([[1.0, 1, 2], [3, 2, 2], [5, 3, 2]])
    >>> pearson(measured, predicted)
    array([ 1., nan,  0.])
    """
    return _with_rules(_correlation, measured, predicted, nan_policy)


def spearman(measured: np.ndarray, predicted: np.ndarray, *, nan_policy: NanPolicy = "raise") -> np.ndarray:
    """Spearman correlation of every gene over the observations of one section; ties get their average rank.

    Parameters, result and rules for constants as in :func:`pearson`.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import spearman
    >>> spearman(np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 10, 1000]))
    array([1.])
    """
    return _with_rules(_rank_correlation, measured, predicted, nan_policy)
