"""Weighted means of the nearest spots: what methods that interpolate share. Pure functions on arrays."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

__all__ = [
    "Neighbours",
    "distance_rank",
    "find_neighbours",
    "gaussian_weights",
    "mean_operator",
    "neighbour_weights",
    "own_distances",
    "position_order",
]

_SOFTENING = 0.1  # added to every distance, so that none is 0
_TIES = 9  # eight spots surround one of a square lattice at equal distance
_TIE_TOLERANCE = 1e-9


class Neighbours(NamedTuple):
    """Spots next to each superpixel, nearest first.

    Attributes
    ----------
    spot
        Rows of the spots, (m, k) int.
    distance
        Their distances, (m, k); infinite for a spot that is beyond the cut.
    nearest
        Distance to the nearest spot, within the cut or not, (m,).
    """

    spot: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray


def position_order(xy: np.ndarray) -> np.ndarray:
    """Order of spots (n, 2) that positions alone decide, so that equal distances do not depend on the order given."""
    return np.lexsort((xy[:, 1], xy[:, 0]))


def find_neighbours(tree: cKDTree, points: np.ndarray, k: int, *, cut: float = np.inf, workers: int = 1) -> Neighbours:
    """The `k` spots of `tree` nearest to each of `points` (m, d), those beyond `cut` marked.

    Notes
    -----
    Equal distances are broken by the lower row of the spot.
    """
    k = min(k, tree.n)
    room = min(k + _TIES, tree.n)
    distance, spot = tree.query(points, k=np.arange(1, room + 1), workers=workers)
    if room > k:
        tied = np.flatnonzero(distance[:, k] - distance[:, k - 1] <= _TIE_TOLERANCE * distance[:, k])
        # Rounding of the distances must not decide between two that are equal by construction.
        rank = np.round(distance[tied] / np.maximum(distance[tied, -1:], np.finfo(float).tiny), 9)
        order = np.lexsort((spot[tied], rank), axis=1)
        spot[tied] = np.take_along_axis(spot[tied], order, axis=1)
        distance[tied] = np.take_along_axis(distance[tied], order, axis=1)
    spot, distance = spot[:, :k], distance[:, :k]
    kept = distance <= cut * (1 + 1e-12)  # a quantile may be one of the distances, but for rounding
    return Neighbours(spot, np.where(kept, distance, np.inf), distance[:, 0])


def neighbour_weights(
    distance: np.ndarray, weighting: Literal["power", "exponential"] = "power", power: float = 2.0
) -> np.ndarray:
    """Weights of neighbours by their distances (m, k), infinite ones weighing nothing; rows sum to 1 or, without any, to 0.

    Parameters
    ----------
    distance
        Distances, (m, k).
    weighting
        With d the distance plus 0.1, in units of the smallest of its row: ``"power"`` gives d^−power,
        ``"exponential"`` exp(−d).
    power
        Exponent of ``"power"``.

    Examples
    --------
    >>> import numpy as np
    >>> neighbour_weights(np.array([[10.0, 20.0, 30.0]])).round(4).tolist()
    [[0.7326, 0.185, 0.0825]]
    """
    raised = np.asarray(distance, dtype=np.float64) + _SOFTENING
    smallest = raised.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        relative = np.where(np.isfinite(raised), raised / smallest, np.inf)
    weight = relative**-power if weighting == "power" else np.exp(-relative)
    total = weight.sum(axis=1, keepdims=True)
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)


def gaussian_weights(distance: np.ndarray, bandwidth: float) -> np.ndarray:
    """Weights of neighbours (m, k) that fall off as a normal density of standard deviation `bandwidth`; rows sum to 1."""
    square = np.asarray(distance, dtype=np.float64) ** 2
    # Relative to the nearest, so that far from all spots not every weight vanishes.
    weight = np.exp((square.min(axis=1, keepdims=True) - square) / (2 * bandwidth**2))
    return weight / weight.sum(axis=1, keepdims=True)


def mean_operator(spot: np.ndarray, weight: np.ndarray, n_spots: int) -> sparse.csr_array:
    """Superpixels × spots, CSR (m, n) float32, whose product with expression is each superpixel's weighted mean."""
    m, k = spot.shape
    return sparse.csr_array(
        (weight.astype(np.float32).ravel(), spot.ravel(), np.arange(0, m * k + 1, k)), shape=(m, n_spots)
    )


def own_distances(tree: cKDTree) -> np.ndarray:
    """Distance of each spot of `tree` to the nearest other, ascending, (n,); a single spot has none."""
    return np.sort(tree.query(tree.data, k=[2])[0][:, 0]) if tree.n > 1 else np.empty(0)


def distance_rank(own: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Rank of each distance to the nearest spot among those between spots, float32 in [0, 1]; 0 where there are none.

    It is 0 between the spots of a lattice and 1 farther from all spots than any of them is from its next.
    """
    return (np.searchsorted(own, nearest, side="left") / max(len(own), 1)).astype(np.float32)
