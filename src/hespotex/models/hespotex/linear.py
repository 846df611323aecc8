"""Regression onto the target space in closed form, linear or with a kernel, which joins the networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from .._inner import gene_correlation
from .targets import TargetSpace

if TYPE_CHECKING:
    from ...data.section import Section
    from .._inner import InnerFold
    from .inputs import SectionInputs

__all__ = ["KernelFeatures", "Regression"]

# As multiples of the number of observations times the mean variance of a feature.
PENALTIES = tuple(float(10.0**exponent) for exponent in np.arange(-3.0, 1.75, 0.5))
_FLOOR = 1e-9  # of the penalty proper, for features that do not vary; those that do are of the order of 1
_FALLBACK = 0.1  # where there is nothing to choose on
_FIT_ROWS = 16384  # observations, evenly spread, that are regressed on: beyond, nothing is gained but cost
_SCORE_ROWS = 2048  # of each held-out section, evenly spread


_KERNEL_WEIGHT = 2.0  # of the Gaussian kernel beside the linear one; both are 1 on the diagonal
_MEDIAN_ROWS = 1024  # landmarks that the width of the kernel is taken from


@dataclass(frozen=True, eq=False)
class KernelFeatures:
    """Linear features beside those of a Gaussian kernel (Nyström's approximation, exact if all rows are landmarks).

    Attributes
    ----------
    landmarks
        Training observations that the kernel is spanned by, (m, d) float32.
    projection
        Inverse square root of the landmarks' kernel matrix, (m, m') float32.
    width
        Squared distance at which the kernel falls to 1/e.
    """

    landmarks: np.ndarray
    projection: np.ndarray
    width: float

    @classmethod
    def fit(cls, features: Sequence[np.ndarray | SectionInputs], n_landmarks: int) -> Self:
        """Take evenly spread rows of `features` as landmarks and the median of their squared distances as width."""
        from scipy.linalg import eigh

        step = -(-sum(map(len, features)) // n_landmarks)
        landmarks = np.concatenate([each[::step] for each in features])
        distances = _squared_distances(landmarks, landmarks)
        several = distances[:_MEDIAN_ROWS, :_MEDIAN_ROWS]
        width = float(np.median(several[several > 0])) if (several > 0).any() else 1.0
        values, vectors = eigh(np.exp(-distances / width, dtype=np.float64), check_finite=False)
        kept = values > 1e-6 * values[-1]
        projection = np.ascontiguousarray(vectors[:, kept] / np.sqrt(values[kept]), dtype=np.float32)
        return cls(landmarks, projection, width)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, d) → (n, d + m')."""
        kernel = np.exp(-_squared_distances(features, self.landmarks) / self.width) @ self.projection
        linear = features / np.float32(np.sqrt(features.shape[1]))
        return np.concatenate([linear, np.float32(np.sqrt(_KERNEL_WEIGHT)) * kernel], axis=1)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Arrays and plain values."""
        return {"landmarks": self.landmarks, "projection": self.projection}, {"width": self.width}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], values: Mapping[str, float]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(arrays["landmarks"], arrays["projection"], values["width"])


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None]
    return np.maximum(squares - 2 * (a @ b.T), 0.0)


@dataclass(frozen=True, eq=False)
class Regression:
    """Ridge regression from the image stream's features to the target space.

    Attributes
    ----------
    weights, intercept
        (d, width) and (width,) float32.
    """

    weights: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(
        cls,
        sections: Sequence[Section],
        features: Sequence[np.ndarray | SectionInputs],
        targets: Sequence[np.ndarray],
        folds: Sequence[InnerFold],
        space: TargetSpace,
        ranks: Sequence[int],
        *,
        kernel: KernelFeatures | None = None,
    ) -> tuple[Self, int, float | None]:
        """Choose penalty and rank on `folds`, fit on all.

        Parameters
        ----------
        sections
            Training sections, for their measured expression.
        features, targets
            Of each section, (n, d) and (n, width) in `space`.
        folds
            Left-out parts of the training set; without any, the largest rank and a middling penalty are taken.
        space
            Target space of the largest rank.
        ranks
            Candidates, ascending; empty to keep the width of `space`.
        kernel
            Applied to the features first.

        Returns
        -------
        The regression on all sections, the rank, and their mean r on `folds` where there are any.
        """
        ranks = [rank for rank in ranks if rank < space.width] + [space.width]
        step = -(-sum(map(len, features)) // _FIT_ROWS)
        kept = [np.arange(0, len(each), step) for each in features]
        x = [each[::step] if kernel is None else kernel(each[::step]) for each in features]
        y = [each[::step] for each in targets]
        total = _Sums.over(x, y, {index: np.arange(len(each)) for index, each in enumerate(x)})
        scores: list[np.ndarray] = []
        for fold in folds:
            held_out = {index: np.flatnonzero(np.isin(kept[index], rows)) for index, rows in fold.held_out.items()}
            ridge = _Ridge.of(total - _Sums.over(x, y, held_out))
            for index, held in held_out.items():
                rows = held[np.linspace(0, len(held) - 1, min(len(held), _SCORE_ROWS)).astype(np.int64)]
                measured = sections[index].require_targets()[kept[index][rows]]
                scores.append(_scores(ridge, x[index][rows], measured, space, ranks))
        known = [score for score in scores if np.isfinite(score).all()]
        penalty, rank, score = _FALLBACK, ranks[-1], None
        if known:
            mean = np.mean(known, axis=0)
            best, score = np.unravel_index(np.argmax(mean), mean.shape), float(mean.max())
            penalty, rank = PENALTIES[best[0]], ranks[best[1]]
        weights, intercept = _Ridge.of(total).solve(penalty)
        weights = np.ascontiguousarray(weights[:, :rank], dtype=np.float32)
        return cls(weights, intercept[:rank].astype(np.float32)), rank, score

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, d) → (n, width)."""
        return features @ self.weights + self.intercept

    def state(self) -> dict[str, np.ndarray]:
        """Arrays."""
        return {"weights": self.weights, "intercept": self.intercept}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(arrays["weights"], arrays["intercept"])


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over observations of features, targets and their products."""

    n: int
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray

    @classmethod
    def over(
        cls, features: Sequence[np.ndarray], targets: Sequence[np.ndarray], rows: Mapping[int, np.ndarray]
    ) -> Self:
        d, width = features[0].shape[1], targets[0].shape[1]
        n, sums = 0, [np.zeros(d), np.zeros(width), np.zeros((d, d)), np.zeros((d, width))]
        for index, chosen in rows.items():
            x, y = features[index][chosen], targets[index][chosen]
            n += len(x)
            parts = (x.sum(axis=0, dtype=np.float64), y.sum(axis=0, dtype=np.float64), x.T @ x, x.T @ y)
            sums = [one + part for one, part in zip(sums, parts, strict=True)]
        return cls(n, *sums)

    def __sub__(self, other: _Sums) -> _Sums:
        names = ("n", "x", "y", "xx", "xy")
        return _Sums(*(getattr(self, name) - getattr(other, name) for name in names))


@dataclass(frozen=True, eq=False)
class _Ridge:
    """Eigendecomposition of the features' covariance, which serves all penalties."""

    centre: np.ndarray
    level: np.ndarray
    values: np.ndarray
    axes: np.ndarray
    along: np.ndarray

    @classmethod
    def of(cls, sums: _Sums) -> Self:
        from scipy.linalg import eigh

        centre, level = sums.x / sums.n, sums.y / sums.n
        values, axes = eigh(sums.xx / sums.n - np.outer(centre, centre), check_finite=False)
        return cls(centre, level, np.maximum(values, 0.0), axes, axes.T @ (sums.xy / sums.n - np.outer(centre, level)))

    def solve(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights (d, width) and intercept (width,)."""
        lift = max(penalty * float(self.values.mean()), _FLOOR)
        weights = self.axes @ (self.along / (self.values + lift)[:, None])
        return weights, self.level - self.centre @ weights


def _scores(
    ridge: _Ridge, features: np.ndarray, measured: np.ndarray, space: TargetSpace, ranks: Sequence[int]
) -> np.ndarray:
    """Mean Pearson r over genes within one held-out section, (penalties, ranks)."""
    scores = np.full((len(PENALTIES), len(ranks)), np.nan)
    for row, penalty in enumerate(PENALTIES):
        weights, intercept = ridge.solve(penalty)
        values = (features @ weights + intercept).astype(np.float32)
        for column, rank in enumerate(ranks):
            r = gene_correlation(measured, space.truncated(rank).decode(values[:, :rank]))
            if np.isfinite(r).any():
                scores[row, column] = np.nanmean(r)
    return scores
