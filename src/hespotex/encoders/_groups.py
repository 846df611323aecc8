"""Rows that belong to one block or tile."""

from __future__ import annotations

import numpy as np

__all__ = ["grouped"]


def grouped(pairs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The different pairs among (n, 2) whole numbers from 0, (m, 2), and the rows of each.

    Examples
    --------
    >>> import numpy as np
    >>> pairs, rows = grouped(np.array([[3, 1], [0, 0], [3, 1]]))
    >>> pairs.tolist(), [own.tolist() for own in rows]
    ([[0, 0], [3, 1]], [[1], [0, 2]])
    """
    if not len(pairs):
        return pairs.reshape(0, 2), []
    number = pairs[:, 1] * (pairs[:, 0].max() + 1) + pairs[:, 0]
    order = np.argsort(number, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    return pairs[[own[0] for own in rows]], rows
