"""Slides that a library reads by regions: openslide's, and those of wsidata's readers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...data.pyramid import level_factor
from ...errors import ImageFormatError
from ._cache import CHUNK, cached_reductions
from ._slices import span
from ._tiff import LARGEST_TILE, SINGLE_LEVEL_UP_TO, chunk_side, lazy_array

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["OpenSlideRegions", "RegionLevel", "Regions", "region_levels"]

_SMALLEST_TILE = 64  # formats of thin stripes gain nothing from chunks as thin
# Tiles of some formats lie on no grid of whole pixels, so chunks cannot end where they do; what two rows of chunks share
# stays decoded, for slides of up to 100,000 px.
_CACHE_BYTES = 2**27


class Regions(Protocol):
    """A slide that is read by regions; it must survive pickling, and threads may read at once."""

    path: Path

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels (height, width, 3) uint8 of a level, whose corner lies at (x, y) in pixels of level 0."""
        ...


class RegionLevel:
    """One level as (3, h, w) uint8, read by slices.

    Pixel (i, j) of a level is asked for at the whole pixel of level 0 next to where the library puts it. Where a level's
    size is no exact fraction, the library interpolates and the pixels are off by at most half a pixel of level 0.
    """

    ndim = 3
    dtype = np.dtype("uint8")

    def __init__(self, regions: Regions, level: int, shape: tuple[int, int], downsample: float) -> None:
        self.regions = regions
        self.level = level
        self.shape = (3, *shape)
        self.downsample = downsample

    def __dask_tokenize__(self) -> Any:
        path = self.regions.path
        stat = path.stat()
        return "hespotex-regions", type(self.regions).__name__, str(path), stat.st_size, stat.st_mtime_ns, self.level

    def __getitem__(self, key: tuple[Any, Any, Any]) -> np.ndarray:
        channels, rows, columns = key
        top, bottom, row_step = span(rows, self.shape[1])
        left, right, column_step = span(columns, self.shape[2])
        if bottom == top or right == left:
            pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        else:
            x, y = round(left * self.downsample), round(top * self.downsample)
            try:
                pixels = self.regions.read(self.level, x, y, right - left, bottom - top)
            except (RuntimeError, ValueError, TypeError, OSError, LookupError) as error:
                raise ImageFormatError(
                    f"image: {self.regions.path.name!r} is damaged: {right - left} x {bottom - top} px at x={left}, y={top} "
                    f"of level {self.level} cannot be read ({error}); copy or download the file again"
                ) from error
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)[channels, row_step, column_step])


class OpenSlideRegions:
    """A slide that openslide reads. Where it holds nothing, it is of the background's colour, white if none is stated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _slide=None, _lock=threading.Lock())

    def open(self) -> Any:
        """The open slide."""
        import openslide

        with self._lock:
            if self._slide is None:
                slide = openslide.OpenSlide(self.path)
                slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
                self._slide = slide
            return self._slide

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """As :class:`Regions` asks."""
        import openslide

        try:
            slide = self.open()
            pixels = np.asarray(slide.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError as error:
            self._slide = None  # one that failed fails for ever; threads that still read from it hold it
            raise ValueError(str(error)) from error
        alpha = pixels[..., 3:]
        if alpha.min() == 255:
            return pixels[..., :3]
        colour = slide.properties.get("openslide.background-color", "FFFFFF")
        background = np.frombuffer(bytes.fromhex(colour), np.uint8)
        weight = alpha.astype(np.uint32)
        return ((pixels[..., :3] * weight + background * (255 - weight) + 127) // 255).astype(np.uint8)


def region_levels(
    regions: Regions, sizes: list[tuple[int, int]], downsamples: list[float], tiles: list[tuple[int, int]] | None = None
) -> list[da.Array]:
    """Lazy levels of a slide read by regions: those that lie on the finest.

    Parameters
    ----------
    regions
        The slide.
    sizes
        Height and width of its levels.
    downsamples
        What its library takes for the size of their pixels.
    tiles
        Height and width of the tiles of each level, where they are known: chunks end where they do.
    """
    lazy: list[da.Array] = []
    for number, (size, downsample) in enumerate(zip(sizes, downsamples, strict=True)):
        if number and level_factor(sizes[0], size) is None:
            continue
        height, width = tiles[number] if tiles else (0, 0)
        chunks = _chunk(height), _chunk(width)
        level = RegionLevel(regions, number, size, downsample)
        lazy.append(lazy_array(level, chunks))
    if len(lazy) == 1 and max(sizes[0]) > SINGLE_LEVEL_UP_TO and regions.path.is_file():
        lazy += cached_reductions(regions.path, RegionLevel(regions, 0, sizes[0], downsamples[0]))
    return lazy


def _chunk(tile: int) -> int:
    return chunk_side(tile) if _SMALLEST_TILE <= tile <= LARGEST_TILE else CHUNK
