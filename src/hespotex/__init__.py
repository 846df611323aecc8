"""Predict spatial gene expression from H&E histology, inside SpatialData.

>>> import hespotex as hx

Namespaces follow scanpy: :mod:`hx.pp <hespotex.pp>` attaches image embeddings, nuclei and graphs,
:mod:`hx.tl <hespotex.tl>` trains and predicts, :mod:`hx.pl <hespotex.pl>` plots predicted against
measured. Importing the package loads none of them: each is imported when first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._settings import settings
from ._version import __version__

if TYPE_CHECKING:
    from . import datasets, encoders, errors, get, io, metrics, models, pl, pp, segmentation, tl

__all__ = [
    "__version__",
    "datasets",
    "encoders",
    "errors",
    "get",
    "io",
    "metrics",
    "models",
    "pl",
    "pp",
    "segmentation",
    "settings",
    "tl",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
