"""Slides as streams: tiles around given places, or the whole slide in blocks, each source chunk decoded once.

A pixel *i* covers [i, i + 1): a tile centred on x reaches from x - side / 2 to x + side / 2, whether or not that
falls between two pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._settings import settings
from ..errors import DataValueError
from ._chunks import ChunkReader
from ._prefetch import prefetch
from ._resample import AreaAxis, reduce_area

if TYPE_CHECKING:
    import dask.array as da

    from ..data.geometry import Slide
    from ..data.pyramid import Level

__all__ = [
    "Block",
    "TileBatch",
    "WorkingGrid",
    "block_corners",
    "iter_blocks",
    "iter_tiles",
    "storage_order",
    "working_grid",
]

SNAP = 0.01  # a working mpp this close to a whole multiple of a level's is that multiple


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Some tiles of a slide.

    Attributes
    ----------
    rows
        Which of the centres these are, (b,).
    pixels
        RGB, (b, tile_px, tile_px, 3) uint8.
    padded
        Whether a tile reaches beyond the image, (b,) bool.
    """

    rows: np.ndarray
    pixels: np.ndarray
    padded: np.ndarray


@dataclass(frozen=True, eq=False)
class WorkingGrid:
    """A slide at a working resolution: pixel (i, j) is the mean over a rectangle of the slide.

    Attributes
    ----------
    mpp
        Its true µm per pixel: that asked for, or the whole multiple of a level's within 1 % of it.
    shape
        Height and width; the last row and column may reach beyond the image.
    factor
        Level-0 pixels per working pixel along x and y: working pixel j covers [j·factor, (j + 1)·factor).
    level
        Level of the pyramid that is read.
    step
        Pixels of that level per working pixel along x and y.
    """

    mpp: float
    shape: tuple[int, int]
    factor: tuple[float, float]
    level: Level
    step: tuple[float, float]

    def from_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Positions on the grid of level-0 pixel positions (…, 2)."""
        return np.asarray(pixels, dtype=np.float64) / self.factor

    def to_pixels(self, positions: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`from_pixels`."""
        return np.asarray(positions, dtype=np.float64) * self.factor


@dataclass(frozen=True, eq=False)
class Block:
    """A rectangle of the working grid and its surroundings.

    Attributes
    ----------
    y, x
        Position of the core's first pixel on the grid.
    pixels
        RGB of the core and a halo around it, (h + 2·halo, w + 2·halo, 3) uint8.
    halo_px
        Width of the halo on each side.
    grid
        The grid, for all blocks the same.
    """

    y: int
    x: int
    pixels: np.ndarray
    halo_px: int
    grid: WorkingGrid

    @property
    def core(self) -> tuple[slice, slice]:
        """Where the core lies in :attr:`pixels`."""
        height, width = self.pixels.shape[:2]
        return slice(self.halo_px, height - self.halo_px), slice(self.halo_px, width - self.halo_px)

    @property
    def place(self) -> tuple[slice, slice]:
        """Where the core lies on the grid."""
        rows, columns = self.core
        return slice(self.y, self.y + rows.stop - rows.start), slice(self.x, self.x + columns.stop - columns.start)


def iter_tiles(
    slide: Slide,
    centres: np.ndarray,
    *,
    tile_um: float,
    tile_px: int,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    fill: int = 255,
) -> Iterator[TileBatch]:
    """Yield square tiles around `centres` until each is covered once, in storage order.

    Tiles are resized by Pillow's bicubic filter, which widens with the reduction and so does not alias; it is what
    torchvision, timm and open_clip prepare their training images with.

    Parameters
    ----------
    slide
        As :func:`hespotex.data.geometry.resolve_slide` gives it.
    centres
        Centres (x, y) in level-0 pixels, (n, 2); fractions count.
    tile_um
        Side of a tile in µm.
    tile_px
        Side of the returned tiles in pixels.
    batch_size
        Tiles per batch; the setting by default.
    progress_bar
        Whether to show progress; the setting by default.
    fill
        Grey value of what lies beyond the image. A tile is never shifted to avoid it, but flagged.

    Raises
    ------
    ScaleError
        If tiles would have to be enlarged more than twofold.
    """
    from tqdm.auto import tqdm

    centres = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(centres).all():
        raise DataValueError("centres must be finite")
    if tile_um <= 0 or tile_px < 1:
        raise DataValueError(f"tile_um={tile_um!r} and tile_px={tile_px!r} must be positive")
    level = slide.level_for(tile_um / tile_px)
    batches = _tile_batches(slide, level, centres, tile_um, tile_px, batch_size or settings.batch_size, fill)
    show = settings.progress_bar if progress_bar is None else progress_bar
    with tqdm(total=len(centres), unit="tile", desc="tiles", disable=not show or len(centres) < 2) as bar:
        for batch in prefetch(batches):
            yield batch
            bar.update(len(batch.rows))


