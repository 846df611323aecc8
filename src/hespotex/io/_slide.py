"""A slide without expression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._logging import logger
from ._assemble import build_slide
from ._image import open_picture, resolve_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_image"]


def read_image(
    path: str | Path, mpp: float | None = None, *, name: str | None = None, patient: str | None = None
) -> SpatialData:
    """Read an H&E image as a slide without expression.

    A tiled TIFF (also the TIFF flavours of slide scanners, such as Aperio's ``.svs``) is read lazily where it lies;
    a JPEG, PNG or stripped TIFF is decoded once into the cache under ``settings.cache_dir``. The image returned reads
    from there: if the cache is deleted in a running session, the next access raises an error, and the image has to be
    read again. What ``sdata.write()`` has put on disk does not need the cache.

    Parameters
    ----------
    path
        TIFF, JPEG or PNG, 8-bit RGB. An opaque alpha channel is dropped.
    mpp
        µm per pixel. By default what the TIFF states (OME metadata, Aperio's description, resolution tags);
        the dpi of a JPEG or PNG is no physical scale and is not read.
    name
        Name of the slide; the stem of `path` by default.
    patient
        Patient, kept beside the name.

    Returns
    -------
    SpatialData
        ``images["image"]``, lazy (3, h, w) uint8, in ``"global"`` (pixels) and ``"microns"``.

    Raises
    ------
    ImageFormatError
        If the image is not 8-bit RGB, is damaged, or of another format.
    ScaleError
        If `mpp` is not given and the file does not state it, or not the same for x and y.

    Examples
    --------
    >>> import hespotex as hx
    >>> slide = hx.io.read_image("biopsy.jpg", mpp=0.5)  # doctest: +SKIP
    """
    picture = open_picture(path)
    mpp = resolve_mpp(mpp, picture)
    sdata = build_slide(picture.levels, mpp, {"name": name or Path(path).stem, "patient": patient})
    logger.info("read %s: %d x %d px, %.4g µm/px", picture.origin, *picture.size, mpp)
    return sdata
