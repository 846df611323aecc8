"""Any supported image, file or array, as lazy pyramid levels (3, h, w) uint8."""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataTypeError, DataValueError, HespotexWarning, ImageFormatError, ScaleError
from ._pyramid import CHUNK, cached_pyramid, cached_reductions, memory_pyramid
from ._tiff import TiffLevel, stated_mpp

if TYPE_CHECKING:
    import dask.array as da
    from tifffile import TiffFile, TiffPageSeries

__all__ = ["Picture", "isotropic", "open_picture", "resolve_mpp"]

_SANE_MPP = (0.05, 20.0)  # a 72 dpi tag says 353 µm/px
_TOLERANCE = 0.03
_LARGEST_TILE = 4096
_SINGLE_LEVEL_UP_TO = 2048


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
    """

    levels: list[da.Array]
    stated: tuple[float, float] | None
    origin: str

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


def open_picture(image: str | Path | np.ndarray) -> Picture:
    """Open a TIFF, JPEG or PNG file, or an array (h, w, 3) uint8.

    Raises
    ------
    DataTypeError
        If `image` is neither a path nor an array.
    ImageFormatError
        If the image is not 8-bit RGB, is damaged, or of another format.
    """
    if isinstance(image, np.ndarray):
        return Picture(memory_pyramid(np.moveaxis(_rgb(image, "the image array"), -1, 0)), None, "the image array")
    if not isinstance(image, str | Path):
        raise DataTypeError(f"image: a path or an array (height, width, 3) of uint8 is needed, not {type(image)}")
    path = Path(image)
    if not path.is_file():
        raise DataValueError(f"image: there is no file {str(path)!r}")
    with path.open("rb") as file:
        magic = file.read(32)
    if magic[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return _open_tiff(path)
    if magic[:3] == b"\xff\xd8\xff":
        return Picture(cached_pyramid(path, lambda scratch: _decode_jpeg(path, scratch)), None, path.name)
    if magic[:8] == b"\x89PNG\r\n\x1a\n":
        return Picture(cached_pyramid(path, lambda scratch: _decode_png(path, magic, scratch)), None, path.name)
    raise ImageFormatError(f"image: {path.name!r} is neither TIFF, JPEG nor PNG; convert it to a tiled TIFF first")


def isotropic(mpp_x: float, mpp_y: float, what: str) -> float:
    """One µm per pixel out of two: their geometric mean.

    Raises
    ------
    ScaleError
        If they differ by more than 3 %.
    """
    if not (mpp_x > 0 and mpp_y > 0) or abs(mpp_x / mpp_y - 1) > _TOLERANCE:
        raise ScaleError(
            f"{what} gives {mpp_x:.4g} µm/px in x and {mpp_y:.4g} in y; they may differ by at most "
            f"{_TOLERANCE:.0%}. Resample the image to square pixels, or correct the scale given"
        )
    return float(np.sqrt(mpp_x * mpp_y))


def resolve_mpp(mpp: float | None, picture: Picture, *, advice: str = "pass mpp=") -> float:
    """The mpp given, else the one the file states.

    Raises
    ------
    ScaleError
        If neither is there, or `mpp` is not a positive number.
    """
    if mpp is None:
        if picture.mpp is None:
            raise ScaleError(f"mpp: {picture.origin} does not state its µm per pixel; {advice}")
        return picture.mpp
    mpp = check_positive("mpp", mpp)
    if picture.stated is not None and max(abs(stated / mpp - 1) for stated in picture.stated) > _TOLERANCE:
        x, y = picture.stated
        stated = f"{x:.4g}" if x == y else f"{x:.4g} (x) and {y:.4g} (y)"
        warnings.warn(
            f"mpp={mpp:.4g} was given, but {picture.origin} states {stated} µm/px; the given one is used",
            HespotexWarning,
            stacklevel=3,
        )
    return mpp


def check_positive(name: str, value: float) -> float:
    """`value` as a positive finite float.

    Raises
    ------
    ScaleError
        If it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not (np.isfinite(number) and number > 0):
        raise ScaleError(f"{name}={value!r} is not a positive number")
    return number


def _rgb(pixels: np.ndarray, what: str) -> np.ndarray:
    """`pixels` as (h, w, 3) uint8; an opaque alpha channel is dropped."""
    if pixels.dtype != np.uint8:
        raise ImageFormatError(
            f"{what} holds {pixels.dtype}; 8-bit RGB is needed. Convert it, e.g. "
            "skimage.util.img_as_ubyte(skimage.exposure.rescale_intensity(image))"
        )
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4):
        raise ImageFormatError(
            f"{what} has shape {pixels.shape}; (height, width, 3) is needed. A grey image cannot serve as H&E; "
            "a channel-first array is turned by numpy.moveaxis(image, 0, -1)"
        )
    if min(pixels.shape[:2]) < 1:
        raise ImageFormatError(f"{what} is empty: shape {pixels.shape}")
    if pixels.shape[-1] == 4:
        if (pixels[..., 3] != 255).any():
            raise ImageFormatError(
                f"{what} has transparent pixels; put it on a background first, e.g. "
                "PIL.Image.alpha_composite(PIL.Image.new('RGBA', image.size, 'white'), image).convert('RGB')"
            )
        pixels = pixels[..., :3]
    return pixels


