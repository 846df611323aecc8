"""Names like the one that was asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["near"]


def near(name: str, names: Iterable[str], n: int = 5) -> list[str]:
    """At most `n` of `names` that look like `name`, the most similar first, whatever the case.

    Examples
    --------
    >>> near("vit-b-32", ["RN50", "ViT-B-32", "ViT-B-32-quickgelu"])
    ['ViT-B-32', 'ViT-B-32-quickgelu']
    """
    wanted = name.lower()
    by_lower = {known.lower(): known for known in names}
    similar = difflib.get_close_matches(wanted, by_lower, n=n)
    holding = sorted((known for known in by_lower if wanted and wanted in known), key=len)
    return [by_lower[known] for known in dict.fromkeys([*similar, *holding])][:n]
