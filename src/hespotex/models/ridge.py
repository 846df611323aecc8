"""Ridge regression of all genes on the image features: the baseline that every network must beat.

Penalty and number of principal components are chosen by cross-validation inside the training sections. One
eigendecomposition of the features' covariance serves all of both; only moments are kept, so memory grows with
the square of the number of features and not with the number of observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .._logging import logger
from ..data.section import Prediction, Section
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._inner import Scaler, gene_correlation, inner_folds, of_shape, read_features, row_blocks
from ._moments import Moments, Spectrum, decompose, nan_mean, solve
from ._registry import register

__all__ = ["Ridge", "RidgeConfig"]

_READ_ROWS = 4096
_FALLBACK_PENALTY = 1.0  # where there are too few observations to choose


@dataclass(frozen=True)
class RidgeConfig:
    """Settings of :class:`Ridge`.

    Attributes
    ----------
    penalties
        Candidates for the penalty, as multiples of the number of training observations: with standardised features
        a value of 1 is the average eigenvalue of their Gram matrix, whatever its size (scikit-learn's
        ``alpha`` is `penalty` times the number of observations).
    components
        Candidates for the number of leading principal components regressed on; ``None`` means all features. Those
        that are not fewer than the features count as ``None``.
    score_rows
        At most so many rows of each held-out section are scored when choosing, evenly spread.
    """

    penalties: tuple[float, ...] = tuple(float(10.0**exponent) for exponent in np.arange(-3, 3.25, 0.5))
    components: tuple[int | None, ...] = (32, 64, 128, 256, 512, None)
    score_rows: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalties", tuple(map(float, self.penalties)))
        object.__setattr__(self, "components", tuple(None if c is None else int(c) for c in self.components))
        if not self.penalties or min(self.penalties) <= 0:
            raise DataValueError(f"penalties={self.penalties} must be positive and at least one")
        if not self.components or min((c for c in self.components if c is not None), default=1) < 1:
            raise DataValueError(f"components={self.components} must be None or at least 1")
        if self.score_rows < 2:
            raise DataValueError(f"score_rows={self.score_rows} must be at least 2")


@dataclass(eq=False)
class _Frame:
    """Coordinates that the regression works in: standardised features, turned into their span if that is smaller."""

    centre: np.ndarray  # (d,)
    scale: np.ndarray  # (d,), 0 for constant features
    level: np.ndarray  # (G,), mean target
    basis: np.ndarray | None  # (d, r), orthonormal; None for the features themselves

    @property
    def width(self) -> int:
        return len(self.centre) if self.basis is None else self.basis.shape[1]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        x = (features - self.centre) * self.scale
        return x if self.basis is None else x @ self.basis

    def weights(self, turned: np.ndarray) -> np.ndarray:
        """Weights of the raw features from weights of the coordinates."""
        return self.scale[:, None] * (turned if self.basis is None else self.basis @ turned)


@register
class Ridge(Model[RidgeConfig]):
    """Ridge regression on standardised features, with an optional projection on principal components.

    The candidate with the highest mean Pearson r per gene *within held-out sections* is taken; groups (patients)
    are held out if there are two or more, else sections, else four spatial blocks of the one section.
    All candidates and their scores are kept in :attr:`choices`.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> features = rng.normal(size=(60, 3))
    >>> counts = np.exp(features[:, :1])
    >>> targets = Targets(counts, np.ones(60), ("A",), unit="counts")
    >>> section = Section("s", np.arange(60).astype(str), features, rng.uniform(size=(60, 2)), targets=targets)
    >>> model = models.create("ridge").fit([section])
    >>> model.predict(section).mean.shape
    (60, 1)
    """

    Config: ClassVar[type] = RidgeConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="ridge",
        summary="Ridge regression on the embedding; penalty and PCA size by inner cross-validation",
        cost="seconds; grows with spots × features²",
        presets=("default",),
    )

    penalty: float
    components: int | None
    choices: list[dict[str, Any]]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose penalty and components on held-out training sections, then fit on all of them."""
        frame = _frame(sections)

        def moments(rows_of_section: Mapping[int, np.ndarray]) -> Moments:
            return _accumulate(sections, rows_of_section, frame)

        total = moments({index: np.arange(section.n_obs) for index, section in enumerate(sections)})
        candidates = self._candidates()
        kind, folds = inner_folds(sections)
        if folds and len(candidates) > 1:
            scores = [
                _score(sections, fold, frame, decompose(total - moments(fold)), candidates, self.config.score_rows)
                for fold in (fold.held_out for fold in folds)
            ]
            mean = nan_mean(np.concatenate(scores))
        else:
            kind, mean = "none", np.full(len(candidates), np.nan)
        if np.isfinite(mean).any():
            best = int(np.nanargmax(mean))
            self.scores = {"inner_pearson": float(mean[best])}
        else:
            best = min(range(len(candidates)), key=lambda i: abs(np.log(candidates[i][1] / _FALLBACK_PENALTY)))
        self.components, self.penalty = candidates[best]
        self.choices = [
            {"components": size, "penalty": penalty, "pearson": None if np.isnan(score) else float(score)}
            for (size, penalty), score in zip(candidates, mean, strict=True)
        ]
        self._chosen_by = kind
        logger.info("ridge: components=%s, penalty=%g chosen by %s", self.components, self.penalty, kind)
        spectrum = decompose(total)
        turned = solve(spectrum, self.components, self.penalty)
        weights = frame.weights(turned)
        self._weights = weights.astype(np.float32)
        self._intercept = (frame.level + spectrum.level - spectrum.centre @ turned - frame.centre @ weights).astype(
            np.float32
        )

    def _candidates(self) -> list[tuple[int | None, float]]:
        sizes = dict.fromkeys(None if c is None or c >= self.n_features else c for c in self.config.components)
        return [(size, penalty) for size in sizes for penalty in self.config.penalties]

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield one matrix product per block."""
        self._check_section(section)
        for rows in row_blocks(section.n_obs, block_rows):
            mean = read_features(section, rows) @ self._weights + self._intercept
            yield Prediction(np.asarray(section.ids)[rows], self.genes, self.unit, mean)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights, intercept and how they were chosen."""
        values = {
            "penalty": self.penalty,
            "components": self.components,
            "choices": self.choices,
            "chosen_by": self._chosen_by,
        }
        return {"weights": self._weights, "intercept": self._intercept}, values

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        genes = len(self.genes)
        self._weights = of_shape(arrays["weights"], (self.n_features, genes), "weights")
        self._intercept = of_shape(arrays["intercept"], (genes,), "intercept")
        self.penalty, self.components = values["penalty"], values["components"]
        self.choices, self._chosen_by = values["choices"], values["chosen_by"]


