"""Core data structures: what a model sees (`Section`) and returns (`Prediction`), and how both reach SpatialData.

Only :mod:`~hespotex.data.section` and :mod:`~hespotex.data.units` are imported here; they need NumPy
and SciPy alone. :mod:`~hespotex.data.bridge` and :mod:`~hespotex.data.geometry` know SpatialData.
"""

from __future__ import annotations

from .section import Parts, Prediction, Rows, Section, Targets
from .units import UNITS, normalize

__all__ = ["UNITS", "Parts", "Prediction", "Rows", "Section", "Targets", "normalize"]
