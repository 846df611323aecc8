"""Image files as lazy pyramids, whatever the format: the floor under :mod:`hespotex.io` and LazySlide's objects.

Which library decodes what, measured on one core (1024 px chunks of a pyramid of 256 px JPEG tiles, 8,001 x 6,003 px):

===================================  =========
tifffile, tile by tile (`_tiff`)     238 Mpx/s
tifffile, through its zarr store     153 Mpx/s
tiffslide (the same, and fsspec)     137 Mpx/s
openslide                             39 Mpx/s
===================================  =========

All four give the same pixels, bit for bit, at level 0, also of a real Aperio slide; at coarser levels whose size is not
an exact fraction openslide moves the image by a part of a pixel and interpolates. So tiled TIFFs (plain, OME, Aperio's,
of whatever program) are read through tifffile, and openslide reads what only it can: MRXS, VMS, DICOM and others that are
no TIFF, and the TIFFs of scanners that do not lay their tiles side by side on one grid or do not code them as
TIFF says (see `_tiff.foreign`). Further formats of wsidata's readers come in through its ``WSIData``.
"""

from __future__ import annotations

from ._cache import memory_pyramid
from ._picture import TOLERANCE, Picture, isotropic, open_picture
from ._regions import RegionLevel, Regions, region_levels

__all__ = [
    "TOLERANCE",
    "Picture",
    "RegionLevel",
    "Regions",
    "isotropic",
    "memory_pyramid",
    "open_picture",
    "region_levels",
]
