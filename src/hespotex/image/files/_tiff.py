"""TIFFs whose tiles lie side by side on one grid, read tile by tile."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.pyramid import level_factor
from ...errors import ImageFormatError
from ._cache import CHUNK, cached_pyramid, cached_reductions
from ._decode import decode_tiff
from ._scale import objective_of, sane_mpp, stated_mpp
from ._series import JPEG, YCBCR, delivers_rgb, rgb_axes, slide_series
from ._slices import span

if TYPE_CHECKING:
    import dask.array as da
    from tifffile import TiffFile, TiffPageSeries

__all__ = ["TiffLevel", "chunk_side", "foreign", "lazy_array", "tiff_levels"]

LARGEST_TILE = 4096
SINGLE_LEVEL_UP_TO = 2048
GLASS = 255  # of tiles that a sparse file leaves out
_SCAN, _END = b"\xff\xda", b"\xff\xd9"  # markers in JPEG streams
_FEWEST_ZEROS = 64

# TIFFs that tifffile opens, but not as the slide: tiles overlap or have gaps (Ventana, Trestle), the first image is the
# label or one of several areas (Leica), levels are padded to whole tiles (Philips), a level is one JPEG stream whose
# restart markers must be found (Hamamatsu), colours are YCbCr and nothing says so (early JPEG 2000 of Aperio).
_FOREIGN = {"is_ndpi": "Hamamatsu", "is_scn": "Leica", "is_bif": "Ventana", "is_philips": "Philips"}
_APERIO_YCBCR, _APERIO_RGB = 33003, 33005


class TiffLevel:
    """One level of a tiled or stripped TIFF as (3, h, w) uint8, read by slices.

    The file is opened at the first read and again after unpickling, so that the lazy image travels to other processes;
    there it stays open from task to task. Threads, and processes that were forked, may read at once.

    Tiles that a sparse file leaves out (of no bytes) are white, as glass is.
    """

    ndim = 3
    dtype = np.dtype("uint8")

    def __init__(self, path: Path, series: int, level: int, axes: str, shape: tuple[int, int]) -> None:
        self.path = path
        self.series = series
        self.level = level
        self.axes = axes
        self.shape = (3, *shape)
        self._file: _OpenLevel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=None)

    def __dask_tokenize__(self) -> Any:
        stat = self.path.stat()
        return "hespotex-tiff", str(self.path), stat.st_size, stat.st_mtime_ns, self.series, self.level

    def __getitem__(self, key: tuple[Any, Any, Any]) -> np.ndarray:
        channels, rows, columns = key
        top, bottom, row_step = span(rows, self.shape[1])
        left, right, column_step = span(columns, self.shape[2])
        pixels = np.empty((3, bottom - top, right - left), np.uint8)
        file = self._open()
        for plane in file.planes:
            for row in range(top // plane.height, -(-bottom // plane.height)):
                for column in range(left // plane.width, -(-right // plane.width)):
                    y, x = row * plane.height, column * plane.width
                    y0, y1, x0, x1 = (
                        max(y, top),
                        min(y + plane.height, bottom),
                        max(x, left),
                        min(x + plane.width, right),
                    )
                    place = plane.channels, slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
                    tile = self._decode(file, plane, row, column)
                    pixels[place] = GLASS if tile is None else tile[:, y0 - y : y1 - y, x0 - x : x1 - x]
        return np.ascontiguousarray(pixels[channels, row_step, column_step])

    def _decode(self, file: _OpenLevel, plane: _Plane, row: int, column: int) -> np.ndarray | None:
        """One tile of the file, (channels, h, w); None if it was left out. The only place where pixels are decoded."""
        page, index = plane.page, plane.first + row * plane.across + column
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if length == 0:
            return None
        try:
            data = file.read(offset, length)
            if page.keyframe.compression in JPEG:
                _check_jpeg(data, plane.height * plane.width)
            tile = page.keyframe.decode(data, index, jpegtables=page.jpegtables)[0]
            return np.moveaxis(tile[0], -1, 0)
        except (RuntimeError, ValueError, TypeError, OSError) as error:  # of some thirty decoders
            raise ImageFormatError(
                f"image: {self.path.name!r} is damaged: the tile at x={column * plane.width}, y={row * plane.height} of "
                f"level {self.level} cannot be decoded ({error}); copy or download the file again"
            ) from error

    def _open(self) -> _OpenLevel:
        if self._file is None:
            try:
                stat = self.path.stat()
                self._file = _open_level(self.path, stat.st_size, stat.st_mtime_ns, self.series, self.level)
            except (ValueError, IndexError, OSError) as error:
                raise ImageFormatError(f"image: {self.path.name!r} cannot be read any more ({error})") from error
        return self._file


class _OpenLevel:
    """An open file and the planes of one of its levels; closed when nobody holds it."""

    def __init__(self, path: Path, series: int, level: int) -> None:
        import tifffile

        tiff = tifffile.TiffFile(path)
        weakref.finalize(self, tiff.close)
        self.planes = _planes(tiff.series[series].levels[level])
        self._handle = tiff.filehandle
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file.

        Raises
        ------
        ValueError
            If it ends before.
        """
        if hasattr(os, "pread"):  # forked processes share the place in the file, threads would have to take turns
            data = os.pread(self._handle.fileno(), length, offset)
        else:
            with self._lock:
                self._handle.seek(offset)
                data = self._handle.read(length)
        if len(data) < length:
            raise ValueError(f"the file ends {length - len(data)} bytes before its pixels do")
        return data


