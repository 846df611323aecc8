"""Which image of a TIFF is the slide, and whether its pixels come as RGB."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ...errors import HespotexWarning, ImageFormatError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

__all__ = ["JPEG", "YCBCR", "delivers_rgb", "rgb_axes", "slide_series"]

JPEG = {6, 7, 33007}  # compressions
_RGB_AXES = ("YXS", "SYX", "CYX")
_BESIDE = re.compile(r"(label|macro|thumbnail|overview|preview)( image)?", re.IGNORECASE)
_COMPARABLE = 0.5  # of the area: less is a level that no pyramid was made of, a thumbnail or a label
_GREY, _RGB, YCBCR = 1, 2, 6  # photometric interpretations; OME-TIFFs keep each channel as a grey page


def slide_series(tiff: TiffFile, name: str) -> int:
    """Number of the largest RGB image of a TIFF, wherever it stands: a thumbnail, label or macro image may come first.

    Raises
    ------
    ImageFormatError
        If the TIFF holds no image.

    Warns
    -----
    HespotexWarning
        If there are others of comparable size, such as further sections.
    """
    found = [number for number, series in enumerate(tiff.series) if series.size]
    if not found:
        raise ImageFormatError(f"image: {name!r} holds no image")
    areas = {number: _area(tiff.series[number]) for number in found}
    images = [number for number in found if not _is_beside(tiff.series[number])] or found
    coloured = [
        number for number in images if _is_coloured(tiff.series[number]) and tiff.series[number].dtype == np.uint8
    ]
    slide = max(coloured or images, key=areas.__getitem__)
    others = [number for number in coloured if number != slide and areas[number] >= _COMPARABLE * areas[slide]]
    if others:
        warnings.warn(
            f"image: {name!r} holds several images: {_called(tiff, slide)} is read, and not "
            f"{', '.join(_called(tiff, number) for number in others)}. "
            f"Write another into a file of its own, e.g. tifffile.imwrite(new_path, tifffile.imread(path, "
            f"series={others[0]}), photometric='rgb', tile=(512, 512)), and give its mpp=",
            HespotexWarning,
            stacklevel=6,  # of the call of the reader
        )
    return slide


def rgb_axes(series: TiffPageSeries, name: str) -> str:
    """Axes of an 8-bit RGB(A) series: "YXS", "SYX" or "CYX".

    Raises
    ------
    ImageFormatError
        If it is another kind of image.
    """
    axes = series.axes
    if axes not in _RGB_AXES or not _is_coloured(series):
        if axes.endswith("YXS") and _is_coloured(series):
            advice = (
                "Take one of its images: tifffile.imwrite(new_path, tifffile.imread(path, "
                f"key={series.keyframe.index}), photometric='rgb', "
            )
        else:
            advice = "Convert it with tifffile.imwrite(new_path, rgb, photometric='rgb', compression='jpeg', "
        raise ImageFormatError(
            f"image: {name!r} has axes {axes!r} of shape {series.shape}; 8-bit RGB is needed. {advice}tile=(512, 512))"
        )
    if series.dtype != np.uint8:
        raise ImageFormatError(
            f"image: {name!r} holds {series.dtype}; 8-bit RGB is needed. Convert it, e.g. "
            "skimage.util.img_as_ubyte(skimage.exposure.rescale_intensity(image))"
        )
    if not delivers_rgb(series):
        page = series.keyframe
        colours, coding = (getattr(value, "name", value) for value in (page.photometric, page.compression))
        raise ImageFormatError(
            f"image: {name!r} holds colours as {colours} (compression {coding}); 8-bit RGB is needed. Convert it, e.g. "
            "PIL.Image.open(path).convert('RGB').save(new_path), and give its mpp="
        )
    return axes


def delivers_rgb(series: TiffPageSeries) -> bool:
    """Whether RGB comes out of the decoder: it turns YCbCr into RGB for JPEG only, of three channels that lie together."""
    page = series.keyframe
    if page.photometric == YCBCR:
        return page.compression in JPEG and page.planarconfig == 1 and page.samplesperpixel == 3
    return page.photometric in (_GREY, _RGB)


def _is_beside(series: TiffPageSeries) -> bool:
    """Whether an image only shows what the slide is."""
    return series.keyframe.is_reduced or _BESIDE.fullmatch(series.name or "") is not None


def _is_coloured(series: TiffPageSeries) -> bool:
    """Whether it is an image, or a stack of them, of three or four channels."""
    axes, shape = series.axes[-3:], series.shape[-3:]
    return axes in _RGB_AXES and shape[axes.index(axes.strip("YX"))] in (3, 4)


def _area(series: TiffPageSeries) -> int:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return int(sizes.get("Y", 1)) * int(sizes.get("X", 1))


def _called(tiff: TiffFile, number: int) -> str:
    series = tiff.series[number]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    named = f" {series.name!r}" if series.name else ""
    return f"series {number}{named} of {sizes['X']} x {sizes['Y']} px"
