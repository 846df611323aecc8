"""What is diffused: genes as they are, genes in units of their spread, or principal components of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

__all__ = ["ExpressionSpace"]


@dataclass(frozen=True, eq=False)
class ExpressionSpace:
    """Affine map between expression (n, G) and the values that are diffused (n, r).

    Attributes
    ----------
    mean, spread
        Centre and unit of each gene, (G,) float32; 0 and 1 where genes are learned as they are. A gene that did not
        vary in training has spread 0, and is generated as its mean.
    basis
        Orthonormal components of the scaled genes, (G, r) float32; ``None`` for the genes themselves.
    unit
        Spread of each component, (r,).
    rest
        Spread of what the components leave of each scaled gene, (G,).
    """

    mean: np.ndarray
    spread: np.ndarray
    basis: np.ndarray | None = None
    unit: np.ndarray | None = None
    rest: np.ndarray | None = None

    @classmethod
    def fit(cls, expression: np.ndarray, *, scale_genes: bool, components: int | None) -> Self:
        """Learn centre, spread and components from training spots, (n, G)."""
        n_genes = expression.shape[1]
        mean, spread = np.zeros(n_genes), np.ones(n_genes)
        if scale_genes:
            mean, spread = expression.mean(axis=0, dtype=np.float64), expression.std(axis=0, dtype=np.float64)
            spread[spread < 1e-6] = 0.0
        space = cls(mean.astype(np.float32), spread.astype(np.float32))
        if components is None:
            return space
        scaled = space.encode(expression).astype(np.float64)
        offset = scaled.mean(axis=0)
        covariance = (scaled - offset).T @ (scaled - offset) / len(scaled)
        variance, vectors = np.linalg.eigh(covariance)
        kept = np.argsort(variance)[::-1][: min(components, n_genes)]
        basis = vectors[:, kept]
        basis *= np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(len(kept))])  # eigenvectors have no sign
        unit = np.sqrt(np.maximum(variance[kept], 0.0))
        rest = np.sqrt(np.maximum(np.diag(covariance) - ((basis * unit) ** 2).sum(axis=1), 0.0))
        arrays = (mean + spread * offset, spread, basis, np.where(unit > 1e-6, unit, 0.0), rest)
        return cls(*(np.ascontiguousarray(array, dtype=np.float32) for array in arrays))

    @property
    def width(self) -> int:
        """Number of values that are diffused."""
        return len(self.mean) if self.basis is None else self.basis.shape[1]

    def encode(self, expression: np.ndarray) -> np.ndarray:
        """(n, G) in the targets' unit → (n, r) float32."""
        scaled = (expression - self.mean) * _inverse(self.spread)
        return scaled if self.basis is None else (scaled @ self.basis) * _inverse(self.unit)

    def decode(self, values: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """(n, r) → (n, G) in the targets' unit; `noise` (n, G), standard normal, stands for what components leave."""
        if self.basis is not None:
            values = (values * self.unit) @ self.basis.T
            if noise is not None:
                values += self.rest * noise
        return values * self.spread + self.mean

    def state(self) -> dict[str, np.ndarray]:
        """Arrays, by the names that :meth:`from_state` reads."""
        names = ("mean", "spread", "basis", "unit", "rest")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(**{name: np.asarray(value) for name, value in arrays.items()})


def _inverse(spread: np.ndarray | None) -> np.ndarray:
    """Reciprocals, 0 where the spread is 0."""
    assert spread is not None
    return np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
