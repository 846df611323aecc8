"""Read results in the form other tools take."""

from __future__ import annotations

from ._prediction import prediction
from ._raster import raster

__all__ = ["prediction", "raster"]