def _frame(sections: Sequence[Section]) -> _Frame:
    n = sum(section.n_obs for section in sections)
    scaler = Scaler.fit(sections)
    level = np.zeros(len(sections[0].require_targets().genes))
    for section in sections:
        targets = section.require_targets()
        for rows in row_blocks(section.n_obs, _READ_ROWS):
            level += targets[rows].sum(axis=0, dtype=np.float64)
    frame = _Frame(scaler.mean.astype(np.float64), scaler.inverse.astype(np.float64), level / n, None)
    if n < len(scaler.mean):  # the rows fit where the Gram matrix of the features would have to
        frame.basis = _span(np.concatenate([frame(read_features(section)) for section in sections]))
    return frame


def _span(rows: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the row space, (d, r), from the small Gram matrix of the rows."""
    from scipy.linalg import eigh

    values, vectors = eigh(rows @ rows.T, check_finite=False)
    kept = values > 1e-10 * max(values[-1], 1e-30)
    return rows.T @ (vectors[:, kept] / np.sqrt(values[kept]))


def _accumulate(sections: Sequence[Section], rows_of_section: Mapping[int, np.ndarray], frame: _Frame) -> Moments:
    width, genes = frame.width, len(frame.level)
    sums = Moments(0, np.zeros(width), np.zeros(genes), np.zeros((width, width)), np.zeros((width, genes)))
    for index, rows in rows_of_section.items():
        targets = sections[index].require_targets()
        for block in row_blocks(len(rows), _READ_ROWS):
            x = frame(read_features(sections[index], rows[block]))
            y = targets[rows[block]] - frame.level
            sums.n += len(x)
            sums.x += x.sum(axis=0)
            sums.y += y.sum(axis=0)
            sums.xx += x.T @ x
            sums.xy += x.T @ y
    return sums


def _score(
    sections: Sequence[Section],
    held_out: Mapping[int, np.ndarray],
    frame: _Frame,
    spectrum: Spectrum,
    candidates: Sequence[tuple[int | None, float]],
    score_rows: int,
) -> np.ndarray:
    """Mean Pearson r of every candidate in every held-out section, (sections, candidates)."""
    width = len(spectrum.values)
    sizes = sorted({width if size is None else min(size, width) for size, _ in candidates})
    scores = np.full((len(held_out), len(candidates)), np.nan)
    for row, (index, held) in enumerate(held_out.items()):
        held = held[np.linspace(0, len(held) - 1, min(len(held), score_rows)).astype(np.int64)]
        position = ((frame(read_features(sections[index], held)) - spectrum.centre) @ spectrum.axes).astype(np.float32)
        measured = sections[index].require_targets()[held]
        found: dict[tuple[int, float], float] = {}
        for penalty in {penalty for _, penalty in candidates}:
            along = (spectrum.along / (spectrum.values + penalty)[:, None]).astype(np.float32)
            predicted = np.zeros(measured.shape, dtype=np.float32)  # a constant changes no correlation
            for start, stop in zip([0, *sizes], sizes, strict=False):
                predicted += position[:, start:stop] @ along[start:stop]
                r = gene_correlation(measured, predicted)
                found[stop, penalty] = float(np.nanmean(r)) if np.isfinite(r).any() else float("nan")
        scores[row] = [found[width if size is None else min(size, width), penalty] for size, penalty in candidates]
    return scores
