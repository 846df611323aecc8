"""STAGE: expression as a function of position, by an auto-encoder whose code is the position."""

from __future__ import annotations

from .config import StageConfig
from .model import Stage

__all__ = ["Stage", "StageConfig"]
