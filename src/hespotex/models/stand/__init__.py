"""ST-AnD: expression of single nuclei from their image, learnt from the sums that spots measure."""

from __future__ import annotations

from .config import STAnDConfig
from .model import STAnD
from .split import published_split

__all__ = ["STAnD", "STAnDConfig", "published_split"]
