"""Samples of generative models: whether all that were asked for fit in memory."""

from __future__ import annotations

from ..data.blockwise import available_bytes
from ..errors import DataValueError

__all__ = ["check_room"]


def check_room(n: int, n_genes: int, n_samples: int) -> None:
    """Raise if `n_samples` samples of `n` observations and `n_genes` genes do not fit in memory.

    Raises
    ------
    DataValueError
        Naming the number of samples that would fit.
    """
    each, free = 4 * n * n_genes, available_bytes()
    attainable = n_samples if free is None else free // (2 * each)  # blocks are joined to a second copy
    if attainable < n_samples:
        allowed = f"memory allows n_samples={attainable}" if attainable else "memory does not even hold one"
        raise DataValueError(
            f"n_samples={n_samples}: samples of {n} observations and {n_genes} genes take "
            f"{each * n_samples / 2**30:.1f} GiB, and twice that while they are joined; {allowed}. Mean and spread of any "
            "number of samples take none: keep_samples=False"
        )
