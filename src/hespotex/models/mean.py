"""The gene mean: the same value everywhere, the floor of every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..data.section import Prediction, Section
from ._base import Model, ModelInfo, Run
from ._inner import of_shape, row_blocks
from ._registry import register

__all__ = ["Mean", "MeanConfig"]

_READ_ROWS = 8192


@dataclass(frozen=True)
class MeanConfig:
    """The gene mean has no settings."""


@register
class Mean(Model[MeanConfig]):
    """Predict each gene's mean over all training observations.

    Its correlation within a section is 0 by definition; its error is the one to beat.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> targets = Targets(np.array([[1.0], [3.0]]), np.array([10.0, 10.0]), ("A",), unit="counts")
    >>> section = Section("s", np.array(["1", "2"]), np.zeros((2, 4)), np.zeros((2, 2)), targets=targets)
    >>> models.create("mean").fit([section]).predict(section).mean.tolist()
    [[2.0], [2.0]]
    """

    Config: ClassVar[type] = MeanConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="mean",
        summary="Mean of each gene over the training observations",
        needs=(),
        cost="none",
        presets=("default",),
    )

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Average the targets; features are not read."""
        total, n = np.zeros(len(self.genes)), 0
        for section in sections:
            targets = section.require_targets()
            for rows in row_blocks(section.n_obs, _READ_ROWS):
                total += targets[rows].sum(axis=0, dtype=np.float64)
            n += section.n_obs
        self._mean = (total / n).astype(np.float32)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the means, repeated."""
        self._check_section(section)
        for rows in row_blocks(section.n_obs, block_rows):
            ids = np.asarray(section.ids)[rows]
            yield Prediction(ids, self.genes, self.unit, np.tile(self._mean, (len(ids), 1)))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The means."""
        return {"mean": self._mean}, {}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Take the means."""
        self._mean = of_shape(arrays["mean"], (len(self.genes),), "mean")
