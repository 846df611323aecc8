"""The encoder that needs no weights: stain, texture and nuclei, described by formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._settings import settings
from .._tasks import iter_tasks
from ..errors import DataValueError, ModelMismatchError
from ..image.color import is_void, stain_tables
from ..image.features import Octaves, block_mean, level_names, window_means
from ._base import Encoder, EncoderInfo

if TYPE_CHECKING:
    from ..data.geometry import Slide
    from ..image.stream import Block, WorkingGrid

__all__ = ["Morphology"]

VERSION = 1  # to be raised with every change of a formula: features of two versions must not be mixed
CELL_UM = 11.0  # maps finer than this are averaged to cells of about this size before windows are laid over them
COARSEST_UM = 44.0  # pixel of the coarsest octave: glands, vessels, nests
CONTEXT_TILES = 3.0
HALO_CELLS = 4  # a map at the border of a block depends on less than three cells beyond it
COLOUR_NAMES = ("h_mean", "e_mean", "residual_mean", "h_square", "e_square", "residual_square", "he_product")
_BLOCK_PX = 512  # larger ones take more memory and no less time
_PART_PX = 8192  # width of a part of a slide, twice as high, that is swept at once: what is in memory grows with it
_PIECE_PX = 4096  # width of a piece of a band, for what takes several times the maps' own memory
_CENTRES_AT_ONCE = 65_536
_SPARE_PX = 0.01  # working pixels that rounding may take away
_THREADS = 3  # as many keep up with the one that decodes


@dataclass(frozen=True)
class _Maps:
    """Maps of a part of a slide that share a cell size.

    `values` (m, h, w) start at pixel `corner` (x, y) of the working grid; a cell is `side` working pixels wide.
    """

    values: np.ndarray
    side: int
    corner: tuple[int, int]


class _Band:
    """Maps of the rows of cells that a sweep down the slide has passed last.

    Parameters
    ----------
    count
        Number of maps.
    corner
        Where the sweep begins, (x, y) on the working grid.
    shape
        Height of the band and width of the sweep in working pixels.
    cell
        Side of a cell in working pixels.
    """

    def __init__(self, count: int, corner: tuple[int, int], shape: tuple[int, int], cell: int) -> None:
        self.left, self.bottom = corner  # `bottom` is the first row that was not passed yet
        self._first, self._height, self._cell = corner[1], shape[0], cell
        self._values = np.zeros((count, shape[0] // cell, -(-shape[1] // cell)), np.float32)

    def scroll(self, bottom: int) -> None:
        """Move down to where the last row ends at `bottom`."""
        cells = min((bottom - self.bottom) // self._cell, self._values.shape[1])
        kept = self._values.shape[1] - cells
        for values in self._values:  # one by one, as numpy copies what overlaps
            values[:kept] = values[cells:]
            values[kept:] = 0
        self.bottom = bottom

    def fill(self, x: int, values: np.ndarray, height: int) -> None:
        """Set the maps of a block (m, h, w) that begins at `x` and `height` working pixels above the bottom."""
        row, column = self._values.shape[1] - height // self._cell, (x - self.left) // self._cell
        target = self._values[:, row : row + values.shape[1], column : column + values.shape[2]]
        target[:] = values[:, :, : target.shape[2]]

    def window(self, left: float, right: float, grid: WorkingGrid, unit: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Maps between two positions along x, widened to whole `unit` pixels, and where they begin (x, y)."""
        top = max(self.bottom - self._height, self._first)
        begin = max(int(left // unit * unit), self.left)
        end, bottom = min(int(-(-right // unit) * unit), grid.shape[1]), min(self.bottom, grid.shape[0])
        row, column = (top - self.bottom + self._height) // self._cell, (begin - self.left) // self._cell
        rows, columns = -(-(bottom - top) // self._cell), -(-(end - begin) // self._cell)
        return self._values[:, row : row + rows, column : column + columns], (begin, top)


class Morphology(Encoder):
    """Stain, texture and nuclear statistics of a tile and of its surroundings.

    No weights, no randomness, no training. All maps are computed once per pixel, so that overlapping tiles and fine
    grids cost next to nothing. Turning the image by a right angle changes no feature, nor does what lies farther away
    than the context and a few coarse pixels: stains are separated by fixed vectors, not by those of the slide, and
    shifts between slides are left to the models, which see all features of a slide. Black pixels (masked, or never
    scanned) count as glass.

    The features are, each as a mean over the tile and over the context (prefix ``tile_`` and ``context_``; level *j*
    has pixels of ``mpp * 2**j`` µm):

    ``h_mean``, ``e_mean``, ``residual_mean``, ``h_sd``, …, ``he_product``
        Amounts of haematoxylin, eosin and what is neither; their spread; their product.
    ``h_band<j>``, ``h_power<j>``, ``h_skew<j>``, ``he_band<j>``
        Strength of detail of that size: mean, root mean square, excess of dark over light; the same in eosin (``e_``);
        whether both dyes share it.
    ``h_pattern<i>_<j>``
        How unevenly, at size *j*, the finer detail of size *i* is spread: crowds and gaps of nuclei, bundles of fibres.
    ``h_direction<i>_<j>``, ``h_coherence<i>_<j>``
        How strongly, and how strictly, edges of size *i* run in one direction within an area of size *j*: fibres, rims.
    ``blobs<j>_<k>``, ``blob<j>_contrast``, ``blob<j>_density``, ``blob<j>_eosin``
        Nuclei of that size: their density at three least contrasts, and the sum of their contrast, haematoxylin and
        eosin.
    ``gaps<j>``, ``gap<j>_contrast``
        Light spots of that size: vacuoles, lumina, clefts.

    Parameters
    ----------
    tile_um
        Side of the tile in µm. The default suits spots 200 µm apart; about 100 µm suits those of Visium.
    context_um
        Side of the surroundings in µm, the tile included; three tiles by default, 0 for the tile alone.
    mpp
        Working resolution in µm per pixel. At the default a nucleus is 4 to 8 pixels wide; 1 µm/px raised the mean
        correlation of a ridge on her2st by 0.003, at twice the pixels.
    version
        Version of the formulas, as :meth:`params` gives it; there is one.

    Raises
    ------
    DataValueError
        If a size is not positive, or the context smaller than the tile.
    ModelMismatchError
        If this version of hespotex has other formulas than those of `version`.

    Examples
    --------
    >>> from hespotex.encoders.morphology import Morphology
    >>> Morphology(context_um=0).feature_names[:2]
    ('tile_h_mean', 'tile_e_mean')
    """

    info = EncoderInfo(
        name="morphology",
        summary="stain, texture and nuclei by formulas; no weights",
        mpp=1.375,
        tile_um=160.0,
        licence="BSD-3-Clause",
    )
    name = "morphology"

    def __init__(
        self, *, tile_um: float = 160.0, context_um: float | None = None, mpp: float = 1.375, version: int = VERSION
    ) -> None:
        if version != VERSION:
            raise ModelMismatchError(
                f"version={version!r}: features of other formulas were asked for than this hespotex has (version "
                f"{VERSION}); embed and train again, or install the hespotex they were made with"
            )
        for label, value in (("tile_um", tile_um), ("mpp", mpp)):
            if not (np.isfinite(value) and value > 0):
                raise DataValueError(f"{label}={value!r} must be a positive number")
        context_um = CONTEXT_TILES * tile_um if context_um is None else context_um
        if context_um != 0 and not tile_um <= context_um < np.inf:
            raise DataValueError(
                f"context_um={context_um!r} must be at least tile_um={tile_um!r}, or 0 to leave it out"
            )
        self.tile_um, self.context_um, self.mpp = float(tile_um), float(context_um), float(mpp)
        self._fine = max(int(np.rint(np.log2(CELL_UM / self.mpp))), 0)
        self._levels = max(int(np.rint(np.log2(COARSEST_UM / self.mpp))), self._fine) + 1
        if self._fine < 1:
            raise DataValueError(f"mpp={mpp!r} is too coarse for texture; use {CELL_UM / 2:g} µm/px or finer")
        self._windows = {"tile": self.tile_um}
        if self.context_um:
            self._windows["context"] = self.context_um
        self._map_names = [*COLOUR_NAMES, *(name for level in range(self._levels) for name in level_names(level))]
        self._n_fine = len(COLOUR_NAMES) + sum(len(level_names(level)) for level in range(self._fine))
        self.n_features = len(self._map_names) * len(self._windows)
        self._tables = stain_tables()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Name of each feature, in order."""
        names = [name.replace("_square", "_sd") for name in self._map_names]
        return tuple(f"{window}_{name}" for window in self._windows for name in names)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "context_um": self.context_um,
            "mpp": self.mpp,
            "version": VERSION,
        }

    def resized(self, factor: float) -> Morphology:
        """The same encoder for tiles `factor` times as wide, with as much more context."""
        return Morphology(tile_um=factor * self.tile_um, context_um=factor * self.context_um, mpp=self.mpp)

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, n_features) float32), part by part of the slide and down each part.

        `device` and `batch_size` are ignored: the maps are computed once for all tiles around, in
        ``settings.n_jobs`` threads, three at most.
        """
        from ..image.stream import working_grid

        grid = working_grid(slide, self.mpp)
        xy = grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2))
        for part in self._parts(xy, grid):
            for rows, features in self._embed_part(slide, grid, xy[part], progress_bar=progress_bar):
                yield part[rows], features

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Parts of the slide that are swept one after another in any case."""
        from ..image.stream import working_grid

        grid = working_grid(slide, self.mpp)
        return self._parts(grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2)), grid)

    def _reach(self, grid: WorkingGrid) -> float:
        """Working pixels around a centre that its features depend on."""
        # Above the cells each octave is smoothed by two of its pixels, and the coarsest grid is aligned to its own.
        return max(self._windows.values()) / grid.mpp / 2 + 3.0 * 2**self._levels

    def _parts(self, xy: np.ndarray, grid: WorkingGrid) -> list[np.ndarray]:
        """Row indices of the centres in equal rectangles of the slide, column by column of them."""
        xy = xy.clip(0, grid.shape[::-1])
        limits = np.array([_PART_PX, 2 * _PART_PX])
        sides = np.array(grid.shape[::-1]) / np.ceil(np.array(grid.shape[::-1]) / limits)
        column, row = np.floor(xy / sides).T
        order = np.lexsort((row, column))
        changes = (np.diff(column[order]) != 0) | (np.diff(row[order]) != 0)
        return np.split(order, np.flatnonzero(changes) + 1) if len(order) else []

    def _pieces(self, xy: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        """`rows` in groups that lie near each other along x."""
        rows = rows[np.argsort(xy[rows, 0], kind="stable")]
        for piece in np.split(rows, np.flatnonzero(np.diff(xy[rows, 0] // _PIECE_PX)) + 1):
            yield from np.split(piece, range(_CENTRES_AT_ONCE, len(piece), _CENTRES_AT_ONCE))

    def _embed_part(
        self, slide: Slide, grid: WorkingGrid, xy: np.ndarray, *, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row indices of `xy` and their features."""
        near = xy.clip(0, grid.shape[::-1])  # windows beyond the image take what is at its border
        for ready, band in self._sweep(slide, grid, near, progress_bar=progress_bar):
            for rows in self._pieces(near, ready):
                yield rows, self._features(self._maps(band, near[rows], grid), xy[rows], grid)

    def _sweep(
        self, slide: Slide, grid: WorkingGrid, xy: np.ndarray, *, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, _Band]]:
        """Yield row indices of `xy` and, while it is in memory, the band of maps that their features depend on."""
        from ..image.stream import block_corners, iter_blocks

        cell, unit = 2**self._fine, 2**self._levels
        reach = self._reach(grid)
        left, top = (int(max(start - reach, 0) // unit * unit) for start in xy.min(axis=0))
        width = min(int(-(-(xy[:, 0].max() + reach) // unit) * unit), grid.shape[1]) - left
        block_px = unit * -(-width // (unit * max(round(width / _BLOCK_PX), 1)))  # so that few columns are in vain
        # A little more than is waited for below, where rounding may differ.
        boxes = grid.to_pixels(np.stack([xy - reach - _SPARE_PX, xy + reach + _SPARE_PX], axis=1)).reshape(-1, 4)
        corners = block_corners(grid, block_px, boxes, origin=(top, left))
        reading: dict[str, Any] = {"mpp": self.mpp, "block_px": block_px, "halo_px": HALO_CELLS * cell}
        blocks = iter_blocks(slide, corners=corners, **reading, progress_bar=progress_bar)

        shape = (block_px + int(-(-2 * reach // unit)) * unit, width)
        band = _Band(self._n_fine + Octaves.width(self._fine), (left, top), shape, cell)
        order = np.argsort(xy[:, 1], kind="stable")
        heights, done = xy[order, 1], 0
        for x, y, values in iter_tasks(self._fine_maps, blocks, n_jobs=min(settings.n_jobs, _THREADS)):
            if y + block_px > band.bottom:  # the first of a row of blocks: all above are there
                ready = int(np.searchsorted(heights, band.bottom - reach, side="right"))
                if ready > done:
                    yield order[done:ready], band
                    done = ready
                band.scroll(y + block_px)
            band.fill(x, values, block_px)
        if done < len(order):
            yield order[done:], band

    def _maps(self, band: _Band, xy: np.ndarray, grid: WorkingGrid) -> list[_Maps]:
        """All maps around `xy`, of which the band holds the finest and the state of the pyramid above them."""
        unit = 2 ** (self._levels - self._fine)
        reach = self._reach(grid)
        values, corner = band.window(xy[:, 0].min() - reach, xy[:, 0].max() + reach, grid, 2**self._levels)
        maps = [_Maps(values[: self._n_fine], 2**self._fine, corner)]
        pad = [(0, -size % unit) for size in values.shape[1:]]
        octaves = Octaves.restore(self._fine, np.pad(values[self._n_fine :], [(0, 0), *pad], mode="edge"))
        for level in range(self._fine, self._levels):
            maps.append(_Maps(np.stack(octaves.step()), 2**level, corner))
        return maps

    def _fine_maps(self, block: Block) -> tuple[int, int, np.ndarray]:
        """Position (x, y) of a block and, of its core, maps of the octaves within a cell and the pyramid's state there."""
        cell = 2**self._fine
        core = [-(-(stop.stop - stop.start) // cell) for stop in block.core]
        # The core is made up to whole cells at the cost of the halo behind it, of which one cell is spare for that.
        height, width = ((cells + 2 * HALO_CELLS - 1) * cell for cells in core)
        pixels = _continued(block)[:height, :width]
        inside = tuple(slice(HALO_CELLS, HALO_CELLS + cells) for cells in core)

        dyes = np.empty((3, height, width), np.float32)
        for dye, table in enumerate(self._tables):
            np.take(table[0], pixels[..., 0], out=dyes[dye])
            dyes[dye] += table[1][pixels[..., 1]]
            dyes[dye] += table[2][pixels[..., 2]]
        dyes[:, is_void(pixels)] = 0
        maps = [block_mean(dyes, cell), block_mean(dyes * dyes, cell), block_mean(dyes[:1] * dyes[1:2], cell)]
        octaves = Octaves(dyes[:2])
        for level in range(self._fine):
            maps.extend(block_mean(values[None], cell >> level) for values in octaves.step())
        return block.x, block.y, np.concatenate([*maps, octaves.state()])[:, *inside]

    def _features(self, maps: list[_Maps], xy: np.ndarray, grid: WorkingGrid) -> np.ndarray:
        """Features of windows around `xy` on the working grid."""
        out = []
        for part in maps:
            sides = [side / grid.mpp / part.side for side in self._windows.values()]
            width, height = (
                min((whole - start) / part.side, cells)
                for whole, start, cells in zip(grid.shape[::-1], part.corner, part.values.shape[:0:-1], strict=True)
            )
            out.append(window_means(part.values, (xy - part.corner) / part.side, sides, size=(width, height)))
        means = np.concatenate(out, axis=2)
        for index, name in enumerate(self._map_names):
            values = means[:, :, index]
            if name.endswith("_square"):
                centre = means[:, :, self._map_names.index(name.replace("_square", "_mean"))]
                np.sqrt(np.maximum(values - centre * centre, 0), out=values)
            elif "_power" in name:
                np.sqrt(np.maximum(values, 0), out=values)  # sums of a table may round below 0
        return means.reshape(len(xy), -1)


def _continued(block: Block) -> np.ndarray:
    """Pixels of a block whose halo, where it lies beyond the image, repeats the image's last pixels.

    The white that it is read as would make an edge of each image's border, strong where tissue is cut.
    """
    outside = [
        (max(block.halo_px - first, 0), max(place.stop + block.halo_px - size, 0))
        for first, place, size in zip((block.y, block.x), block.place, block.grid.shape, strict=True)
    ]
    if not np.any(outside):
        return block.pixels
    rows, columns = (
        slice(before, length - after) for (before, after), length in zip(outside, block.pixels.shape, strict=False)
    )
    return np.pad(block.pixels[rows, columns], [*outside, (0, 0)], mode="edge")
