"""Tools: train, predict, evaluate."""

from __future__ import annotations

from ._aggregate import aggregate
from ._coarsen import coarsen
from ._cross_validate import cross_validate
from ._evaluate import evaluate
from ._predict import predict
from ._train import train

__all__ = ["aggregate", "coarsen", "cross_validate", "evaluate", "predict", "train"]
