"""Readers: files and AnnData objects become a SpatialData that follows the storage contract."""

from __future__ import annotations

from ._anndata import from_anndata
from ._hest import read_hest
from ._lazy import read_lazy
from ._persist import persist
from ._st import read_st
from ._visium_hd import read_visium_hd
from ._wsi import read_image, read_wsi
from ._xenium import read_xenium

__all__ = [
    "from_anndata",
    "persist",
    "read_hest",
    "read_image",
    "read_lazy",
    "read_st",
    "read_visium_hd",
    "read_wsi",
    "read_xenium",
]
