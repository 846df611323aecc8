"""What the networks learn: genes as they are, or principal components of scaled genes, less what ridge explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ...data.section import Section, rows_of
from .._inner import inner_folds, row_blocks
from ..ridge import Ridge

if TYPE_CHECKING:
    from ...data.section import Targets

__all__ = ["RidgeSkip", "TargetSpace"]

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
        second = np.zeros((n_genes, n_genes) if rank is not None else n_genes)
        for section in sections:
            targets = section.require_targets()
            for rows in row_blocks(section.n_obs, _READ_ROWS):
                block = targets[rows]
                n += len(block)
                total += block.sum(axis=0, dtype=np.float64)
                second += block.T @ block if rank is not None else np.square(block, dtype=np.float64).sum(axis=0)
        mean = total / n
        covariance = second / n - (np.outer(mean, mean) if rank is not None else mean**2)
        variance = np.maximum(np.diag(covariance) if rank is not None else covariance, 0.0)
        varies = variance > 1e-8
        scale = np.where(varies, np.sqrt(variance), 1.0) if scale_genes else np.ones(n_genes)
        basis = None
        if rank is not None and rank < n_genes:
            basis = _leading(covariance / np.outer(scale, scale), min(rank, n_genes)).astype(np.float32)
        return cls(mean.astype(np.float32), scale.astype(np.float32), basis)

    @property
    def width(self) -> int:
        """Number of outputs of the networks."""
        return len(self.mean) if self.basis is None else self.basis.shape[1]

    def encode(self, expression: np.ndarray) -> np.ndarray:
        """(n, G) in the targets' unit → (n, width)."""
        return self.encode_difference(expression - self.mean)

    def encode_difference(self, difference: np.ndarray) -> np.ndarray:
        """Differences of expression, (n, G) → (n, width)."""
        scaled = difference / self.scale
        return scaled if self.basis is None else scaled @ self.basis

    def decode(self, values: np.ndarray) -> np.ndarray:
        """(n, width) → (n, G) in the targets' unit."""
        return self.decode_difference(values) + self.mean

    def decode_difference(self, values: np.ndarray) -> np.ndarray:
        """(n, width) → differences of expression, (n, G)."""
        return (values if self.basis is None else values @ self.basis.T) * self.scale

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


@dataclass(frozen=True, eq=False)
class RidgeSkip:
    """A ridge regression from the image stream's features to expression.

    Attributes
    ----------
    weights, intercept
        (d, G) and (G,) float32.
    """

    weights: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(cls, sections: Sequence[Section], space: TargetSpace) -> tuple[Self, list[np.ndarray]]:
        """The regression on all `sections`, and what it predicts for each when that has been left out, encoded.

        The networks must learn what ridge misses on tissue it has *not* seen, so every observation's value comes
        from a regression without its fold. The penalty is chosen once, by :class:`~hespotex.models.ridge.Ridge`.
        """
        ridge = Ridge().fit(sections)
        whole = cls._of(ridge)
        unseen = [whole.encoded(section, space) for section in sections]
        for fold in inner_folds(sections)[1]:
            again = Ridge(penalties=(ridge.penalty,), components=(ridge.components,))
            again.fit([_rows(sections[index], rows) for index, rows in fold.kept(sections).items()])
            for index, rows in fold.held_out.items():
                unseen[index][rows] = cls._of(again).encoded(_rows(sections[index], rows), space)
        return whole, unseen

    @classmethod
    def _of(cls, ridge: Ridge) -> Self:
        arrays, _ = ridge.state()
        return cls(arrays["weights"], arrays["intercept"])

    def encoded(self, section: Section, space: TargetSpace) -> np.ndarray:
        """Predictions for `section` in `space`, (n, width), without forming them gene by gene."""
        return rows_of(section.features) @ space.encode_difference(self.weights) + space.encode(self.intercept)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, d) → expression (n, G)."""
        return features @ self.weights + self.intercept

    def state(self) -> dict[str, np.ndarray]:
        """Arrays."""
        return {"weights": self.weights, "intercept": self.intercept}

    @classmethod
    def from_state(cls, arrays: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(arrays["weights"], arrays["intercept"])


def _rows(section: Section, rows: np.ndarray) -> Section:
    """Some observations of a section, without graph and extras."""
    targets = section.require_targets()
    return Section(
        name=section.name,
        ids=np.asarray(section.ids)[rows],
        features=rows_of(section.features, rows),
        coordinates=section.coordinates[rows],
        targets=replace(targets, counts=targets.counts[rows], library_size=targets.library_size[rows]),
        group=section.group,
    )


def _leading(covariance: np.ndarray, rank: int) -> np.ndarray:
    """Leading eigenvectors, (G, rank), each with its largest entry positive so that signs do not depend on the library."""
    from scipy.linalg import eigh

    n = len(covariance)
    vectors = eigh(covariance, subset_by_index=(n - rank, n - 1), check_finite=False)[1][:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(rank)])
