"""A slide without expression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._logging import logger
from ._assemble import build_slide
from ._image import Picture, open_picture, resolve_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_image", "read_wsi"]


def read_wsi(
    path: str | Path, mpp: float | None = None, *, name: str | None = None, patient: str | None = None
) -> SpatialData:
    """Read a whole slide, or another H&E image, as a slide without expression.

    Nothing is decoded that is not looked at: tiled TIFFs (plain, OME, Aperio's ``.svs``) are read lazily where they lie
    through tifffile, and so, through openslide (``pip install 'hespotex[wsi]'``), are the other formats of scanners:
    Hamamatsu's ``.ndpi`` and ``.vms``, 3DHISTECH's ``.mrxs``, Leica's ``.scn``, Ventana's ``.bif``, Philips' TIFF,
    Sakura's ``.svslide``, Zeiss' ``.czi`` and DICOM. The image is that on which openslide counts pixels, so
    coordinates of other programs that use it fit. It can be sent to other processes, which open the file again.

    The levels of the file are used where they lie on the finest by a whole number of pixels. Of a slide that has only
    one level, coarser ones are made once, in bounded memory, in the cache under ``settings.cache_dir``. A JPEG, PNG or
    stripped TIFF is decoded into that cache as a whole. If the cache is deleted in a running session, the next access to
    what lies there raises an error, and the image has to be read again. What ``sdata.write()`` has put on disk needs
    neither the cache nor the file.

    Parameters
    ----------
    path
        The slide's file, 8-bit RGB. An opaque alpha channel is dropped. What a slide leaves out is white. Of a TIFF with
        several images the largest is read, wherever it stands.
    mpp
        µm per pixel. By default what the file states (OME metadata, the scanner's description, resolution tags of a TIFF);
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
    DataValueError
        If there is no such file, or it may not be read.
    ImageFormatError
        If the image is not 8-bit RGB, is empty, truncated or damaged, or of another format. Damage inside a tile shows
        when it is decoded: the same error is raised then, with the place. JPEG has no checksum, though: where the damage
        leaves a stream that can be decoded (flipped bits, bytes that were overwritten), it may show as wrong colours only.
    ScaleError
        If `mpp` is not given and the file does not state it, or not the same for x and y.
    MissingDependencyError
        If the format needs openslide, which is not installed.

    Warns
    -----
    HespotexWarning
        If `mpp` is not what the file states, or a TIFF holds several images of comparable size, of which one is read.

    Examples
    --------
    >>> import hespotex as hx
    >>> slide = hx.io.read_wsi("biopsy.svs")  # doctest: +SKIP
    >>> hx.pp.detect_tissue(slide)  # doctest: +SKIP
    """
    picture = open_picture(path)
    return _slide(picture, resolve_mpp(mpp, picture), name or Path(path).stem, patient)


def read_image(
    path: str | Path, mpp: float | None = None, *, name: str | None = None, patient: str | None = None
) -> SpatialData:
    """Read an H&E picture as a slide without expression.

    The same as :func:`read_wsi`, which takes pictures (JPEG, PNG, TIFF) as well: a name for what is no whole slide.

    Parameters
    ----------
    path, mpp, name, patient
        As there. A JPEG or PNG states no scale, so `mpp` is needed.

    Returns
    -------
    SpatialData
        ``images["image"]``, lazy (3, h, w) uint8, in ``"global"`` (pixels) and ``"microns"``.

    Raises
    ------
    DataValueError, ImageFormatError, ScaleError
        As there.

    Examples
    --------
    >>> import hespotex as hx
    >>> slide = hx.io.read_image("biopsy.jpg", mpp=0.5)  # doctest: +SKIP
    """
    picture = open_picture(path)
    return _slide(picture, resolve_mpp(mpp, picture), name or Path(path).stem, patient)


def _slide(picture: Picture, mpp: float, name: str, patient: str | None) -> SpatialData:
    sdata = build_slide(picture.levels, mpp, {"name": name, "patient": patient})
    logger.info("read %s: %d x %d px, %d levels, %.4g µm/px", picture.origin, *picture.size, len(picture.levels), mpp)
    return sdata
