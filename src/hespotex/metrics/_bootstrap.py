"""Intervals: spatial blocks within a section, patients in a cohort, and paired differences between models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataValueError
from ._inputs import CONSTANT_VARIANCE, NanPolicy, is_undefined, pair_of

__all__ = ["Interval", "PairedDifference", "block_draws", "block_interval", "paired_difference", "resample_interval"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval."""

    estimate: float
    lower: float
    upper: float
    level: float = 0.95


def block_draws(
    measured: np.ndarray,
    predicted: np.ndarray,
    blocks: np.ndarray,
    *,
    n_draws: int = 1000,
    seed: int | list[int] = 0,
    nan_policy: NanPolicy = "raise",
) -> np.ndarray:
    """Mean Pearson correlation over genes in bootstrap draws of spatial blocks of one section.

    Neighbouring observations are alike, so single observations must not be drawn. The same `seed` and blocks
    give the same draws: subtract the draws of two models for a paired interval. For an interval of the mean of several
    sections, average their draws, each section with a `seed` of its own.

    Parameters
    ----------
    measured, predicted, nan_policy
        As in :func:`pearson`.
    blocks
        Block of each observation, (n,), from :func:`hespotex.data.splits.spatial_blocks`.
    n_draws
        Number of draws.
    seed
        Seed of the draws, or several numbers that make one.

    Returns
    -------
    (n_draws,); NaN where no gene varies in a draw.

    Raises
    ------
    DataValueError
        With fewer than two blocks.
    """
    measured, predicted = pair_of(measured, predicted, nan_policy)
    names, block = np.unique(np.asarray(blocks), return_inverse=True)
    if len(block) != len(measured):
        raise DataValueError(f"blocks has {len(block)} entries for {len(measured)} observations")
    if len(names) < 2:
        raise DataValueError("blocks holds a single block; an interval needs at least two, better ten or more")
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_draws).astype(np.float64)
    size = times @ np.bincount(block, minlength=len(names))

    total, defined = np.zeros(n_draws), np.zeros(n_draws)
    genes = np.flatnonzero(~is_undefined(measured))
    width = max(1, 2**22 // max(n_draws, len(measured)))
    for start in range(0, len(genes), width):
        chosen = genes[start : start + width]
        y, p = measured[:, chosen].astype(np.float64), predicted[:, chosen].astype(np.float64)
        y, p = y - y.mean(axis=0), p - p.mean(axis=0)  # centred first: the moments below cannot cancel badly
        scale_p = np.abs(p).max(axis=0)
        p = np.divide(p, scale_p, out=np.zeros_like(p), where=scale_p > 0)

        def drawn(values: np.ndarray) -> np.ndarray:
            sums = np.zeros((len(names), values.shape[1]))
            np.add.at(sums, block, values)
            return times @ sums / size[:, None]

        mean_y, mean_p = drawn(y), drawn(p)
        var_y, var_p = drawn(y * y) - mean_y**2, drawn(p * p) - mean_p**2
        covariance = drawn(y * p) - mean_y * mean_p
        varies, moves = var_y > CONSTANT_VARIANCE, var_p > CONSTANT_VARIANCE
        spread = np.sqrt(np.where(varies & moves, var_y * var_p, 1))
        r = np.where(varies & moves, covariance / spread, 0.0)
        total += np.where(varies, r, 0).sum(axis=1)
        defined += varies.sum(axis=1)
    return np.divide(total, defined, out=np.full(n_draws, np.nan), where=defined > 0)


def resample_interval(estimate: float, draws: np.ndarray, *, level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap `draws`, moved by their bias: their mean comes to lie on `estimate`.

    A draw of blocks lacks some of the section and holds others twice, which lowers its correlations a little. NaN
    draws are left out.
    """
    if not 0 < level < 1:
        raise DataValueError(f"level={level} must lie between 0 and 1")
    draws = np.asarray(draws, dtype=np.float64)
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return Interval(estimate, float("nan"), float("nan"), level)
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) + (estimate - draws.mean())
    return Interval(float(estimate), float(lower), float(upper), level)


def block_interval(
    measured: np.ndarray,
    predicted: np.ndarray,
    blocks: np.ndarray,
    *,
    level: float = 0.95,
    n_draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean Pearson correlation of one section with its spatial-block bootstrap interval.

    Says how sure the value is for *this* section; it says nothing about other patients.

    Parameters as in :func:`block_draws`.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import block_interval
    >>> truth = np.random.default_rng(0).normal(size=(100, 5))
    >>> block_interval(truth, truth, np.arange(100) // 10).lower > 0.99
    True
    """
    from ._correlation import pearson

    r = pearson(measured, predicted)
    r = r[~np.isnan(r)]
    draws = block_draws(measured, predicted, blocks, n_draws=n_draws, seed=seed)
    return resample_interval(float(r.mean()) if r.size else float("nan"), draws, level=level)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two models over patients.

    Attributes
    ----------
    interval
        Mean difference with its bootstrap interval over patients.
    p_value
        Two-sided sign-flip test: exact up to 16 patients, by 20,000 random flips beyond.
    n
        Patients compared. The p-value cannot be below ``2 / 2**n``.
    """

    interval: Interval
    p_value: float
    n: int


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, level: float = 0.95, n_draws: int = 5000, seed: int = 0
) -> PairedDifference:
    """Compare two models by their differences over patients.

    Parameters
    ----------
    first, second
        One score per patient and model, in one order (level ``"patient"`` of :func:`aggregate`), (P,).
    level, n_draws, seed
        Of the bootstrap over patients.

    Examples
    --------
    >>> from hespotex.metrics import paired_difference
    >>> result = paired_difference([0.3, 0.4, 0.5], [0.2, 0.2, 0.2])
    >>> round(result.interval.estimate, 3), result.p_value
    (0.2, 0.25)
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if difference.ndim != 1 or not difference.size or not np.isfinite(difference).all():
        raise DataValueError("first and second must hold one finite score per patient, in the same order")
    n, rng = len(difference), np.random.default_rng(seed)
    draws = difference[rng.integers(n, size=(n_draws, n))].mean(axis=1)
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.vstack([np.ones(n, dtype=np.int64), rng.choice([-1, 1], size=(20000, n))])  # the observed one counts
    flipped = np.abs(signs @ difference)
    p_value = float((flipped >= abs(difference.sum()) * (1 - 1e-12)).mean())
    return PairedDifference(resample_interval(float(difference.mean()), draws, level=level), p_value, n)
