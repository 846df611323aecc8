"""Segmentation of a section by expression on a fine grid: smooth, cluster, number by size, merge what is small.

A raster is (h, w, k) with NaN where there is no tissue; labels are (h, w) integers with -1 there. The published steps
are those of iStar (Zhang et al., Nature Biotechnology 2024).
"""

from __future__ import annotations

import numpy as np

from ..errors import DataValueError

__all__ = ["by_size", "components", "gaussian", "kmeans", "merge_small", "segment", "subclusters"]

_CUT = 4.0  # standard deviations at which the kernel ends: 17 cells wide for sigma = 2


def gaussian(raster: np.ndarray, sigma: float = 2.0) -> np.ndarray:
    """Smooth each channel over the cells there are, (h, w) or (h, w, k) float32.

    Holes neither count nor are filled: each value is the weighted mean of the cells within reach. Beyond the raster's
    border it is reflected, edge cells included.

    Examples
    --------
    >>> import numpy as np
    >>> gaussian(np.array([[1.0, np.nan, 1.0]])).tolist()
    [[1.0, nan, 1.0]]
    """
    from scipy.ndimage import gaussian_filter

    if not sigma >= 0:
        raise DataValueError(f"sigma={sigma!r} must not be negative")
    raster = np.asarray(raster, dtype=np.float32)
    if sigma == 0:
        return raster.copy()
    stack = raster.reshape(*raster.shape[:2], -1)
    out = np.empty_like(stack)
    weight, seen = np.ones(0), np.zeros(0, dtype=bool)
    for channel in range(stack.shape[2]):
        values = stack[..., channel]
        present = np.isfinite(values)
        if not np.array_equal(present, seen):  # channels share their holes, as a rule
            seen, weight = present, gaussian_filter(present.astype(np.float64), sigma, mode="reflect", truncate=_CUT)
        total = gaussian_filter(np.where(present, values, 0).astype(np.float64), sigma, mode="reflect", truncate=_CUT)
        out[..., channel] = np.divide(total, weight, out=np.full(total.shape, np.nan), where=present)
    return out.reshape(raster.shape)


def kmeans(values: np.ndarray, n_clusters: int = 10, *, n_init: int = 10, seed: int = 0) -> np.ndarray:
    """Labels of k-means on rows (m, k), (m,) int: rows with NaN get -1; 0 is the largest cluster.

    The tightest of `n_init` starts is taken. A single one, as published, often ends in a poor optimum, and in another one
    after the least change of the values.

    Raises
    ------
    DataValueError
        If there are fewer complete rows than clusters.
    """
    from sklearn.cluster import KMeans

    values = np.asarray(values)
    complete = np.isfinite(values).all(axis=1)
    if n_clusters < 1:
        raise DataValueError(f"n_clusters={n_clusters} must be at least 1")
    if complete.sum() < n_clusters:
        raise DataValueError(f"n_clusters={n_clusters} is more than the {int(complete.sum())} cells that hold values")
    labels = np.full(len(values), -1)
    labels[complete] = KMeans(n_clusters=n_clusters, n_init=n_init, random_state=seed).fit_predict(values[complete])
    return by_size(labels)