@lru_cache(maxsize=32)
def _open_level(path: Path, size: int, mtime_ns: int, series: int, level: int) -> _OpenLevel:
    """As long as a file is the same, its levels are opened once, however often a lazy image is unpickled."""
    return _OpenLevel(path, series, level)


def _check_jpeg(data: bytes, pixels: int) -> None:
    """Refuse a tile of JPEG that was cut off or zeroed: the decoder says nothing and makes up the rest.

    Zeros that are meant belong to glass of one colour, at no less than two bits for each 8 x 8 block of three channels.
    """
    end = data.rfind(_END)
    if end < 0:
        raise ValueError("its JPEG stream has no end")
    if data.find(bytes(max(_FEWEST_ZEROS, 3 * pixels // 256 + 1)), data.find(_SCAN), end) >= 0:
        raise ValueError("its JPEG stream was overwritten with zeros")


@dataclass(frozen=True, eq=False)
class _Plane:
    """Channels that lie together in the tiles of a page, and the tiles; a strip is a tile as wide as the image."""

    page: Any
    channels: slice
    first: int
    height: int
    width: int
    across: int
    down: int

    def ends(self) -> np.ndarray:
        """Where in the file each tile ends."""
        return np.asarray(self.page.dataoffsets, np.int64) + np.asarray(self.page.databytecounts, np.int64)

    def empty(self) -> np.ndarray:
        """Which tiles were left out, (down, across) bool."""
        counts = np.asarray(self.page.databytecounts)[self.first : self.first + self.down * self.across]
        return counts.reshape(self.down, self.across) == 0


def _planes(series: TiffPageSeries) -> list[_Plane]:
    planes = []
    pages: list[Any] = list(series.pages)
    for number, page in enumerate(pages):
        key = page.keyframe  # what pages of one kind share is kept by the first
        height, width = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        height = height if key.is_tiled else min(height, key.imagelength)
        across, down = -(-key.imagewidth // width), -(-key.imagelength // height)
        separate = key.samplesperpixel if key.planarconfig == 2 else 1  # planes one after another
        if min(len(page.dataoffsets), len(page.databytecounts)) < separate * across * down:
            raise ValueError(f"it lists {len(page.dataoffsets)} of {separate * across * down} tiles")
        for plane in range(separate):
            channel = number if len(pages) > 1 else plane
            channels = slice(0, 3) if len(pages) * separate == 1 else slice(channel, channel + 1)
            planes.append(_Plane(page, channels, plane * across * down, height, width, across, down))
    return planes


def foreign(tiff: TiffFile, name: str) -> str | None:
    """Maker of a slide that is not the plain TIFF it seems to be, if this is one.

    Raises
    ------
    ImageFormatError
        If the TIFF holds no image.
    """
    if len(tiff.pages) == 0:
        raise ImageFormatError(f"image: {name!r} is a TIFF without an image: truncated, or damaged; copy it again")
    for flag, maker in _FOREIGN.items():
        if getattr(tiff, flag, False):
            return maker
    page = tiff.pages.first
    if str(page.tags.valueof("Software", "")).startswith("MedScan"):
        return "Trestle"
    in_ycbcr = page.compression == _APERIO_YCBCR or (page.compression == _APERIO_RGB and page.photometric == YCBCR)
    return "Aperio (JPEG 2000 in YCbCr)" if in_ycbcr else None


def tiff_levels(path: Path, tiff: TiffFile) -> tuple[list[da.Array], tuple[float, float] | None, float | None]:
    """Lazy levels of an open TIFF, µm per pixel in x and y, and magnification of the objective, as far as stated.

    Raises
    ------
    ImageFormatError
        If it is not 8-bit RGB, or truncated.
    """
    try:
        number = slide_series(tiff, path.name)
        series = tiff.series[number]
        axes = rgb_axes(series, path.name)
        stated, objective = sane_mpp(stated_mpp(tiff, number)), objective_of(tiff, number)
        planes = [plane for level in series.levels for plane in _planes(level)]
        # a truncated file still opens; the missing tiles would be met much later
        ends = max(int(plane.ends().max(initial=0)) for plane in planes)
        if any(plane.page.parent is not tiff for plane in planes):
            raise ImageFormatError(
                f"image: {path.name!r} is spread over several files; join them, e.g. with bioformats2raw and raw2ometiff"
            )
    except ImageFormatError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ImageFormatError(f"image: {path.name!r} is a damaged TIFF ({error})") from error
    if ends > path.stat().st_size:
        raise ImageFormatError(f"image: {path.name!r} is truncated; copy or download it again")
    page = series.keyframe
    samples = series.shape[series.axes.index(axes.strip("YX"))]
    if page.is_tiled and max(page.tilelength, page.tilewidth) <= LARGEST_TILE and samples == 3:
        return _lazy_levels(path, number, series, axes), stated, objective
    return cached_pyramid(path, lambda scratch: decode_tiff(series, axes, path.name, scratch)), stated, objective


def _lazy_levels(path: Path, number: int, series: TiffPageSeries, axes: str) -> list[da.Array]:
    """The levels of the file that lie on the finest and show what it shows; others in their place if there are none."""
    lazy: list[da.Array] = []
    finest = series.levels[0]
    for step, level in enumerate(series.levels):
        if level.axes != axes or level.dtype != np.uint8 or level.shape[axes.index(axes.strip("YX"))] != 3:
            continue
        if not delivers_rgb(level):
            continue
        planes, size = _planes(level), _size(level, axes)
        if max(planes[0].height, planes[0].width) > LARGEST_TILE:
            continue
        if step and not (level_factor(_size(finest, axes), size) and _as_full(_planes(finest), planes, finest, axes)):
            continue
        chunks = chunk_side(planes[0].height), chunk_side(planes[0].width)
        lazy.append(lazy_array(TiffLevel(path, number, step, axes, size), chunks))
    if len(lazy) == 1 and max(lazy[0].shape[-2:]) > SINGLE_LEVEL_UP_TO:
        lazy += cached_reductions(path, TiffLevel(path, number, 0, axes, _size(finest, axes)))
    return lazy


def _size(level: TiffPageSeries, axes: str) -> tuple[int, int]:
    return int(level.shape[axes.index("Y")]), int(level.shape[axes.index("X")])


def _as_full(fine: list[_Plane], coarse: list[_Plane], finest: TiffPageSeries, axes: str) -> bool:
    """Whether what a coarse level leaves out is left out in the finest, too: some writers break off between levels."""
    empty = coarse[0].empty()
    if not empty.any():
        return True
    there = ~fine[0].empty()
    height, width = _size(finest, axes)
    factor = height / coarse[0].page.keyframe.imagelength
    for row, column in np.argwhere(empty):
        top, bottom = (row + np.array([0, 1])) * coarse[0].height * factor
        left, right = (column + np.array([0, 1])) * coarse[0].width * factor
        rows = slice(int(top // fine[0].height), int(-(-min(bottom, height) // fine[0].height)))
        columns = slice(int(left // fine[0].width), int(-(-min(right, width) // fine[0].width)))
        if there[rows, columns].any():
            return False
    return True


def lazy_array(level: Any, chunks: tuple[int, int]) -> da.Array:
    """A level as a dask array, all channels in a chunk; nothing is opened before the first read."""
    import dask.array as da

    meta = np.empty((0, 0, 0), np.uint8)
    return da.from_array(level, chunks=(3, *chunks), asarray=True, fancy=False, meta=meta)


def chunk_side(tile: int) -> int:
    """The multiple of the tile side next to our chunk side: chunks end where tiles do, so none is decoded twice."""
    return tile * max(1, CHUNK // tile)
