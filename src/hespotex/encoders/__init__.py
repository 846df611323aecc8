"""Image encoders: pixels of a tile in, a row of features out."""

from __future__ import annotations

from ._base import Encoder, TileEncoder
from ._registry import available, create, register

__all__ = ["Encoder", "TileEncoder", "available", "create", "register"]
