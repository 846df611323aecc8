"""Rows of a table of scores: one model on one section, with what tells how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import metrics as scores
from ..data.splits import spatial_blocks
from ..metrics._aggregate import ERROR
from ..metrics._inputs import NanPolicy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["scored_rows"]

_DRAWS = 200  # bring the error of a standard error to 5 %


def scored_rows(
    measured: np.ndarray,
    predicted: np.ndarray,
    genes: Sequence[str],
    *,
    front: Mapping[str, Any],
    halves: np.ndarray,
    coordinates: np.ndarray | None,
    seed: list[int],
    metrics: Sequence[str],
    nan_policy: NanPolicy = "raise",
    **options: Any,
) -> pd.DataFrame:
    """Scores of each gene, behind the columns of `front`.

    Parameters
    ----------
    measured, predicted
        (n, G) in one unit.
    genes
        Their names.
    front
        Columns that name the model and the section.
    halves
        Split-half correlation of each gene, (G,).
    coordinates
        Centres in any unit, (n, 2), for spatial blocks; ``None`` where there are none.
    seed
        Of the draws of blocks, a section its own.
    metrics, nan_policy, options
        As in :func:`hespotex.metrics.score`.
    """
    table = scores.score(measured, predicted, genes, metrics=metrics, nan_policy=nan_policy, **options)
    table["split_half"] = halves
    if "pearson" in metrics:
        table[ERROR] = _block_error(measured, predicted, coordinates, seed, nan_policy)
    for position, (column, value) in enumerate(front.items()):
        table.insert(position, column, value)
    return table


def _block_error(
    measured: np.ndarray, predicted: np.ndarray, coordinates: np.ndarray | None, seed: list[int], nan_policy: NanPolicy
) -> float:
    """Standard error of the mean r within one section; NaN where there are too few blocks to draw."""
    if coordinates is None:
        return float("nan")
    blocks = spatial_blocks(coordinates)
    if blocks.max() < 1:
        return float("nan")
    draws = scores.block_draws(measured, predicted, blocks, n_draws=_DRAWS, seed=seed, nan_policy=nan_policy)
    return float(np.nanstd(draws)) if np.isfinite(draws).any() else float("nan")
