"""Compact windows of a section that is too large for one step, and the neighbours that their numbers depend on."""

from __future__ import annotations

import numpy as np
from scipy import sparse

__all__ = ["cut", "reached", "windows_of"]


def windows_of(coordinates: np.ndarray, size: int | None) -> list[np.ndarray]:
    """Rows of compact windows of at most `size` observations each, ascending within a window.

    Halves along the longer axis are halved again until they fit, so that all windows are about equally full.

    Parameters
    ----------
    coordinates
        Positions, (n, 2).
    size
        Largest number of observations; ``None``: one window of all.

    Examples
    --------
    >>> import numpy as np
    >>> line = np.column_stack([np.arange(6.0), np.zeros(6)])
    >>> [rows.tolist() for rows in windows_of(line[::-1], 3)]
    [[3, 4, 5], [0, 1, 2]]
    """
    position = np.asarray(coordinates, dtype=np.float64)
    windows, waiting = [], [np.arange(len(position))]
    while waiting:
        rows = waiting.pop()
        if size is None or len(rows) <= size:
            windows.append(np.sort(rows))
            continue
        long = int(np.argmax(np.ptp(position[rows], axis=0)))
        first, second = np.array_split(rows[np.argsort(position[rows, long], kind="stable")], 2)
        waiting += [second, first]
    return windows


def reached(graph: sparse.csr_array, rows: np.ndarray, hops: int) -> np.ndarray:
    """`rows` and all observations from which at most `hops` edges lead to them, ascending.

    Row i of `graph` (n, n) lists the observations that i receives from.
    """
    inside = np.zeros(graph.shape[0], dtype=bool)
    inside[rows] = True
    front = np.asarray(rows)
    for _ in range(hops):
        found = np.unique(graph[front].indices)
        front = found[~inside[found]]
        inside[front] = True
    return np.flatnonzero(inside)


def cut(graph: sparse.csr_array, rows: np.ndarray) -> sparse.csr_array:
    """The part of `graph` among `rows`, which ascend; the entries of a row keep their order."""
    return graph if len(rows) == graph.shape[0] else sparse.csr_array(graph[rows][:, rows])
