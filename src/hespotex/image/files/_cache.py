"""Pyramids by exact 2x2 box means, and their content-addressed cache on disk.

JPEG, PNG and stripped TIFF have no random access, so they are decoded once; everything after reads
chunks of a zarr array. The cache is written under a temporary name and renamed when complete, so a
killed process leaves nothing that a later one would take for a whole pyramid.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..._logging import logger
from ..._settings import settings
from ...errors import DataValueError

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["CHUNK", "cached_pyramid", "cached_reductions", "halve", "memory_pyramid", "sha256"]

CHUNK = 1024
_SMALLEST = 1024  # a level that fits into one chunk ends the pyramid
_STALE_SECONDS = 86_400
_LAYOUT = 3  # raised when the cached levels, or what is read of a file, change: older ones are not taken for them


class Source(Protocol):
    """Anything (3, h, w) uint8 that is read by slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, key: Any) -> Any: ...


class CachedLevel:
    """One level in the cache as (3, h, w) uint8, read by slices; opened at the first read and after unpickling.

    zarr reads a chunk that is not there as black. Here all chunks are written, so one that is missing was deleted.
    """

    ndim = 3
    dtype = np.dtype("uint8")

    def __init__(self, store: Path, shape: tuple[int, ...]) -> None:
        self.store = store
        self.shape = shape
        self._array: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _array=None, _lock=threading.Lock())

    def __dask_tokenize__(self) -> Any:
        return "hespotex-cache", str(self.store)

    def __getitem__(self, key: tuple[Any, Any, Any]) -> np.ndarray:
        pixels = self._open()[key]
        rows, columns = (
            np.unique(np.arange(size)[part] // CHUNK) for size, part in zip(self.shape[1:], key[1:], strict=True)
        )
        if not all((self.store / "c" / "0" / str(row) / str(column)).is_file() for row in rows for column in columns):
            raise self._gone()
        return np.asarray(pixels)

    def _open(self) -> Any:
        import zarr

        with self._lock:
            if self._array is None:
                try:
                    self._array = zarr.open_array(self.store, mode="r")
                except (OSError, ValueError, KeyError) as error:
                    raise self._gone() from error
        return self._array

    def _gone(self) -> DataValueError:
        return DataValueError(
            f"the cached pixels of an image are gone from {str(self.store.parent)!r}: settings.cache_dir was cleared "
            "while the image was in use. Read the image again (after deleting this folder, if something is left of "
            "it); images written to disk with sdata.write() do not need the cache"
        )


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def halve(pixels: np.ndarray) -> np.ndarray:
    """Exact mean of each 2x2 box, rounded half up; an odd last row or column counts twice.

    Parameters
    ----------
    pixels
        (c, h, w) uint8.
    """
    channels, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, [(0, 0), (0, height % 2), (0, width % 2)], mode="edge")
    boxes = pixels.reshape(channels, -(-height // 2), 2, -(-width // 2), 2)
    total = boxes[:, :, 0, :, 0].astype(np.uint16)
    total += boxes[:, :, 1, :, 0]
    total += boxes[:, :, 0, :, 1]
    total += boxes[:, :, 1, :, 1]
    return ((total + 2) >> 2).astype(np.uint8)


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    while max(sizes[-1]) > _SMALLEST and min(sizes[-1]) >= 2:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def memory_pyramid(pixels: np.ndarray) -> list[da.Array]:
    """Pyramid of an array (3, h, w) held in memory."""
    import dask.array as da

    levels = [pixels]
    for _ in _sizes(*pixels.shape[-2:])[1:]:
        levels.append(halve(levels[-1]))
    return [da.from_array(level, chunks=(3, CHUNK, CHUNK)) for level in levels]


def cached_pyramid(path: Path, decode: Callable[[Path], np.ndarray]) -> list[da.Array]:
    """All levels of a file that must be decoded whole.

    Parameters
    ----------
    path
        The image file; its content's hash names the cache.
    decode
        Called only where the cache is empty, with a scratch folder for what does not fit in memory;
        returns (h, w, 3) uint8.
    """

    def write(folder: Path) -> None:
        logger.info("decoding %s into the image cache", path.name)
        pixels = decode(folder)
        height, width = pixels.shape[:2]
        target = _create(folder / "level0", height, width)
        for rows in _blocks(height, CHUNK):
            target[:, rows, :] = np.moveaxis(pixels[rows], -1, 0)
        del pixels
        for scratch in folder.glob("*.raw"):
            scratch.unlink()
        _reduce(target, folder)

    return _levels(_cached(sha256(path), write))


def cached_reductions(path: Path, source: Source) -> list[da.Array]:
    """The coarser levels of a file that has random access but no pyramid of its own."""
    return _levels(_cached(f"{sha256(path)}-reductions", lambda folder: _reduce(source, folder)))


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    """Folder of that name in the cache, made by `write` if it is not there."""
    root = settings.cache_dir / "images"
    name = f"{name}-{_LAYOUT}"
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(root, name)
    scratch = root / f"{name}.{uuid.uuid4().hex}.tmp"
    scratch.mkdir()
    try:
        write(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _remove_stale(root: Path, name: str) -> None:
    """Delete what killed processes left behind."""
    for leftover in root.glob(f"{name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _create(store: Path, height: int, width: int) -> Any:
    import zarr

    return zarr.create_array(
        store=store,
        shape=(3, height, width),
        chunks=(3, CHUNK, CHUNK),
        dtype="uint8",
        config={"write_empty_chunks": True},  # a chunk that is not there is then a deleted one
    )


def _blocks(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _reduce(source: Source, folder: Path) -> None:
    """Write levels 1, 2, … of `source`, block by block: memory does not grow with the image."""
    for number, (height, width) in enumerate(_sizes(*source.shape[-2:])[1:], start=1):
        target = _create(folder / f"level{number}", height, width)
        for rows in _blocks(height, CHUNK):
            for columns in _blocks(width, CHUNK):
                fine = source[:, slice(2 * rows.start, 2 * rows.stop), slice(2 * columns.start, 2 * columns.stop)]
                target[:, rows, columns] = halve(np.asarray(fine))
        source = target


def _levels(folder: Path) -> list[da.Array]:
    import dask.array as da
    import zarr

    paths = sorted(folder.glob("level*"), key=lambda path: int(path.name.removeprefix("level")))
    levels = [CachedLevel(path, zarr.open_array(path, mode="r").shape) for path in paths]
    return [da.from_array(level, chunks=(3, CHUNK, CHUNK)) for level in levels]
