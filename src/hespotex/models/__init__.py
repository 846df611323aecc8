"""Models: each is one file, sees :class:`~hespotex.data.Section` objects and returns a :class:`~hespotex.data.Prediction`."""

from __future__ import annotations

from ._base import Model, ModelInfo, Run
from ._checkpoint import load
from ._recipe import Recipe
from ._registry import available, create, get, register

__all__ = ["Model", "ModelInfo", "Recipe", "Run", "available", "create", "get", "load", "register"]
