"""Readers: files and AnnData objects become a SpatialData that follows the storage contract."""

from __future__ import annotations

from ._slide import read_image
from ._st import read_st

__all__ = ["read_image", "read_st"]
