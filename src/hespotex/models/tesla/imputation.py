"""Interpolation in space and colour, as pure functions on arrays.

Positions are (x, y, z) with z a colour in units of length; superpixels are interpolated, spots are measured.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from ...errors import DataValueError
from .._inner import row_blocks

__all__ = ["channel_weights", "distance_quantile", "third_axis"]

_PAIRS_AT_ONCE = 4_000_000


def channel_weights(colour: np.ndarray) -> np.ndarray:
    """Share of each channel in the variance of the superpixels' colours (m, 3); equal shares where none varies, (3,)."""
    variance = np.asarray(colour, dtype=np.float64).var(axis=0)
    total = variance.sum()
    return variance / total if total > 0 else np.full(len(variance), 1 / len(variance))


def third_axis(colour: np.ndarray, scale: float, *, mean: float | None = None, sd: float | None = None) -> np.ndarray:
    """Colours as positions: standardised, times `scale`, (n,).

    Parameters
    ----------
    colour
        One number per place, (n,).
    scale
        Length that one standard deviation of colour is worth.
    mean, sd
        Mean and population standard deviation to standardise by; those of `colour` itself by default.

    Notes
    -----
    Where colour does not vary, all places get 0: histology then says nothing.
    """
    colour = np.asarray(colour, dtype=np.float64)
    mean = float(colour.mean()) if mean is None else mean
    sd = float(colour.std()) if sd is None else sd
    return (colour - mean) / sd * scale if sd > 1e-12 * max(abs(mean), 1e-300) else np.zeros(len(colour))


def distance_quantile(points: np.ndarray, spots: np.ndarray, quantile: float) -> float:
    """Quantile of the distances between all `points` (m, d) and all `spots` (n, d), by linear interpolation.

    A sample of the points says about where it lies; all distances are then formed once, block by block, those below
    counted and only those thereabouts kept. The result is that of sorting all m × n of them.

    Examples
    --------
    >>> import numpy as np
    >>> distance_quantile(np.array([[0.0], [10.0]]), np.array([[1.0], [4.0]]), 0.5)  # of 1, 4, 6, 9
    5.0
    """
    if not 0 <= quantile <= 1:
        raise DataValueError(f"quantile={quantile!r} must be in [0, 1]")
    rows = max(1, _PAIRS_AT_ONCE // len(spots))
    sample = points[:: -(-len(points) // rows)]
    sampled = np.sort(cdist(sample, spots), axis=None)
    place = quantile * (len(points) * len(spots) - 1)
    rank = int(np.floor(place))
    margin = 3 * np.sqrt(quantile * (1 - quantile) / len(sample)) + 1e-3
    while True:
        low, high = quantile - margin, quantile + margin
        least = sampled[int(low * len(sampled))] if low > 0 else 0.0
        most = sampled[int(high * len(sampled))] if high < 1 else np.inf
        below, kept = 0, []
        for block in row_blocks(len(points), rows):
            distance = cdist(points[block], spots)
            below += int(np.count_nonzero(distance < least))
            kept.append(distance[(distance >= least) & (distance <= most)])
        inside = np.sort(np.concatenate(kept))
        first = rank - below
        last = first + (place > rank)
        if first >= 0 and last < len(inside):
            return float(inside[first] + (place - rank) * (inside[last] - inside[first]))
        margin *= 4
