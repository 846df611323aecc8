"""Slides that only openslide reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..._optional import optional_import
from ...errors import ImageFormatError
from ._regions import OpenSlideRegions, region_levels
from ._scale import number, sane_mpp

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["SUFFIXES", "is_openslide", "openslide_levels"]

SUFFIXES = {".mrxs", ".vms", ".vmu", ".svslide", ".dcm", ".czi"}  # of formats that are no TIFF


def is_openslide(path: Path) -> bool:
    """Whether openslide, if it is installed, knows the format of a file."""
    try:
        import openslide
    except (ImportError, OSError):
        return False
    return openslide.OpenSlide.detect_format(path) is not None


def openslide_levels(path: Path, what: str) -> tuple[list[da.Array], tuple[float, float] | None, float | None]:
    """Lazy levels, µm per pixel in x and y, and magnification of the objective, as far as stated.

    Parameters
    ----------
    path
        The file; its companions, such as the folder of a .mrxs, lie beside it.
    what
        What it is, for the message where openslide is missing.

    Raises
    ------
    MissingDependencyError
        If openslide is not installed.
    ImageFormatError
        If openslide cannot read it.
    """
    openslide = optional_import("openslide", feature=f"reading {what}", extra="wsi")
    regions = OpenSlideRegions(path)
    try:
        slide = regions.open()
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise ImageFormatError(f"image: openslide does not read {path.name!r}{_companion(path)}") from error
    except openslide.OpenSlideError as error:
        raise ImageFormatError(f"image: {path.name!r} is damaged or incomplete ({error}){_companion(path)}") from error
    properties = slide.properties
    sizes = [(height, width) for width, height in slide.level_dimensions]
    tiles = [_tile(properties, level) for level in range(len(sizes))]
    x, y = (number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    stated = None if x is None or y is None else sane_mpp((x, y))
    levels = region_levels(regions, sizes, list(slide.level_downsamples), tiles)
    return levels, stated, number(properties.get("openslide.objective-power"))


def _tile(properties: Mapping[str, str], level: int) -> tuple[int, int]:
    height, width = (number(properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("height", "width"))
    return int(height or 0), int(width or 0)


def _companion(path: Path) -> str:
    folder = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and not folder.is_dir():
        return f"; its pixels should lie in a folder {folder.name!r} beside it, which is not there"
    return "; copy or download it again, or convert it to a tiled TIFF"