def by_size(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered from 0 by decreasing size, equal sizes by the old label; negative ones stay.

    Examples
    --------
    >>> import numpy as np
    >>> by_size(np.array([5, 3, 3, -1])).tolist()
    [1, 0, 0, -1]
    """
    labels = np.asarray(labels)
    old, position, size = np.unique(labels[labels >= 0], return_inverse=True, return_counts=True)
    rank = np.empty(len(old), dtype=np.int64)
    rank[np.argsort(-size, kind="stable")] = np.arange(len(old))
    out = np.full(labels.shape, -1, dtype=np.int64)
    out[labels >= 0] = rank[position]
    return out


def components(labels: np.ndarray) -> np.ndarray:
    """Connected pieces of each label, numbered by decreasing size within it: 0 is a label's largest piece, (h, w) int.

    Cells touch by their sides. Together, label and piece are the published hierarchical label.
    """
    piece, size = _pieces(labels)
    out = np.full(labels.shape, -1, dtype=np.int64)
    inside = piece >= 0
    if not len(size):
        return out
    owner = np.empty(len(size), dtype=np.int64)
    owner[piece[inside]] = labels[inside]
    order = np.lexsort((np.arange(len(size)), -size, owner))
    first = np.concatenate([[True], owner[order][1:] != owner[order][:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    rank = np.empty(len(size), dtype=np.int64)
    rank[order] = np.arange(len(order)) - start
    out[inside] = rank[piece[inside]]
    return out


def merge_small(labels: np.ndarray, min_size: int = 20) -> np.ndarray:
    """Give connected pieces of fewer than `min_size` cells the label that surrounds them most.

    Pieces are taken in the order of their size, equal ones along rows. A piece takes the most frequent label of the
    cells around it (eight neighbours; the smallest label if several are), joins the piece of that label that it
    touches most, and moves on with it if that one is small as well. A piece that touches nothing stays.

    Parameters
    ----------
    labels
        Labels, (h, w) int; negative ones are no tissue.
    min_size
        Cells of a piece that stays.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((5, 5), dtype=int)
    >>> labels[2, 2] = 1
    >>> merge_small(labels, 2).max()
    np.int64(0)
    """
    piece, size = _pieces(labels)
    width = labels.shape[1] + 2
    padded = np.pad(np.asarray(labels, dtype=np.int64), 1, constant_values=-1).ravel()
    owner = np.pad(piece, 1, constant_values=-1).ravel()
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    small = np.flatnonzero(size < min_size)
    small = small[np.argsort(size[small], kind="stable")]
    cells = np.flatnonzero(np.isin(owner, small))
    cells = cells[np.argsort(owner[cells], kind="stable")]
    starts = np.flatnonzero(np.diff(owner[cells], prepend=-2))
    members = dict(zip(owner[cells][starts].tolist(), np.split(cells, starts[1:]), strict=True)) if len(cells) else {}
    for number in small.tolist():
        own = members[number]
        ring = np.unique(own[:, None] + around)
        ring = ring[(padded[ring] >= 0) & (owner[ring] != number)]
        if not len(ring):
            continue
        label = _most_frequent(padded[ring])
        target = _most_frequent(owner[ring][padded[ring] == label])
        padded[own], owner[own] = label, target
        if target in members:
            members[target] = np.concatenate([members[target], own])
    return padded.reshape(-1, width)[1:-1, 1:-1].copy()


def segment(
    raster: np.ndarray,
    n_clusters: int = 10,
    *,
    sigma: float = 2.0,
    min_size: int = 20,
    n_init: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Clusters of a raster of expression or of a model's latent, (h, w) int: 0 is the largest, -1 no tissue.

    Parameters
    ----------
    raster
        Values, (h, w, k), NaN where there is no tissue.
    n_clusters
        Clusters of k-means.
    sigma
        Standard deviation of the smoothing before, in cells; 0 for none.
    min_size
        Connected pieces of fewer cells join what surrounds them.
    n_init
        Starts of k-means.
    seed
        Seed of k-means.
    """
    smooth = gaussian(raster, sigma)
    labels = kmeans(smooth.reshape(-1, smooth.shape[2]), n_clusters, n_init=n_init, seed=seed).reshape(smooth.shape[:2])
    return by_size(merge_small(labels, min_size))


def subclusters(raster: np.ndarray, labels: np.ndarray, n_clusters: int = 4, *, seed: int = 0) -> np.ndarray:
    """Clusters within each cluster, numbered by size, (h, w) int; a cluster of fewer cells than that has fewer."""
    out = np.full(labels.shape, -1, dtype=np.int64)
    for label in np.unique(labels[labels >= 0]).tolist():
        inside = labels == label
        out[inside] = kmeans(raster[inside], min(n_clusters, int(inside.sum())), seed=seed)
    return out


def _pieces(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the connected piece of each cell, (h, w), -1 where the label is negative, and sizes of the pieces."""
    from scipy.ndimage import label

    piece = np.full(labels.shape, -1, dtype=np.int64)
    n = 0
    for value in np.unique(labels[labels >= 0]).tolist():
        found, more = label(labels == value)
        piece[found > 0] = found[found > 0] + n - 1
        n += more
    return piece, np.bincount(piece[piece >= 0], minlength=n)


def _most_frequent(values: np.ndarray) -> int:
    found, count = np.unique(values, return_counts=True)
    return int(found[count.argmax()])
