"""Loops over pixels, compiled on first use and kept on disk; they hold no lock, so that blocks run in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["jit"]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called.

    Without ``fastmath``: a pixel's value must not depend on where in a row, and so in which block, it lies.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written: it is compiled in each process
        return numba.njit(nogil=True)(function)