def _decode_jpeg(path: Path, scratch: Path) -> np.ndarray:
    import imagecodecs
    from PIL import JpegImagePlugin

    # the plugin itself, since PIL.Image.open refuses large images through a global that is not ours to set
    with path.open("rb") as file:
        try:
            header = JpegImagePlugin.JpegImageFile(file)
        except (SyntaxError, OSError) as error:
            raise ImageFormatError(f"image: {path.name!r} is a damaged JPEG ({error})") from error
        (width, height), mode = header.size, header.mode
        if mode != "RGB":
            raise ImageFormatError(
                f"image: {path.name!r} is a JPEG of mode {mode!r}, 8-bit RGB is needed; convert it with "
                "PIL.Image.open(path).convert('RGB').save(new_path)"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # the decoder fills the rest of a truncated file with grey and says nothing
            if data.rfind(b"\xff\xd9", max(0, len(data) - 65_536)) < 0:
                raise ImageFormatError(f"image: {path.name!r} is truncated; copy or download it again")
            pixels = _scratch(scratch, (height, width, 3))
            try:
                imagecodecs.jpeg8_decode(data, out=pixels)
            except imagecodecs.Jpeg8Error as error:
                raise ImageFormatError(f"image: {path.name!r} is a damaged JPEG ({error})") from error
    return pixels


def _decode_png(path: Path, magic: bytes, scratch: Path) -> np.ndarray:
    import imagecodecs

    width, height = (int.from_bytes(magic[start : start + 4], "big") for start in (16, 20))
    depth, colour = magic[24], magic[25]
    channels = {2: 3, 6: 4}.get(colour)
    if depth != 8 or channels is None:
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}.get(colour, "unknown")
        raise ImageFormatError(
            f"image: {path.name!r} is a {depth}-bit {kind} PNG, 8-bit RGB is needed; convert it with "
            "PIL.Image.open(path).convert('RGB').save(new_path)"
        )
    pixels = _scratch(scratch, (height, width, channels))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            imagecodecs.png_decode(data, out=pixels)
        except imagecodecs.PngError as error:
            raise ImageFormatError(f"image: {path.name!r} is a damaged PNG ({error})") from error
    return _rgb(pixels, f"image: {path.name!r}")


def _scratch(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A decoded image on disk: the system writes it out where memory is short."""
    return np.memmap(folder / "pixels.raw", dtype=np.uint8, mode="w+", shape=shape)


def _open_tiff(path: Path) -> Picture:
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError, OSError) as error:
        raise ImageFormatError(f"image: {path.name!r} is a damaged TIFF ({error})") from error
    with tiff:
        if not tiff.series:
            raise ImageFormatError(f"image: {path.name!r} holds no image")
        series = tiff.series[0]
        axes = _check_tiff(series, path.name)
        mpp = _sane(stated_mpp(tiff))
        page = series.keyframe
        # a truncated file still opens; the missing tiles would be met much later
        ends = [offset + length for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends, default=0) > path.stat().st_size:
            raise ImageFormatError(f"image: {path.name!r} is truncated; copy or download it again")
        samples = series.shape[series.axes.index(axes.strip("YX"))]
        if page.is_tiled and max(page.tilelength, page.tilewidth) <= _LARGEST_TILE and samples == 3:
            levels = _lazy_levels(path, tiff, series, axes)
        else:
            levels = cached_pyramid(path, lambda scratch: _decode_tiff(series, axes, path.name, scratch))
    return Picture(levels, mpp, path.name)


def _check_tiff(series: TiffPageSeries, name: str) -> str:
    """Axes of an 8-bit RGB(A) series: "YXS", "SYX" or "CYX"."""
    axes = series.axes
    if axes not in ("YXS", "SYX", "CYX") or series.shape["".join(axes).index(axes.strip("YX"))] not in (3, 4):
        raise ImageFormatError(
            f"image: {name!r} has axes {axes!r} of shape {series.shape}; 8-bit RGB is needed. Convert it with "
            "tifffile.imwrite(new_path, rgb, photometric='rgb', tile=(512, 512), compression='jpeg')"
        )
    if series.dtype != np.uint8:
        raise ImageFormatError(
            f"image: {name!r} holds {series.dtype}; 8-bit RGB is needed. Convert it, e.g. "
            "skimage.util.img_as_ubyte(skimage.exposure.rescale_intensity(image))"
        )
    return axes


def _lazy_levels(path: Path, tiff: TiffFile, series: TiffPageSeries, axes: str) -> list[da.Array]:
    import dask.array as da

    lazy = []
    for number, level in enumerate(series.levels):
        if level.axes != axes or level.dtype != np.uint8:
            continue
        height, width = level.shape[axes.index("Y")], level.shape[axes.index("X")]
        page = level.keyframe
        chunks = tuple(_chunk(tile) for tile in (page.tilelength, page.tilewidth)) if page.is_tiled else (CHUNK, CHUNK)
        source = TiffLevel(path, number, axes, (height, width))
        lazy.append(da.from_array(source, chunks=(3, *chunks), asarray=True))
    if len(lazy) == 1 and max(lazy[0].shape[-2:]) > _SINGLE_LEVEL_UP_TO:
        lazy += cached_reductions(path, TiffLevel(path, 0, axes, lazy[0].shape[-2:]))
    return lazy


def _chunk(tile: int) -> int:
    """The multiple of the tile side next to our chunk side."""
    return tile * max(1, CHUNK // tile)


def _decode_tiff(series: TiffPageSeries, axes: str, name: str, scratch: Path) -> np.ndarray:
    pixels = _scratch(scratch, series.shape)
    series.asarray(out=pixels)
    return _rgb(pixels if axes == "YXS" else np.moveaxis(pixels, 0, -1), f"image: {name!r}")


def _sane(mpp: tuple[float, float] | None) -> tuple[float, float] | None:
    if mpp is None or not all(_SANE_MPP[0] <= value <= _SANE_MPP[1] for value in mpp):
        return None
    return mpp
