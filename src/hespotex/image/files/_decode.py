"""Formats without random access, decoded whole into a scratch file."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ImageFormatError

if TYPE_CHECKING:
    from tifffile import TiffPageSeries

__all__ = ["check_rgb", "decode_jpeg", "decode_png", "decode_tiff"]


def check_rgb(pixels: np.ndarray, what: str) -> np.ndarray:
    """`pixels` as (h, w, 3) uint8; an opaque alpha channel is dropped.

    Raises
    ------
    ImageFormatError
        If they are no 8-bit RGB, or transparent somewhere.
    """
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


def decode_jpeg(path: Path, scratch: Path) -> np.ndarray:
    """Pixels (h, w, 3) of a JPEG file."""
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


def decode_png(path: Path, scratch: Path) -> np.ndarray:
    """Pixels (h, w, 3) of a PNG file."""
    import imagecodecs

    with path.open("rb") as file:
        header = file.read(33)
    if len(header) < 33:
        raise ImageFormatError(f"image: {path.name!r} is truncated; copy or download it again")
    if zlib.crc32(header[12:29]) != int.from_bytes(header[29:], "big"):
        raise ImageFormatError(f"image: {path.name!r} is a damaged PNG (its header); copy or download it again")
    width, height = (int.from_bytes(header[start : start + 4], "big") for start in (16, 20))
    depth, colour = header[24], header[25]
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
    return check_rgb(pixels, f"image: {path.name!r}")


def decode_tiff(series: TiffPageSeries, axes: str, name: str, scratch: Path) -> np.ndarray:
    """Pixels (h, w, 3) of the finest level of a TIFF."""
    pixels = _scratch(scratch, series.shape)
    try:
        series.asarray(out=pixels)
    except MemoryError as error:
        raise ImageFormatError(
            f"image: {name!r} holds a strip or tile that does not fit into memory: its header is damaged, or the file has to "
            "be written anew in tiles; copy or download it again"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:  # of its decoders
        raise ImageFormatError(f"image: {name!r} is a damaged TIFF ({error})") from error
    return check_rgb(pixels if axes == "YXS" else np.moveaxis(pixels, 0, -1), f"image: {name!r}")


def _scratch(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A decoded image on disk: the system writes it out where memory is short."""
    return np.memmap(folder / "pixels.raw", dtype=np.uint8, mode="w+", shape=shape)
