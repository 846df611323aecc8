"""TESLA: every superpixel is the weighted mean of the spots that are near in space and in colour; nothing is trained."""

from __future__ import annotations

from .config import TESLAConfig
from .model import TESLA

__all__ = ["TESLA", "TESLAConfig"]
