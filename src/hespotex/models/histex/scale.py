"""Between counts and the numbers a network learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .._inner import of_shape

__all__ = ["Scale", "min_max"]

_UPPER = 0.95  # quantile that becomes 1: a single bright spot does not press all others towards 0


def min_max(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values scaled per gene to [0, 1] as published, least and largest value of each gene."""
    low, high = values.min(axis=0), values.max(axis=0)
    return ((values - low) / (high - low + 1e-12)).astype(np.float32), low, high


@dataclass(frozen=True, eq=False)
class Scale:
    """Scaled expression u = (x - low) / span, where x is a count per `n_cells` cells.

    Attributes
    ----------
    low, span
        (G,) float64.
    n_cells
        Cells that an x counts: those of the published disc, or 1.
    """

    low: np.ndarray
    span: np.ndarray
    n_cells: int

    @classmethod
    def published(cls, counts: np.ndarray, n_cells: int) -> Self:
        """Range of the counts of whole spots, (n, G)."""
        _, low, high = min_max(np.asarray(counts, dtype=np.float64))
        return cls(low, high - low, n_cells)

    @classmethod
    def of_density(cls, density: np.ndarray) -> Self:
        """From counts per cell (n, G): 0 stays 0, and 1 is an upper quantile where the gene is expressed at all."""
        span = np.ones(density.shape[1])
        for gene, column in enumerate(density.T):
            if (expressed := column > 0).any():
                span[gene] = np.quantile(column[expressed], _UPPER)
        return cls(np.zeros_like(span), span, 1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scaled expression, float32."""
        return ((x - self.low) / (self.span + 1e-12)).astype(np.float32)

    def counts(self, scaled: Any) -> Any:
        """Counts of single cells from scaled expression, an array or a tensor (…, G)."""
        like = np.float32 if isinstance(scaled, np.ndarray) else scaled.new_tensor
        return scaled * like(self.span / self.n_cells) + like(self.low / self.n_cells)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and values that :meth:`from_state` reads."""
        return {"scale_low": self.low, "scale_span": self.span}, {"n_cells": self.n_cells}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any], n_genes: int) -> Self:
        """Inverse of :meth:`state`."""
        low, span = (of_shape(arrays[name], (n_genes,), name) for name in ("scale_low", "scale_span"))
        return cls(low, span, int(values["n_cells"]))
