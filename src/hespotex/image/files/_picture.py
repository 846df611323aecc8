"""Any supported image, file or array, as lazy pyramid levels (3, h, w) uint8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DataTypeError, DataValueError, ImageFormatError, ScaleError
from ._cache import cached_pyramid, memory_pyramid
from ._decode import check_rgb, decode_jpeg, decode_png
from ._openslide import SUFFIXES, is_openslide, openslide_levels
from ._tiff import foreign, tiff_levels

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["TOLERANCE", "Picture", "isotropic", "open_picture"]

TOLERANCE = 0.03
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


@dataclass(frozen=True, eq=False)
class Picture:
    """An opened image.

    Attributes
    ----------
    levels
        Lazy (3, h, w) uint8, finest first.
    stated
        µm per pixel in x and y that the file states, if it does and the numbers can be those of a microscope.
    origin
        What it was opened from, for messages.
    objective
        Magnification that the file states: no measure of the pixel size, but a hint at it.
    """

    levels: list[da.Array]
    stated: tuple[float, float] | None
    origin: str
    objective: float | None = None

    @property
    def mpp(self) -> float | None:
        """One µm per pixel, as the file states it.

        Raises
        ------
        ScaleError
            If those of x and y differ by more than 3 %: judged here, since who gives a scale of his own needs neither.
        """
        return None if self.stated is None else isotropic(*self.stated, f"image: {self.origin!r}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the finest level."""
        height, width = self.levels[0].shape[-2:]
        return int(width), int(height)

    @property
    def hint(self) -> str:
        """What the objective lets expect, for messages about a missing scale."""
        if self.objective is None:
            return ""
        return (
            f" (its objective is {self.objective:g}x, with which most scanners give about {10 / self.objective:.2g} "
            "µm/px: check it)"
        )


def open_picture(image: str | Path | np.ndarray) -> Picture:
    """Open the file of a slide or picture, or an array (h, w, 3) uint8.

    Raises
    ------
    DataTypeError
        If `image` is neither a path nor an array.
    DataValueError
        If there is no such file, or it may not be read.
    ImageFormatError
        If the image is not 8-bit RGB, is damaged, or of another format.
    MissingDependencyError
        If the format needs openslide, which is not installed.
    """
    if isinstance(image, np.ndarray):
        return Picture(memory_pyramid(np.moveaxis(check_rgb(image, "the image array"), -1, 0)), None, "the image array")
    if not isinstance(image, str | Path):
        raise DataTypeError(f"image: a path or an array (height, width, 3) of uint8 is needed, not {type(image)}")
    path = Path(image).absolute()  # processes that open it again may work in another folder
    magic = _first_bytes(path)
    if path.suffix.lower() in SUFFIXES:
        return _by_openslide(path, f"a {path.suffix} slide")
    if magic[:4] in _TIFF:
        return _open_tiff(path)
    if magic[:3] == b"\xff\xd8\xff":
        return Picture(cached_pyramid(path, lambda scratch: decode_jpeg(path, scratch)), None, path.name)
    if magic[:8] == b"\x89PNG\r\n\x1a\n":
        return Picture(cached_pyramid(path, lambda scratch: decode_png(path, scratch)), None, path.name)
    if is_openslide(path):
        return _by_openslide(path, "this slide")
    raise ImageFormatError(
        f"image: {path.name!r} is neither TIFF, JPEG nor PNG, nor a slide that openslide reads; convert it to a tiled "
        "TIFF first, or pass wsidata.open_wsi(path) in place of it, where one of wsidata's readers knows it"
    )


def isotropic(mpp_x: float, mpp_y: float, what: str) -> float:
    """One µm per pixel out of two: their geometric mean.

    Raises
    ------
    ScaleError
        If they differ by more than 3 %.
    """
    if not (mpp_x > 0 and mpp_y > 0) or max(mpp_x, mpp_y) / min(mpp_x, mpp_y) - 1 > TOLERANCE:
        raise ScaleError(
            f"{what} gives {mpp_x:.4g} µm/px in x and {mpp_y:.4g} in y; they may differ by at most "
            f"{TOLERANCE:.0%}. Resample the image to square pixels, or correct the scale given"
        )
    return float(np.sqrt(mpp_x * mpp_y))


def _first_bytes(path: Path) -> bytes:
    """Start of a file, after checking that it is one."""
    try:
        if path.is_dir():
            raise DataValueError(f"image: {str(path)!r} is a folder, not a file{_advice_on(path)}")
        if not path.exists():
            raise DataValueError(f"image: there is no file {str(path)!r}")
        with path.open("rb") as file:
            magic = file.read(32)
    except OSError as error:
        raise DataValueError(f"image: {str(path)!r} cannot be read ({error.strerror or error})") from error
    if not magic:
        raise ImageFormatError(f"image: {path.name!r} is empty (0 bytes); copy or download it again")
    return magic


def _advice_on(folder: Path) -> str:
    slide = folder.with_suffix(".mrxs")
    if (folder / "Slidedat.ini").is_file():
        return f"; it holds the pixels of a slide, whose own file is {slide.name!r}: pass that"
    if any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs")):
        return "; a SpatialData store is read by spatialdata.read_zarr"
    return ""


def _by_openslide(path: Path, what: str) -> Picture:
    levels, stated, objective = openslide_levels(path, what)
    return Picture(levels, stated, path.name, objective)


def _open_tiff(path: Path) -> Picture:
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
    except (ValueError, OSError) as error:
        raise ImageFormatError(f"image: {path.name!r} is a damaged TIFF ({error})") from error
    with tiff:
        maker = foreign(tiff, path.name)
        if maker is None:
            levels, stated, objective = tiff_levels(path, tiff)
            return Picture(levels, stated, path.name, objective)
    return _by_openslide(path, f"a slide of {maker}")
