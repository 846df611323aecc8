"""How lazy levels are indexed: by slices and whole numbers, as dask asks after it has fused slicings."""

from __future__ import annotations

from typing import Any

__all__ = ["span"]


def span(index: Any, size: int) -> tuple[int, int, Any]:
    """First pixel and one past the last that `index` needs of `size` pixels, and the index into those.

    Examples
    --------
    >>> span(slice(3, 20, 4), 10), span(slice(None), 10), span(-1, 10)
    ((3, 8, slice(None, None, 4)), (0, 10, slice(None, None, 1)), (9, 10, 0))
    """
    if isinstance(index, slice):
        wanted = range(size)[index]
        if len(wanted) == 0:
            return 0, 0, slice(None)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        return low, high, slice(None, None, wanted.step)
    first = range(size)[int(index)]
    return first, first + 1, 0
