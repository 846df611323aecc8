"""What every metric asks of its two matrices, and when a gene counts as constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, get_args

import numpy as np

from ..errors import DataValueError

__all__ = ["CONSTANT_VARIANCE", "NanPolicy", "is_flat", "is_undefined", "pair_of", "per_gene"]

NanPolicy = Literal["raise", "zero"]
CONSTANT_VARIANCE: Final = 1e-12  # measured variance up to which a gene says nothing about a prediction
_BLOCK_VALUES: Final = 2**22  # entries per block of genes: bounds the float64 copies to tens of MB


def _matrix(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise DataValueError(f"{name} must be (n, G), got {array.ndim} dimensions")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    return array


def pair_of(measured: np.ndarray, predicted: np.ndarray, nan_policy: str = "raise") -> tuple[np.ndarray, np.ndarray]:
    """Both matrices as floating (n, G), or an error saying what is wrong with them.

    Raises
    ------
    DataValueError
        If shapes differ, there is no observation, the prediction is not finite (unless
        ``nan_policy="zero"``), or the measurement is not finite anywhere but in whole columns
        (a whole column of NaN is an unmeasured gene).
    """
    if nan_policy not in get_args(NanPolicy):
        raise DataValueError(f"nan_policy={nan_policy!r} is unknown; possible: 'raise', 'zero'")
    truth, guess = _matrix(measured, "measured"), _matrix(predicted, "predicted")
    if truth.shape != guess.shape:
        raise DataValueError(f"measured has shape {truth.shape}, predicted {guess.shape}; they must be equal")
    if truth.shape[0] == 0:
        raise DataValueError("measured has no observations")
    bad = ~np.isfinite(truth)
    if bad.any() and not (np.isnan(truth[:, bad.any(axis=0)])).all():
        raise DataValueError(
            f"measured has {int(bad.sum())} values that are not finite; only a whole column of NaN (a gene that was not "
            "measured) is allowed: drop the observations concerned"
        )
    wrong = ~np.isfinite(guess)
    if wrong.any():
        if nan_policy == "raise":
            raise DataValueError(
                f"predicted has {int(wrong.sum())} values that are not finite, in {int(wrong.any(axis=0).sum())} genes; "
                "repair the prediction, or score them as 0 with nan_policy='zero'"
            )
        guess = np.where(wrong, 0, guess)
    return truth, guess


def is_undefined(measured: np.ndarray) -> np.ndarray:
    """Genes (G,) on which no metric is defined: unmeasured, or constant in this section."""
    with np.errstate(invalid="ignore"):
        variance = measured.var(axis=0, dtype=np.float64)
    return ~(variance > CONSTANT_VARIANCE) | is_flat(measured)


def is_flat(values: np.ndarray) -> np.ndarray:
    """Columns (G,) that are constant up to the rounding of their dtype.

    A relative rule, so that the unit of a prediction does not decide whether it is a map or a constant.
    """
    spread = values.max(axis=0) - values.min(axis=0)
    return ~(spread > 8 * np.finfo(values.dtype).eps * np.abs(values).max(axis=0))


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    width = max(1, _BLOCK_VALUES // max(1, shape[0]))
    for start in range(0, shape[1], width):
        yield slice(start, start + width)


def per_gene(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], measured: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    """Apply `score` to blocks of genes in float64, so that memory does not grow with the panel; (G,)."""
    result = np.full(measured.shape[1], np.nan)
    for genes in _blocks(measured.shape):
        result[genes] = score(measured[:, genes].astype(np.float64), predicted[:, genes].astype(np.float64))
    return result
