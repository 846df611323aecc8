"""The spots that the released code trains and tests on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...errors import DataValueError

__all__ = ["published_split"]


def published_split(names: Sequence[str], k: int = 10, seed: int = 1234) -> list[list[str]]:
    """Spots in `k` parts as the released code cuts them; it trains on all but the last, for encoder and decoder alike.

    For comparison with published numbers only: neighbouring spots resemble each other, and a random split hides it.

    Parameters
    ----------
    names
        Names of the spots, in any order.
    k
        Number of parts.
    seed
        Of the shuffle.

    Examples
    --------
    >>> [len(part) for part in published_split([f"spot{i}" for i in range(37)])]
    [4, 3, 4, 4, 3, 4, 4, 4, 3, 4]
    """
    if not 1 <= k <= len(names):
        raise DataValueError(f"k={k} must be between 1 and the number of names, {len(names)}")
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    cuts = [round(part * len(shuffled) / k) for part in range(k + 1)]
    return [shuffled[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
