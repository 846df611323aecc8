"""Scores, nulls, ceiling and intervals: pure functions on arrays.

Scores are per gene within one section; averaging is a separate, named step (:func:`aggregate`).
"""

from __future__ import annotations

from ._aggregate import aggregate
from ._bootstrap import Interval, PairedDifference, block_draws, block_interval, paired_difference, resample_interval
from ._ceiling import Ceiling, ceiling, gene_ceiling, split_half
from ._coexpression import Coexpression, coexpression, coexpression_score
from ._correlation import pearson, spearman
from ._error import deviance_explained, mae, mse, nrmse, r2, rmse
from ._nulls import (
    null_coordinate,
    null_density,
    null_depth,
    null_random_gene,
    null_shuffle,
    null_sibling_mean,
    null_train_mean,
)
from ._raster import raster_rmse, raster_ssim
from ._score import DEFAULT_METRICS, METRICS, score
from ._spread import clipped_fraction, is_oversmoothed, relative_variance_distance, variance_ratio
from ._ssim import Windows, lattice_windows, ssim

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Ceiling",
    "Coexpression",
    "Interval",
    "PairedDifference",
    "Windows",
    "aggregate",
    "block_draws",
    "block_interval",
    "ceiling",
    "clipped_fraction",
    "coexpression",
    "coexpression_score",
    "deviance_explained",
    "gene_ceiling",
    "is_oversmoothed",
    "lattice_windows",
    "mae",
    "mse",
    "nrmse",
    "null_coordinate",
    "null_density",
    "null_depth",
    "null_random_gene",
    "null_shuffle",
    "null_sibling_mean",
    "null_train_mean",
    "paired_difference",
    "pearson",
    "r2",
    "raster_rmse",
    "raster_ssim",
    "relative_variance_distance",
    "resample_interval",
    "rmse",
    "score",
    "spearman",
    "split_half",
    "ssim",
    "variance_ratio",
]
