"""Image encoders: pixels of a tile in, a row of features out."""

from __future__ import annotations

from ._base import Encoder, EncoderInfo, PatchEncoder, TileEncoder
from ._registry import available, create, register

__all__ = ["Encoder", "EncoderInfo", "PatchEncoder", "TileEncoder", "available", "create", "register"]
