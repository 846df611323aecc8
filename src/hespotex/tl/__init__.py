"""Tools: train, predict, evaluate."""

from __future__ import annotations

from ._predict import predict
from ._train import train

__all__ = ["predict", "train"]
