"""Nearest neighbours in the space of image features: retrieval from the training sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .._logging import logger
from ..data.section import Prediction, Section
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._inner import Scaler, inner_folds, of_shape, read_features, row_blocks, within_section_score
from ._registry import register

if TYPE_CHECKING:
    from typing import Literal

    Metric = Literal["cosine", "euclidean"]

__all__ = ["KNN", "KNNConfig"]

_METRICS: tuple[Metric, ...] = ("cosine", "euclidean")
_QUERY_ROWS = 1024
_FALLBACK_K = 20  # where there are too few observations to choose


@dataclass(frozen=True)
class KNNConfig:
    """Settings of :class:`KNN`.

    Attributes
    ----------
    neighbours
        Candidates for the number of training observations averaged.
    metrics
        Candidates for the distance between standardised features: ``"cosine"``, ``"euclidean"``.
    score_rows
        At most so many rows of each held-out section are scored when choosing, evenly spread.
    """

    neighbours: tuple[int, ...] = (5, 10, 20, 40, 80)
    metrics: tuple[Metric, ...] = _METRICS
    score_rows: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "neighbours", tuple(map(int, self.neighbours)))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.neighbours or min(self.neighbours) < 1:
            raise DataValueError(f"neighbours={self.neighbours} must be at least 1 and at least one")
        if not self.metrics or not set(self.metrics) <= set(_METRICS):
            raise DataValueError(f"metrics={self.metrics} is unknown; possible: {', '.join(map(repr, _METRICS))}")
        if self.score_rows < 2:
            raise DataValueError(f"score_rows={self.score_rows} must be at least 2")


@register
class KNN(Model[KNNConfig]):
    """Average the expression of the training observations that look most alike.

    Number of neighbours and metric are those with the highest mean Pearson r per gene within held-out training
    sections, held out as in :class:`~hespotex.models.ridge.Ridge`. The fitted model carries the features and
    expression of all training observations.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> features = np.array([[0.0], [1.0], [10.0], [11.0]])
    >>> targets = Targets(np.array([[1.0], [1.0], [5.0], [5.0]]), np.ones(4), ("A",), unit="counts")
    >>> section = Section("s", np.arange(4).astype(str), features, np.zeros((4, 2)), targets=targets)
    >>> model = models.create("knn", neighbours=[2], metrics=["euclidean"]).fit([section])
    >>> model.predict(section).mean.ravel().tolist()
    [1.0, 1.0, 5.0, 5.0]
    """

    Config: ClassVar[type] = KNNConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="knn",
        summary="Mean of the nearest training observations; number and metric by inner cross-validation",
        in_memory=2,
        cost="seconds; grows with spots × training spots",
        presets=("default",),
    )

    neighbours: int
    metric: str
    choices: list[dict[str, Any]]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose neighbours and metric on held-out training sections, then keep all observations."""
        self._scaler = Scaler.fit(sections)
        features = [self._scaler(read_features(section)) for section in sections]
        targets = [section.require_targets()[:] for section in sections]
        n = sum(map(len, features))
        counts = sorted({min(k, n) for k in self.config.neighbours})
        candidates = [(metric, k) for metric in self.config.metrics for k in counts]
        kind, folds = inner_folds(sections)
        scores = np.full((1, len(candidates)), np.nan)
        if folds and len(candidates) > 1:
            rows = []
            for fold in folds:
                kept = fold.kept(sections)
                bank = np.concatenate([features[i][r] for i, r in kept.items()])
                values = np.concatenate([targets[i][r] for i, r in kept.items()])
                for index, held in fold.held_out.items():
                    held = held[np.linspace(0, len(held) - 1, min(len(held), self.config.score_rows)).astype(np.int64)]
                    rows.append(_scores(bank, values, features[index][held], targets[index][held], candidates))
            scores = np.array(rows)
        known = np.isfinite(scores)
        mean = np.where(known, scores, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        if known.any():
            best = int(np.argmax(np.where(known.any(axis=0), mean, -np.inf)))
            self.scores = {"inner_pearson": float(mean[best])}
        else:
            kind, best = "none", min(range(len(candidates)), key=lambda i: abs(candidates[i][1] - _FALLBACK_K))
        self.metric, self.neighbours = candidates[best]
        self.choices = [
            {"metric": metric, "neighbours": k, "pearson": float(mean[i]) if known[:, i].any() else None}
            for i, (metric, k) in enumerate(candidates)
        ]
        self._chosen_by = kind
        logger.info("knn: %d neighbours, %s, chosen by %s", self.neighbours, self.metric, kind)
        self._bank = np.concatenate(features)
        self._values = np.concatenate(targets)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the means over the nearest training observations."""
        self._check_section(section)
        for rows in row_blocks(section.n_obs, block_rows):
            query = self._scaler(read_features(section, rows))
            nearest = _nearest(self._bank, query, self.metric, self.neighbours)
            yield Prediction(
                np.asarray(section.ids)[rows], self.genes, self.unit, _average(nearest, self._values, self.neighbours)
            )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Training observations, scaling and what was chosen."""
        arrays = {"features": self._bank, "expression": self._values, **self._scaler.state()}
        values = {
            "neighbours": self.neighbours,
            "metric": self.metric,
            "choices": self.choices,
            "chosen_by": self._chosen_by,
        }
        return arrays, values

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._bank = of_shape(arrays["features"], (None, self.n_features), "features")
        self._values = of_shape(arrays["expression"], (len(self._bank), len(self.genes)), "expression")
        self._scaler = Scaler.from_state(arrays)
        self.neighbours, self.metric = int(values["neighbours"]), str(values["metric"])
        self.choices, self._chosen_by = values["choices"], values["chosen_by"]


def _nearest(bank: np.ndarray, query: np.ndarray, metric: str, k: int) -> np.ndarray:
    """Rows of `bank` nearest to each row of `query`, nearest first, (n, k)."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(bank)
    blocks = [index.kneighbors(query[rows], return_distance=False) for rows in row_blocks(len(query), _QUERY_ROWS)]
    return np.concatenate(blocks)


def _average(nearest: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Mean of the rows of `values` that the first `k` columns of `nearest` name, (n, G) float32."""
    from scipy import sparse

    n = len(nearest)
    picks = sparse.csr_array(
        (np.full(n * k, 1 / k, dtype=np.float32), nearest[:, :k].ravel(), np.arange(0, n * k + 1, k)),
        shape=(n, len(values)),
    )
    return picks @ values


def _scores(
    bank: np.ndarray,
    values: np.ndarray,
    query: np.ndarray,
    measured: np.ndarray,
    candidates: Sequence[tuple[str, int]],
) -> list[float]:
    largest = min(max(k for _, k in candidates), len(bank))
    nearest = {metric: _nearest(bank, query, metric, largest) for metric in {metric for metric, _ in candidates}}
    # A number of neighbours that this fold cannot offer has no score from it.
    return [
        within_section_score(measured, _average(nearest[metric], values, k)) if k <= len(bank) else float("nan")
        for metric, k in candidates
    ]