def working_grid(slide: Slide, mpp: float) -> WorkingGrid:
    """The grid on which :func:`iter_blocks` reads `slide` at about `mpp`.

    Where `mpp` is within 1 % of a whole multiple of a level's own, whole pixels are taken: fractions would blur
    a slow beat into the texture for a difference that pixel sizes are not known to.

    The grid begins at the image's first pixel, so that of a crop may lie a fraction of a working pixel from that of
    the whole. Places stay exact, but textures are sampled anew: features of the encoder ``morphology`` then differ by
    0.04 of a standard deviation in the median, and by up to 1 where a feature rests on few pixels.

    Raises
    ------
    ScaleError
        If `mpp` is finer than half the slide's.
    """
    level = slide.level_for(mpp)
    step = mpp / (slide.mpp * level.downsample)
    whole = round(step)
    if whole >= 1 and abs(step / whole - 1) <= SNAP:
        step = float(whole)
        mpp = slide.mpp * level.downsample * whole
    factor = step * level.downsample
    height, width = (int(np.ceil(size / factor - 1e-6)) for size in slide.shape)
    return WorkingGrid(mpp=float(mpp), shape=(height, width), factor=(factor, factor), level=level, step=(step, step))


def iter_blocks(
    slide: Slide,
    *,
    mpp: float,
    block_px: int = 1024,
    halo_px: int = 0,
    boxes: np.ndarray | None = None,
    corners: np.ndarray | Sequence[np.ndarray] | None = None,
    fill: int = 255,
    progress_bar: bool | None = None,
) -> Iterator[Block]:
    """Yield the slide at a working resolution, block by block, row by row.

    A working pixel is the area-weighted mean of what it covers, and depends on its place on the grid alone: not on
    the size of blocks, nor on how the image is chunked.

    Parameters
    ----------
    slide
        As :func:`hespotex.data.geometry.resolve_slide` gives it.
    mpp
        µm per pixel to work at; see :func:`working_grid`.
    block_px
        Side of a block's core in working pixels.
    halo_px
        Working pixels around the core that are read, too.
    boxes
        Rectangles (x0, y0, x1, y1) in level-0 pixels, (n, 4): only blocks whose core meets one are read. ``None``:
        all blocks.
    corners
        In place of `boxes`, the blocks themselves: some rows of :func:`block_corners`, in its order. Of several such
        groups each is read for itself: a chunk of the image that two of them share is not held in between.
    fill
        Grey value of what lies beyond the image.
    progress_bar
        Whether to show progress; the setting by default.

    Raises
    ------
    ScaleError
        If `mpp` is finer than half the slide's.
    """
    from tqdm.auto import tqdm

    if block_px < 1 or halo_px < 0:
        raise DataValueError(f"block_px={block_px!r} must be positive and halo_px={halo_px!r} not negative")
    grid = working_grid(slide, mpp)
    if corners is None:
        corners = block_corners(grid, block_px, boxes)
    groups = [corners] if isinstance(corners, np.ndarray) else corners
    total = sum(map(len, groups))
    show = settings.progress_bar if progress_bar is None else progress_bar
    with tqdm(total=total, unit="block", desc="slide", disable=not show or total < 2) as bar:
        # One thread for all: the C library would give each of many another of its heaps, which stay with the process.
        for block in prefetch(b for group in groups for b in _blocks(slide, grid, group, block_px, halo_px, fill)):
            yield block
            bar.update()


def _tile_batches(
    slide: Slide, level: Level, centres: np.ndarray, tile_um: float, tile_px: int, batch_size: int, fill: int
) -> Iterator[TileBatch]:
    side = np.full(2, tile_um / (slide.mpp * level.downsample))
    low = centres / level.downsample - side / 2
    # Bicubic looks two (enlarged) pixels beyond the box: they must be there, or tiles depend on how they are read.
    reach = np.ceil(2 * np.maximum(side / tile_px, 1)).astype(np.int64) + 1
    first = np.floor(low).astype(np.int64) - reach
    last = np.ceil(low + side).astype(np.int64) + reach
    border = np.array(slide.shape[::-1]) / level.downsample
    padded = ((low < -1e-6) | (low + side > border + 1e-6)).any(axis=1)

    order = storage_order(level, centres)
    reader = ChunkReader(_made_up(level, slide), np.column_stack([first[:, ::-1], last[:, ::-1]])[order], fill)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pixels = np.empty((len(rows), tile_px, tile_px, 3), dtype=np.uint8)
        for position, row in enumerate(rows):
            pixels[position] = _resize(reader.read(start + position), low[row] - first[row], side, tile_px)
        yield TileBatch(rows=rows, pixels=pixels, padded=padded[rows])


