"""How sure the mean correlation of a section is, from bootstrapped spatial blocks."""

from __future__ import annotations

import numpy as np

from ..data.splits import spatial_blocks
from ..metrics import block_draws
from ..metrics._aggregate import ERROR as BLOCK_ERROR
from ..metrics._inputs import NanPolicy

__all__ = ["BLOCK_ERROR", "block_error"]


_DRAWS = 200  # bring the error of a standard error to 5 %


def block_error(
    measured: np.ndarray,
    predicted: np.ndarray,
    coordinates: np.ndarray | None,
    seed: list[int],
    nan_policy: NanPolicy = "raise",
) -> float:
    """Standard error of the mean r over genes within one section; NaN where there are too few blocks to draw."""
    if coordinates is None:
        return float("nan")
    blocks = spatial_blocks(coordinates)
    if blocks.max() < 1:
        return float("nan")
    draws = block_draws(measured, predicted, blocks, n_draws=_DRAWS, seed=seed, nan_policy=nan_policy)
    return float(np.nanstd(draws)) if np.isfinite(draws).any() else float("nan")
