"""Embeddings in units of their spread in training, about the mean of all training spots or of their own section."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from ..data.section import Section
from ..errors import HespotexWarning
from ._inner import Scaler, read_features, row_blocks

__all__ = ["Standardize", "Standardizer"]

Standardize = Literal["none", "global", "section"]

_READ_ROWS = 4096
_FEW = 20  # observations, below which the mean of a section is no reference


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Reads embeddings as they come (``"none"``), or standardised: ``"global"`` or ``"section"``.

    Attributes
    ----------
    kind
        What embeddings are taken relative to.
    scaler
        Mean and spread over all training spots; ``None`` for embeddings as they come.
    """

    kind: Standardize
    scaler: Scaler | None

    @classmethod
    def fit(cls, sections: Sequence[Section], kind: Standardize) -> Self:
        """Learn the scale from training sections."""
        return cls(kind, None if kind == "none" else Scaler.fit(sections))

    def centre(self, section: Section) -> np.ndarray | float:
        """What embeddings of a section are taken relative to, after scaling."""
        if self.scaler is None or self.kind == "global":
            return 0.0
        blocks = row_blocks(section.n_obs, _READ_ROWS)
        total = sum(self.scaler(read_features(section, rows)).sum(axis=0, dtype=np.float64) for rows in blocks)
        return np.asarray(total / max(section.n_obs, 1), dtype=np.float32)

    def read(self, section: Section, centre: np.ndarray | float, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Embeddings of some spots, (n, d) float32; `centre` is that of their section."""
        features = read_features(section, rows)
        return features if self.scaler is None else self.scaler(features) - centre

    def read_all(self, sections: Sequence[Section]) -> np.ndarray:
        """Embeddings of all spots of all sections, (n, d) float32."""
        return np.concatenate([self.read(section, self.centre(section)) for section in sections])

    def warn_if_few(self, section: Section) -> None:
        """Warn of a section to predict whose own mean says little."""
        if self.kind == "section" and section.n_obs < _FEW:
            warnings.warn(
                f"section {section.name!r} has {section.n_obs} observations: features are taken relative to their "
                "mean, which says little of so few; predict the whole section and select afterwards",
                HespotexWarning,
                stacklevel=3,
            )

    def state(self) -> dict[str, np.ndarray]:
        """Arrays, by the names that :meth:`from_state` reads."""
        return {} if self.scaler is None else self.scaler.state()

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], kind: Standardize) -> Self:
        """Inverse of :meth:`state`."""
        return cls(kind, None if kind == "none" else Scaler.from_state(arrays))
