"""Ridge regression below the spot: the linear model that every network on superpixels or nuclei must beat.

What a part expresses is linear in its features, and a spot measures the sum over what it covers. The sum of linear functions
is the linear function of the sum, so that all is one regression on pooled features, solved in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from .._logging import logger
from ..data.section import Prediction, Section
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._inner import Scaler, inner_folds, of_shape, read_features, row_blocks, within_section_score
from ._moments import Moments, decompose, nan_mean, solve
from ._registry import register
from .nn.pooling import bag_rows

__all__ = ["RidgeParts", "RidgePartsConfig"]

_READ_ROWS = 4096
_FALLBACK_PENALTY = 1.0  # where there are too few spots to choose

Depth = Literal["spot", "section"]


@dataclass(frozen=True)
class RidgePartsConfig:
    """Settings of :class:`RidgeParts`.

    Attributes
    ----------
    unit
        Of the prediction: sums over a spot's parts are meaningful for counts only.
    penalties
        Candidates for the penalty, as multiples of the sum of the spots' weights; features are standardised over
        the parts that lie under spots.
    depth
        How deep a spot was sequenced, which is no matter of its parts: the median over its section of the library size
        per covered part (``"section"``), which leaves to the features what differs within a section, density of RNA
        included; or the spot's own (``"spot"``), which leaves them composition alone. Both are relative to the median
        over all training spots.
    """

    unit: str = "counts"
    penalties: tuple[float, ...] = tuple(float(10.0**exponent) for exponent in np.arange(-4, 3.25, 0.5))
    depth: Depth = "section"

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalties", tuple(map(float, self.penalties)))
        if self.unit != "counts":
            raise DataValueError(
                f"unit={self.unit!r}: sums over a spot's parts are meaningful for counts only; leave it at 'counts'"
            )
        if not self.penalties or not min(self.penalties) > 0:
            raise DataValueError(f"penalties={self.penalties} must be positive and at least one")
        if self.depth not in get_args(Depth):
            raise DataValueError(f"depth={self.depth!r} is unknown; possible: 'spot', 'section'")


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Spots of a section that have parts and counts.

    Attributes
    ----------
    rows
        Which spots, (k,) int.
    features
        Share-weighted mean of the standardised features of their parts, (k, d).
    rate
        Counts per part at median depth, (k, G).
    weight
        Covered size times depth: the inverse of the variance that counting gives each rate, up to a factor, (k,).
    """

    rows: np.ndarray
    features: np.ndarray
    rate: np.ndarray
    weight: np.ndarray

    def moments(self, rows: np.ndarray) -> Moments:
        """Weighted sums over those of the spots that are among `rows`."""
        chosen = np.isin(self.rows, rows)
        x, y, w = self.features[chosen], self.rate[chosen], self.weight[chosen, None]
        return Moments(float(w.sum()), (w * x).sum(axis=0), (w * y).sum(axis=0), x.T @ (w * x), x.T @ (w * y))

    def scores(self, rows: np.ndarray, solutions: Sequence[np.ndarray]) -> list[float]:
        """Mean Pearson r per gene over `rows` of what each of the weights (d, G) predicts."""
        chosen = np.isin(self.rows, rows)
        return [within_section_score(self.rate[chosen], self.features[chosen] @ weights) for weights in solutions]