def _made_up(level: Level, slide: Slide) -> da.Array:
    """A level that covers the whole image: where it drops an odd last row or column, the one before is repeated.

    It would be read as white, and make an edge in tiles and blocks at the border.
    """
    import dask.array as da

    array = level.array
    missing = [
        max(int(np.ceil(full / level.downsample)) - size, 0)
        for full, size in zip(slide.shape, array.shape[1:], strict=True)
    ]
    if not any(missing):
        return array
    chunks = [
        (*sizes[:-1], sizes[-1] + more) for sizes, more in zip(array.chunks, [0, *missing], strict=True)
    ]  # as before, so that each is read once
    return da.pad(array, [(0, more) for more in [0, *missing]], mode="edge").rechunk(tuple(chunks))


def storage_order(level: Level, centres: np.ndarray) -> np.ndarray:
    """Order of centres (x, y) in level-0 pixels, (n, 2), by row of a level's chunks, then by column of chunks."""
    xy = centres / level.downsample
    rows, columns = (
        np.searchsorted(np.cumsum(sizes), values, side="right")
        for sizes, values in zip(level.array.chunks[1:], (xy[:, 1], xy[:, 0]), strict=True)
    )
    return np.lexsort((xy[:, 1], columns, rows))


def _resize(window: np.ndarray, low: np.ndarray, side: np.ndarray, tile_px: int) -> np.ndarray:
    from PIL import Image

    near = np.rint(low)
    if np.abs(low - near).max() < 1e-6 and np.abs(side - tile_px).max() < 1e-6:
        x, y = near.astype(int)
        return window[y : y + tile_px, x : x + tile_px]
    box = (low[0], low[1], low[0] + side[0], low[1] + side[1])
    return np.asarray(Image.fromarray(window).resize((tile_px, tile_px), Image.Resampling.BICUBIC, box=box))


def block_corners(
    grid: WorkingGrid, block_px: int, boxes: np.ndarray | None = None, *, origin: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """First core pixel (y, x) of each block of a grid, or of those that `boxes` meet, (n, 2), along rows.

    Blocks begin at `origin` (y, x); other parameters are those of :func:`iter_blocks`.
    """
    rows, columns = (-(-(size - start) // block_px) for size, start in zip(grid.shape, origin, strict=True))
    wanted = np.ones((rows, columns), dtype=bool)
    if boxes is not None:
        wanted[:] = False
        places = grid.from_pixels(np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2)) - origin[::-1]
        low = np.floor(places[:, 0] / block_px).astype(int).clip(0)
        high = np.ceil(places[:, 1] / block_px).astype(int).clip(0)
        for (x0, y0), (x1, y1) in np.unique(np.stack([low, high], axis=1), axis=0):
            wanted[y0:y1, x0:x1] = True
    return np.argwhere(wanted) * block_px + origin


def _blocks(
    slide: Slide, grid: WorkingGrid, corners: np.ndarray, block_px: int, halo_px: int, fill: int
) -> Iterator[Block]:
    columns, rows = (AreaAxis(step) for step in grid.step)
    places = [
        [
            slice(start - halo_px, min(start + block_px, size) + halo_px)
            for start, size in zip(corner, grid.shape, strict=True)
        ]
        for corner in corners.tolist()
    ]
    windows = []
    for y, x in places:
        (top, bottom), (left, right) = rows.span(y.start, y.stop), columns.span(x.start, x.stop)
        windows.append((top, left, bottom, right))
    reader = ChunkReader(_made_up(grid.level, slide), np.array(windows, dtype=np.int64).reshape(-1, 4), fill)
    for index, ((y, x), corner) in enumerate(zip(places, corners.tolist(), strict=True)):
        pixels = reduce_area(reader.read(index), rows, columns, y, x)
        yield Block(y=corner[0], x=corner[1], pixels=pixels, halo_px=halo_px, grid=grid)
