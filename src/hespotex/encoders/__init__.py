"""Image encoders: pixels of a tile in, a row of features out."""

from __future__ import annotations

from ._base import Encoder, EncoderInfo, PatchEncoder, TileEncoder, identifying
from ._registry import as_encoder, available, create, register
from ._resolution import check_resolution
from .module import from_module

__all__ = [
    "Encoder",
    "EncoderInfo",
    "PatchEncoder",
    "TileEncoder",
    "as_encoder",
    "available",
    "check_resolution",
    "create",
    "from_module",
    "identifying",
    "register",
]
