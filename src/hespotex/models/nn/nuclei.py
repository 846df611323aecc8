"""The nuclei factor of HESpotEx: one number per observation that multiplies its prediction."""

from __future__ import annotations

import numpy as np

from ...errors import DataValueError

__all__ = ["nuclei_factor", "nuclei_reference"]

CAP = 20  # of the published factor


def nuclei_factor(counts: np.ndarray, reference: float | None = None) -> np.ndarray:
    """Factor of each observation from its number of nuclei.

    Parameters
    ----------
    counts
        Nuclei per observation, (n,).
    reference
        Number of nuclei at which the factor reaches 2. ``None`` as published: counts are clipped to 1…20 and
        divided by the section's own maximum, so that the same count means different things on two sections.

    Returns
    -------
    Factors in (1, 2] (from 1, inclusive, with a `reference`), (n, 1) float32.

    Examples
    --------
    >>> import numpy as np
    >>> nuclei_factor(np.array([1, 5, 20, 37])).ravel().tolist()
    [1.0499999523162842, 1.25, 2.0, 2.0]
    """
    counts = _checked(counts)
    if reference is None:
        counts = np.clip(counts, 1, CAP)
        share = counts / counts.max()
    else:
        share = np.minimum(counts / reference, 1.0)
    return (share + 1.0).astype(np.float32)[:, None]


def nuclei_reference(counts: list[np.ndarray]) -> float:
    """Number of nuclei that few training observations exceed: the 95th percentile over all, at least 1."""
    return max(float(np.quantile(np.concatenate([_checked(each) for each in counts]), 0.95)), 1.0)


def _checked(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.float64).ravel()
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise DataValueError("counts of nuclei must be finite and not negative; make them with hx.pp.segment_nuclei")
    return counts
