"""Loops over pixels, compiled on first use and kept on disk; they hold no lock, so that blocks run in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["jit", "longer", "find_root"]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called.

    Without ``fastmath``: a pixel's value must not depend on where in a row, and so in which block, it lies.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written: it is compiled in each process
        return numba.njit(nogil=True)(function)


@jit
def find_root(parents, item):
    """The item that stands for all that are joined with `item`; the way there gets shorter."""
    while parents[item] != item:
        parents[item] = parents[parents[item]]
        item = parents[item]
    return item


@jit
def longer(items, room):
    """`items` with room for more, `room` in all."""
    out = np.empty(room, items.dtype)
    out[: len(items)] = items
    return out