@register
class RidgeParts(Model[RidgePartsConfig]):
    """Expected counts of whole parts, linear in their standardised features, learnt from sums over spots.

    A spot's expected counts are ``depth * (share @ values)``. The weights minimise the squared error of its counts, each spot
    weighted by the inverse of the variance that counting gives it, plus a penalty that is chosen as in
    :class:`~hespotex.models.ridge.Ridge`: by the mean Pearson r per gene within held-out groups, sections or blocks. A
    linear function can be negative and a count cannot: predictions are clipped at 0, so that their sums exceed the fitted
    ones where some parts of a spot are clipped.

    Works for superpixels and nuclei alike, and for sections without expression.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> features, share = rng.normal(size=(60, 3)), sparse.csr_array(np.kron(np.eye(20), np.ones((1, 3))))
    >>> parts = Parts(np.arange(60), rng.uniform(size=(60, 2)), share, features)
    >>> targets = Targets(share @ (5 + features[:, :1]), np.full(20, 100.0), ("A",), unit="counts")
    >>> section = Section("s", np.arange(20).astype(str), np.zeros((20, 0)), rng.uniform(size=(20, 2)), targets=targets, parts=parts)
    >>> model = models.create("ridge_parts", penalties=[1e-6]).fit([section])
    >>> bool(np.abs(model.predict(section).mean[:, 0] - (5 + features[:, 0])).max() < 0.01)
    True
    """

    Config: ClassVar[type] = RidgePartsConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="ridge_parts",
        summary="Ridge regression of spots' counts on the pooled features of their parts",
        level="superpixel",
        task="both",
        needs=("parts",),
        in_memory=2,
        cost="seconds; grows with parts × features",
        presets=("default",),
    )

    penalty: float
    choices: list[dict[str, Any]]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose the penalty on held-out training spots, then fit on all of them."""
        self.unit = self.config.unit
        features = [_features(section) for section in sections]
        shares = [section.require_parts().share for section in sections]
        covered = [np.asarray(share.sum(axis=1)).ravel() for share in shares]
        depths = _depths(sections, covered, self.config.depth)
        scaler = Scaler.fit(features, [np.asarray(share.sum(axis=0)).ravel() > 0 for share in shares])
        pooled = [_pooled(*each, scaler) for each in zip(sections, features, covered, depths, strict=True)]

        def moments(rows_of_section: Mapping[int, np.ndarray]) -> Moments:
            return _total([pooled[index].moments(rows) for index, rows in rows_of_section.items()])

        total = moments({index: each.rows for index, each in enumerate(pooled)})
        kind, folds = inner_folds(sections)
        scores = []
        for fold in folds if len(self.config.penalties) > 1 else ():
            kept = total - moments(fold.held_out)
            if kept.n <= 1e-9 * total.n:  # what is left has no parts
                continue
            spectrum = decompose(kept)
            solutions = [solve(spectrum, None, penalty) for penalty in self.config.penalties]
            scores += [pooled[index].scores(rows, solutions) for index, rows in fold.held_out.items()]
        mean = nan_mean(np.array(scores)) if scores else np.full(len(self.config.penalties), np.nan)
        if np.isfinite(mean).any():
            self.penalty = self.config.penalties[int(np.nanargmax(mean))]
            self.scores = {"inner_pearson": float(np.nanmax(mean))}
        else:
            kind = "none"
            self.penalty = min(self.config.penalties, key=lambda penalty: abs(np.log(penalty / _FALLBACK_PENALTY)))
        self.choices = [
            {"penalty": penalty, "pearson": None if np.isnan(score) else float(score)}
            for penalty, score in zip(self.config.penalties, mean, strict=True)
        ]
        self._chosen_by = kind
        logger.info("ridge_parts: penalty=%g chosen by %s", self.penalty, kind)
        spectrum = decompose(total)
        turned = solve(spectrum, None, self.penalty)
        weights = scaler.inverse[:, None].astype(np.float64) * turned
        self._weights = weights.astype(np.float32)
        self._intercept = (spectrum.level - spectrum.centre @ turned - scaler.mean @ weights).astype(np.float32)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield one matrix product per block, clipped at 0."""
        self._check_section(section)
        parts, features = section.require_parts(), _features(section)
        for rows in row_blocks(parts.n_parts, block_rows):
            mean = np.maximum(read_features(features, rows) @ self._weights + self._intercept, 0)
            yield Prediction(np.asarray(parts.ids)[rows], self.genes, self.unit, mean, level=parts.level)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights on the raw features, and what was chosen by which scores."""
        values = {"penalty": self.penalty, "choices": self.choices, "chosen_by": self._chosen_by}
        return {"weights": self._weights, "intercept": self._intercept}, values

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._weights = of_shape(arrays["weights"], (self.n_features, len(self.genes)), "weights")
        self._intercept = of_shape(arrays["intercept"], (len(self.genes),), "intercept")
        self.penalty = float(values["penalty"])
        self.choices, self._chosen_by = values["choices"], values["chosen_by"]


def _features(section: Section) -> Section:
    """The parts of a section as observations of their own."""
    parts = section.require_parts()
    return Section(section.name, np.asarray(parts.ids), parts.require("features"), np.asarray(parts.coordinates))


def _depths(sections: Sequence[Section], covered: Sequence[np.ndarray], kind: Depth) -> list[np.ndarray]:
    """Sequencing depth of each spot relative to the median; 0 where it has no parts or no counts."""
    per_part = []
    for section, size in zip(sections, covered, strict=True):
        bag_rows(section.require_parts().share, section.name)
        library = np.asarray(section.require_targets().library_size, dtype=np.float64)
        per_part.append(np.divide(library, size, out=np.zeros_like(library), where=size > 0))
    known = np.concatenate(per_part)
    if not (known > 0).any():
        raise DataValueError("no spot that has parts has any counts; there is nothing to learn from")
    median = np.median(known[known > 0])
    if kind == "section":
        levels = [np.median(depth[depth > 0]) if (depth > 0).any() else 0.0 for depth in per_part]
        per_part = [np.where(depth > 0, level, 0.0) for depth, level in zip(per_part, levels, strict=True)]
    return [depth / median for depth in per_part]


def _pooled(section: Section, features: Section, covered: np.ndarray, depth: np.ndarray, scaler: Scaler) -> _Pooled:
    """Read the features of the parts once, in row blocks."""
    rows = np.flatnonzero(depth > 0)
    share = section.require_parts().share[rows].tocsc()
    total = np.zeros((len(rows), len(scaler.mean)))
    for block in row_blocks(features.n_obs, _READ_ROWS):
        total += share[:, block] @ scaler(read_features(features, block)).astype(np.float64)
    size = covered[rows, None]
    counts = section.require_targets().in_unit("counts")[rows].astype(np.float64)
    return _Pooled(rows, total / size, counts / (size * depth[rows, None]), covered[rows] * depth[rows])


def _total(moments: Sequence[Moments]) -> Moments:
    first, *others = moments
    return sum(others, first)
