"""Readers: files and AnnData objects become a SpatialData that follows the storage contract."""

from __future__ import annotations

from ._anndata import from_anndata
from ._hest import read_hest
from ._slide import read_image
from ._st import read_st

__all__ = ["from_anndata", "read_hest", "read_image", "read_st"]
