"""Tools: train, predict, evaluate."""

from __future__ import annotations

from ._aggregate import aggregate
from ._annotate import annotate
from ._coarsen import coarsen
from ._cross_validate import cross_validate
from ._evaluate import evaluate
from ._predict import predict
from ._predict_cohort import predict_cohort
from ._reconcile import reconcile
from ._regions import rank_regions, regions, tls_score
from ._train import train

__all__ = [
    "aggregate",
    "annotate",
    "coarsen",
    "cross_validate",
    "evaluate",
    "predict",
    "predict_cohort",
    "rank_regions",
    "reconcile",
    "regions",
    "tls_score",
    "train",
]
