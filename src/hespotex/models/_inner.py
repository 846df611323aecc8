"""What the baselines share: row blocks, and the inner cross-validation that chooses their settings on training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ..data.section import Rows, Section, rows_of
from ..errors import CheckpointError, DataValueError

__all__ = [
    "InnerFold",
    "Scaler",
    "gene_correlation",
    "inner_folds",
    "of_shape",
    "read_features",
    "row_blocks",
    "within_section_score",
]

_READ_ROWS = 4096
# Enough to tell settings apart; leaving out each of dozens of groups would cost minutes and choose the same.
MAX_FOLDS = 8
# Fewer observations cannot be split into blocks that a correlation makes sense on.
MIN_TO_SPLIT = 12


@dataclass(frozen=True, eq=False)
class InnerFold:
    """Rows that one round of the inner cross-validation holds out.

    Attributes
    ----------
    held_out
        Per section (by position in the training set) the held-out rows; all others are fitted on.
    """

    held_out: dict[int, np.ndarray]

    def kept(self, sections: Sequence[Section]) -> dict[int, np.ndarray]:
        """Per section the rows that are fitted on; sections without any are absent."""
        kept = {
            index: np.setdiff1d(np.arange(section.n_obs), self.held_out.get(index, np.empty(0, dtype=np.int64)))
            for index, section in enumerate(sections)
        }
        return {index: rows for index, rows in kept.items() if len(rows)}


def inner_folds(sections: Sequence[Section]) -> tuple[str, list[InnerFold]]:
    """How to hold out parts of the training set: whole groups, else whole sections, else blocks of the one section.

    Returns
    -------
    ``"group"``, ``"section"``, ``"block"`` or ``"none"`` (too few observations), and the folds. With more than eight
    groups, several share a fold.
    """
    groups = list(dict.fromkeys(str(section.group) for section in sections))
    if len(groups) >= 2:
        kind, names = "group", [str(section.group) for section in sections]
    elif len(sections) >= 2:
        kind, names = "section", [section.name for section in sections]
    else:
        blocks = _spatial_blocks(sections[0])
        return ("block" if blocks else "none"), [InnerFold({0: rows}) for rows in blocks]
    order = list(dict.fromkeys(names))
    n_folds = min(len(order), MAX_FOLDS)
    fold_of = {name: position % n_folds for position, name in enumerate(order)}
    held: list[dict[int, np.ndarray]] = [{} for _ in range(n_folds)]
    for index, (section, name) in enumerate(zip(sections, names, strict=True)):
        held[fold_of[name]][index] = np.arange(section.n_obs)
    return kind, [InnerFold(rows) for rows in held]


def _spatial_blocks(section: Section) -> list[np.ndarray]:
    """Rows of four compact blocks of equal size: halves along the longer axis, each halved along the other."""
    if section.n_obs < MIN_TO_SPLIT:
        return []
    position = np.asarray(section.coordinates, dtype=float)
    long = int(np.argmax(np.ptp(position, axis=0)))
    blocks = []
    for half in np.array_split(np.argsort(position[:, long], kind="stable"), 2):
        across = half[np.argsort(position[half, 1 - long], kind="stable")]
        blocks += [np.sort(rows) for rows in np.array_split(across, 2)]
    return blocks


def row_blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices that cover ``range(n)``."""
    if size < 1:
        raise DataValueError(f"block_rows={size} must be at least 1")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def read_features(section: Section, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """Features of some rows, dense float32.

    Raises
    ------
    DataValueError
        If one is not finite.
    """
    block = np.ascontiguousarray(rows_of(section.features, rows), dtype=np.float32)
    if not np.isfinite(block).all():
        raise DataValueError(
            f"section {section.name!r} has features that are NaN or infinite; embed it anew with hx.pp.embed"
        )
    return block


@dataclass(frozen=True, eq=False)
class Scaler:
    """Standardisation of features by mean and spread over training observations; constant features become 0.

    Attributes
    ----------
    mean, inverse
        Mean and reciprocal standard deviation, (d,) float32; the reciprocal is 0 where a feature is constant.
    """

    mean: np.ndarray
    inverse: np.ndarray

    @classmethod
    def fit(cls, sections: Sequence[Section], chosen: Sequence[np.ndarray] | None = None) -> Self:
        """Read all features once, in row blocks; of each section only the observations `chosen`, (n,) bool, count."""
        shift = read_features(sections[0], slice(0, _READ_ROWS)).mean(axis=0, dtype=np.float64)
        n, total, square = 0, np.zeros_like(shift), np.zeros_like(shift)
        for index, section in enumerate(sections):
            for rows in row_blocks(section.n_obs, _READ_ROWS):
                x = read_features(section, rows) - shift  # without the shift the sum of squares would cancel
                x = x if chosen is None else x[chosen[index][rows]]
                n, total, square = n + len(x), total + x.sum(axis=0), square + (x * x).sum(axis=0)
        variance = square / n - (total / n) ** 2
        varies = variance > 1e-10 * np.maximum(square / n, 1e-30)
        inverse = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
        return cls((shift + total / n).astype(np.float32), inverse.astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Standardised features, float32."""
        return (features - self.mean) * self.inverse

    def state(self) -> dict[str, np.ndarray]:
        """Arrays, by the names that :meth:`from_state` reads."""
        return {"feature_mean": self.mean, "feature_inverse": self.inverse}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(np.asarray(arrays["feature_mean"]), np.asarray(arrays["feature_inverse"]))


def gene_correlation(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson r of each gene, (G,): NaN where the measurement is constant, 0 where only the prediction is."""
    y = measured - measured.mean(axis=0, dtype=np.float64)
    p = predicted - predicted.mean(axis=0, dtype=np.float64)
    yy, pp = (y * y).mean(axis=0), (p * p).mean(axis=0)
    defined, varies = yy > 1e-12, pp > 1e-12
    scale = np.sqrt(np.where(defined & varies, yy * pp, 1.0))
    r = np.where(varies, (y * p).mean(axis=0) / scale, 0.0)
    return np.where(defined, r, np.nan)


def of_shape(array: np.ndarray, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """A stored array, or an error if it has not the shape that genes and features ask for; ``None``: any length."""
    array = np.asarray(array)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise CheckpointError(
            f"the saved model's {name!r} has shape {array.shape}, its genes and features ask for {shape}"
        )
    return array


def within_section_score(measured: Rows, predicted: np.ndarray) -> float:
    """Mean over genes of Pearson r within one section; NaN if no gene varies."""
    r = gene_correlation(rows_of(measured), predicted)
    return float(np.nanmean(r)) if np.isfinite(r).any() else float("nan")
