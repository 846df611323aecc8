"""Tertiary lymphoid structures: where annotations of several kinds of cells lie together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataValueError
from .bands import Pooling, pool_largest

__all__ = ["cluster_score", "tls_score"]


def cluster_score(labels: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Mean expression of each pixel's cluster over the largest of all clusters, float64 of the shape of `labels`.

    Parameters
    ----------
    labels
        Label image, any shape.
    means
        Label and its mean, (l, 2); labels that it lacks get 0.

    Examples
    --------
    >>> import numpy as np
    >>> cluster_score(np.array([2, 0, 7]), np.array([[2, 0.8], [0, 0.2]])).tolist()
    [1.0, 0.25, 0.0]
    """
    means = np.asarray(means, dtype=np.float64)
    highest = means[:, 1].max() if len(means) else 0.0
    if not highest > 0:
        raise DataValueError("no cluster has any expression of the markers; there is nothing to score by")
    known, place = np.unique(means[:, 0], return_index=True)
    at = np.minimum(np.searchsorted(known, labels), len(known) - 1)
    return np.where(known[at] == labels, means[place[at], 1] / highest, 0.0)


def tls_score(scores: Sequence[np.ndarray], num_required: int = 3, pooling: Pooling = "min") -> np.ndarray:
    """Score of tertiary lymphoid structures, in {0} ∪ [0.5, 1].

    Parameters
    ----------
    scores
        :func:`cluster_score` of the annotations by B cells, CD4+ T cells, dendritic cells and CXCL13, of one shape.
    num_required, pooling
        How many of them must be high, and how these are pooled; see :func:`hespotex.annotation.bands.pool_largest`.

    Notes
    -----
    Pooled values are scaled to [0, 1] over all pixels; those below 0.5 become 0. Where no pixel stands out, all are 0.
    """
    stacked = np.stack([np.asarray(score, dtype=np.float64).ravel() for score in scores], axis=1)
    pooled = pool_largest(stacked, num_required, pooling)
    low, high = pooled.min(), pooled.max()
    scaled = (pooled - low) / (high - low) if high > low else np.zeros_like(pooled)
    return np.where(scaled < 0.5, 0.0, scaled).reshape(np.shape(scores[0]))
