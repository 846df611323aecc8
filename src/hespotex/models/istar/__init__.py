"""iStar: expression of superpixels from image features, taught by the sums over spots."""

from __future__ import annotations

from .config import IStarConfig
from .model import IStar

__all__ = ["IStar", "IStarConfig"]
