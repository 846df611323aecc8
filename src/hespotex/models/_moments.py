"""Ridge regression from sums of products: one eigendecomposition serves every penalty and number of components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Moments", "Spectrum", "decompose", "nan_mean", "solve"]


@dataclass(eq=False)
class Moments:
    """Sums over observations, weighted or not, of coordinates and targets."""

    n: float  # sum of the weights
    x: np.ndarray  # (r,)
    y: np.ndarray  # (G,)
    xx: np.ndarray  # (r, r)
    xy: np.ndarray  # (r, G)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.x - other.x, self.y - other.y, self.xx - other.xx, self.xy - other.xy)


@dataclass(eq=False)
class Spectrum:
    """Principal axes of the coordinates and the targets' covariance with them."""

    centre: np.ndarray  # (r,)
    level: np.ndarray  # (G,)
    axes: np.ndarray  # (r, r), leading first
    values: np.ndarray  # (r,), variances
    along: np.ndarray  # (r, G), covariances


def decompose(sums: Moments) -> Spectrum:
    """What regressions with any penalty are solved from."""
    from scipy.linalg import eigh

    centre, level = sums.x / sums.n, sums.y / sums.n
    values, axes = eigh(sums.xx / sums.n - np.outer(centre, centre), overwrite_a=True, check_finite=False)
    axes, values = axes[:, ::-1], np.maximum(values[::-1], 0.0)
    return Spectrum(centre, level, axes, values, axes.T @ (sums.xy / sums.n - np.outer(centre, level)))


def solve(spectrum: Spectrum, size: int | None, penalty: float) -> np.ndarray:
    """Weights of the coordinates, (r, G)."""
    used = slice(None) if size is None else slice(size)
    return spectrum.axes[:, used] @ (spectrum.along[used] / (spectrum.values[used] + penalty)[:, None])


def nan_mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the rows of what is known, NaN where nothing is."""
    known = np.isfinite(scores)
    return np.where(
        known.any(axis=0), np.where(known, scores, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan
    )
