"""What the networks learn: genes as they are, or principal components of what varies within sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from .._inner import row_blocks

if TYPE_CHECKING:
    from ...data.section import Section, Targets

__all__ = ["TargetSpace"]

_READ_ROWS = 4096


@dataclass(frozen=True, eq=False)
class TargetSpace:
    """Affine map between expression and what the networks predict.

    Attributes
    ----------
    mean, scale
        Centre and unit of each gene, (G,) float32; 0 and 1 where genes are learned as they are.
    basis
        Orthonormal components, (G, r) float32, or ``None`` for the genes themselves.
    """

    mean: np.ndarray
    scale: np.ndarray
    basis: np.ndarray | None

    @classmethod
    def fit(cls, sections: Sequence[Section], *, scale_genes: bool, rank: int | None) -> Self:
        """Learn scales and components from training sections."""
        n_genes = len(sections[0].require_targets().genes)
        if not scale_genes and rank is None:
            return cls(np.zeros(n_genes, np.float32), np.ones(n_genes, np.float32), None)
        n, total = 0, np.zeros(n_genes)
        within = np.zeros((n_genes, n_genes) if rank is not None else n_genes)
        for section in sections:
            own, second = _moments(section.require_targets(), squares_only=rank is None)
            n, total = n + section.n_obs, total + own
            # The level of a section is a matter of its staining and depth; components are to tell spots apart.
            within += second - (np.outer(own, own) if rank is not None else own**2) / section.n_obs
        variance = np.maximum(np.diag(within) if rank is not None else within, 0.0) / n
        varies = variance > 1e-8
        scale = np.where(varies, np.sqrt(variance), 1.0) if scale_genes else np.ones(n_genes)
        basis = None
        if rank is not None:
            covariance = within / n / np.outer(scale, scale)
            basis = _leading(covariance, min(rank, n_genes))
            # One unit for all components: the leading ones, which carry most, weigh most in the loss.
            scale *= np.sqrt(max(np.einsum("gr,gh,hr->", basis, covariance, basis) / basis.shape[1], 1e-12))
            basis = np.ascontiguousarray(basis, dtype=np.float32)
        return cls((total / n).astype(np.float32), scale.astype(np.float32), basis)

    def truncated(self, rank: int) -> Self:
        """The space of the `rank` leading components."""
        return self if self.basis is None else replace(self, basis=np.ascontiguousarray(self.basis[:, :rank]))

    @property
    def width(self) -> int:
        """Number of outputs of the networks."""
        return len(self.mean) if self.basis is None else self.basis.shape[1]

    def encode(self, expression: np.ndarray) -> np.ndarray:
        """(n, G) in the targets' unit → (n, width)."""
        scaled = (expression - self.mean) / self.scale
        return scaled if self.basis is None else scaled @ self.basis

    def decode(self, values: np.ndarray) -> np.ndarray:
        """(n, width) → (n, G) in the targets' unit."""
        return (values if self.basis is None else values @ self.basis.T) * self.scale + self.mean

    def read(self, targets: Targets) -> np.ndarray:
        """All targets of a section, encoded block by block, (n, width) float32."""
        blocks = [self.encode(targets[rows]) for rows in row_blocks(targets.shape[0], _READ_ROWS)]
        return np.concatenate(blocks).astype(np.float32, copy=False)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays."""
        arrays = {"mean": self.mean, "scale": self.scale}
        return arrays if self.basis is None else {**arrays, "basis": self.basis}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(arrays["mean"], arrays["scale"], arrays.get("basis"))


def _moments(targets: Targets, *, squares_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sum (G,) and sum of squares (G,) or of products (G, G) over observations."""
    n_genes = targets.shape[1]
    total, second = np.zeros(n_genes), np.zeros(n_genes if squares_only else (n_genes, n_genes))
    for rows in row_blocks(targets.shape[0], _READ_ROWS):
        block = targets[rows]
        total += block.sum(axis=0, dtype=np.float64)
        second += np.square(block, dtype=np.float64).sum(axis=0) if squares_only else block.T @ block
    return total, second


def _leading(covariance: np.ndarray, rank: int) -> np.ndarray:
    """Leading eigenvectors, (G, rank), each with its largest entry positive: signs do not depend on the library."""
    from scipy.linalg import eigh

    n = len(covariance)
    vectors = eigh(covariance, subset_by_index=(n - rank, n - 1), check_finite=False)[1][:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(rank)])
