"""HISTEX-style super-resolution: windows of superpixels and nearby measured expression attend to each other."""

from __future__ import annotations

from .config import HistexConfig
from .model import Histex

__all__ = ["Histex", "HistexConfig"]
