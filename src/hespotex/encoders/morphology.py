"""The encoder that needs no weights: stain, texture and nuclei, described by formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
_BLOCK_PX = 1024
_CENTRES_AT_ONCE = 65_536
_CELLS_AT_ONCE = 1_000_000  # with about 100 maps of 4 bytes, 0.4 GB: the part of a slide that is in memory at a time


@dataclass(frozen=True)
class _Maps:
    """Maps of a part of a slide that share a cell size.

    `values` (m, h, w) starts at row `top` of the working grid; a cell is `side` working pixels wide.
    """

    values: np.ndarray
    side: int
    top: int


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
        """Yield (row indices (b,), features (b, n_features) float32), in horizontal parts of the slide.

        `device` is ignored, and `batch_size` a lower bound: it takes longer to set up a part than to read it off.
        """
        from ..image.stream import working_grid

        grid = working_grid(slide, self.mpp)
        xy = grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2))
        for rows in self._parts(xy, grid):
            maps = self._maps(slide, grid, xy[rows], progress_bar=progress_bar)
            for start in range(0, len(rows), max(batch_size, _CENTRES_AT_ONCE)):
                chunk = rows[start : start + max(batch_size, _CENTRES_AT_ONCE)]
                yield chunk, self._features(maps, xy[chunk], grid)

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Horizontal parts of the slide: their maps are computed apart in any case."""
        from ..image.stream import working_grid

        grid = working_grid(slide, self.mpp)
        return list(self._parts(grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2)), grid))

    def _reach(self, grid: WorkingGrid) -> float:
        """Working pixels around a centre that its features depend on."""
        # Above the cells each octave is smoothed by two of its pixels, and the coarsest grid is aligned to its own.
        return max(self._windows.values()) / grid.mpp / 2 + 3.0 * 2**self._levels

    def _parts(self, xy: np.ndarray, grid: WorkingGrid) -> Iterator[np.ndarray]:
        """Row indices of the centres in horizontal parts of bounded memory."""
        if not len(xy):
            return
        cells_per_row = max(grid.shape[1] / 2**self._fine, 1)
        height = max(_CELLS_AT_ONCE / cells_per_row * 2**self._fine - 2 * self._reach(grid), 2 * self._reach(grid))
        order = np.argsort(xy[:, 1], kind="stable")
        part = np.floor(xy[order, 1] / height)
        yield from np.split(order, np.flatnonzero(np.diff(part)) + 1)

    def _maps(self, slide: Slide, grid: WorkingGrid, xy: np.ndarray, *, progress_bar: bool) -> list[_Maps]:
        """All maps of the part of the slide that `xy` depend on; elsewhere they hold no meaning."""
        from ..image.stream import iter_blocks

        cell, unit = 2**self._fine, 2**self._levels
        block_px = unit * max(_BLOCK_PX // unit, 1)
        reach = self._reach(grid)
        top = int(np.clip((xy[:, 1].min() - reach) // unit * unit, 0, grid.shape[0] // unit * unit))
        bottom = int(min(-(-(xy[:, 1].max() + reach) // unit) * unit, grid.shape[0]))
        rows, columns = max(-(-(bottom - top) // cell), 1), -(-grid.shape[1] // cell)

        n_maps = len(COLOUR_NAMES) + sum(len(level_names(level)) for level in range(self._fine))
        fine = np.zeros((n_maps, rows, columns), np.float32)
        state = np.zeros((Octaves.width(self._fine), rows, columns), np.float32)
        blocks = iter_blocks(
            slide,
            mpp=self.mpp,
            block_px=block_px,
            halo_px=HALO_CELLS * cell,
            boxes=grid.to_pixels(np.stack([xy - reach, xy + reach], axis=1)).reshape(-1, 4),
            progress_bar=progress_bar,
        )
        for block in blocks:
            first = (block.y - top) // cell
            column = block.x // cell
            for target, source in zip((fine, state), self._fine_maps(block), strict=True):
                part = source[:, max(-first, 0) : rows - first]
                y = max(first, 0)
                target[:, y : y + part.shape[1], column : column + part.shape[2]] = part
        return [_Maps(fine, cell, top), *self._coarse_maps(state, top)]

    def _fine_maps(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Maps of the octaves within a cell, and the state of the pyramid at cells, for the core of a block."""
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
        return np.concatenate(maps)[:, *inside], octaves.state()[:, *inside]

    def _coarse_maps(self, state: np.ndarray, top: int) -> Iterator[_Maps]:
        """Maps of the octaves of a cell and above, for the whole part at once."""
        unit = 2 ** (self._levels - self._fine)
        pad = [(0, -size % unit) for size in state.shape[1:]]
        octaves = Octaves.restore(self._fine, np.pad(state, [(0, 0), *pad], mode="edge"))
        for level in range(self._fine, self._levels):
            yield _Maps(np.stack(octaves.step()), 2**level, top)

    def _features(self, maps: list[_Maps], xy: np.ndarray, grid: WorkingGrid) -> np.ndarray:
        """Features of windows around `xy` on the working grid."""
        out = []
        for part in maps:
            sides = [side / grid.mpp / part.side for side in self._windows.values()]
            size = (grid.shape[1] / part.side, min((grid.shape[0] - part.top) / part.side, part.values.shape[1]))
            out.append(window_means(part.values, (xy - (0, part.top)) / part.side, sides, size=size))
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
