"""XFuse: a generative model of a section's image and of its counts, whose encoder reads the image alone."""

from __future__ import annotations

from .config import XFuseConfig
from .model import XFuse

__all__ = ["XFuse", "XFuseConfig"]
