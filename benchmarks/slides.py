"""Whole slides for tests and benchmarks: pyramidal tiled TIFFs of any size, written in bounded memory.

Run: ``python benchmarks/slides.py FILE SIZE_PX`` writes one and prints how long that took.

The tissue is that of :func:`hespotex.datasets.synthetic`, painted once: a piece of it is mirrored over the plane, so that
it goes on without a seam and nuclei lie as densely as in it. An outline is cut from a smooth random field, so that the tissue
covers a stated share of the glass; stain varies slowly over the slide, so no two tiles are equal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

COVER = 0.6  # share of the slide that is tissue
QUALITY = 85
FIELD = 192  # side of the grid on which outline and stain vary
PREVIEW_PX = 768
BLOBS = 5  # about as many pieces of tissue lie side by side


def write_slide(
    path: str | Path,
    size_px: int | tuple[int, int],
    *,
    mpp: float = 0.5,
    tile_px: int = 256,
    seed: int = 0,
    levels: int | None = None,
    maker: Literal["plain", "aperio"] = "plain",
) -> Path:
    """Write a slide as a BigTIFF of JPEG tiles with levels of half the size each, row of tiles by row of tiles.

    Parameters
    ----------
    path
        The file.
    size_px
        Side, or height and width, of the finest level.
    mpp
        µm per pixel, in the resolution tags or in Aperio's description.
    tile_px
        Side of a tile, a multiple of 16.
    seed
        Of tissue, outline and stain.
    levels
        How many levels; by default until one fits into 1,024 px.
    maker
        ``"aperio"`` writes the description of Aperio's ``.svs``, by which readers recognise it.
    """
    import imagecodecs
    import tifffile

    size = (size_px, size_px) if isinstance(size_px, int) else tuple(size_px)
    if levels is None:
        levels = 1 + max(0, int(np.ceil(np.log2(max(size) / 1024))))
    sizes = [(max(1, size[0] >> level), max(1, size[1] >> level)) for level in range(levels)]
    rows_of_tissue = _rows_of_tissue(size, mpp, tile_px, seed)

    def encode(tile: np.ndarray) -> bytes:
        return imagecodecs.jpeg8_encode(tile, level=QUALITY, colorspace="rgb", outcolorspace="ycbcr", subsampling="420")

    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=Path(path).parent)) for _ in sizes[1:]]
        spools = [_Spool(file, shape, tile_px, encode) for file, shape in zip(files, sizes[1:], strict=True)]
        tiff = stack.enter_context(tifffile.TiffWriter(path, bigtiff=True))

        preview, step = [], -(-max(size) // PREVIEW_PX)

        def finest() -> Iterator[bytes]:
            for top, rows in zip(range(0, size[0], tile_px), rows_of_tissue, strict=True):
                preview.append(rows[-top % step :: step, ::step].copy())
                coarse = rows
                for spool in spools:  # before the tiles go out: nobody asks for more after the last
                    coarse = spool.add(coarse)
                yield from map(encode, _tiles(rows, tile_px))

        sources = [finest(), *(spool.tiles() for spool in spools)]
        for level, (shape, source) in enumerate(zip(sizes, sources, strict=True)):
            tiff.write(
                source,
                shape=(*shape, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                tile=(tile_px, tile_px),
                subfiletype=1 if level and maker == "plain" else 0,
                resolution=(10_000 / mpp / 2**level,) * 2 if maker == "plain" else None,
                resolutionunit="CENTIMETER" if maker == "plain" else None,
                description=_aperio(sizes[0], shape, tile_px, mpp) if maker == "aperio" else None,
                software=False,
                metadata=None,
            )
            if maker == "aperio" and level == 0:  # the second image of an .svs is its preview, in strips
                whole = np.concatenate(preview)
                preview_of = _aperio(size, whole.shape[:2], 0, mpp)
                tiff.write(
                    whole, photometric="rgb", rowsperstrip=16, description=preview_of, software=False, metadata=None
                )
    return Path(path)


@contextmanager
def decoded_tiles() -> Iterator[Counter[tuple[int, int, int]]]:
    """Count what is decoded of tiled TIFFs in this process: level, row and column of each tile."""
    from hespotex.image.files._tiff import TiffLevel

    counts: Counter[tuple[int, int, int]] = Counter()
    decode = TiffLevel._decode

    def counted(self: TiffLevel, file: Any, plane: Any, row: int, column: int) -> Any:
        counts[self.level, row, column] += 1
        return decode(self, file, plane, row, column)

    TiffLevel._decode = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        TiffLevel._decode = decode  # type: ignore[method-assign]


class _Spool:
    """A coarser level while it grows: rows go in, encoded tiles wait in a file until the level is written."""

    def __init__(self, file: IO[bytes], shape: tuple[int, int], tile_px: int, encode: Callable[..., bytes]) -> None:
        self.file = file
        self.shape = shape
        self.tile_px = tile_px
        self.encode = encode
        self.lengths: list[int] = []
        self.waiting = np.empty((0, shape[1], 3), np.uint8)
        self.odd: np.ndarray | None = None
        self.taken = 0

    def add(self, fine: np.ndarray) -> np.ndarray:
        """Take rows of the level above; returns what they are on this one."""
        if self.odd is not None:
            fine = np.concatenate([self.odd, fine])
        height, width = min(len(fine) // 2, self.shape[0] - self.taken), self.shape[1]
        self.odd = fine[2 * height :].copy()
        pairs = fine[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).astype(np.uint16)
        rows = ((pairs[:, 0, :, 0] + pairs[:, 0, :, 1] + pairs[:, 1, :, 0] + pairs[:, 1, :, 1] + 2) >> 2).astype(
            np.uint8
        )
        self.taken += height
        self.waiting = np.concatenate([self.waiting, rows])
        while len(self.waiting) >= self.tile_px:
            self._put(self.waiting[: self.tile_px])
            self.waiting = self.waiting[self.tile_px :]
        return rows

    def tiles(self) -> Iterator[bytes]:
        """All tiles; called when the level above is complete."""
        assert self.taken == self.shape[0], f"{self.taken} of {self.shape[0]} rows"
        if len(self.waiting):
            self._put(self.waiting)
        self.file.seek(0)
        for length in self.lengths:
            yield self.file.read(length)

    def _put(self, rows: np.ndarray) -> None:
        for tile in map(self.encode, _tiles(rows, self.tile_px)):
            self.lengths.append(self.file.write(tile))


def _tiles(rows: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """A row of whole tiles; what lies beyond the image repeats its border, as encoders of scanners do."""
    height, width = rows.shape[:2]
    rows = np.pad(rows, [(0, side - height), (0, -width % side), (0, 0)], mode="edge")
    return (np.ascontiguousarray(rows[:, left : left + side]) for left in range(0, width, side))


def _rows_of_tissue(size: tuple[int, int], mpp: float, side: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of tiles of the finest level, (side or less, width, 3) uint8."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    tissue = _Plane(_painted(min(3072, max(1024, *size)), mpp, seed), side)
    glass = _Plane(np.clip(rng.normal(243, 1.6, (512, 512, 3)), 0, 255).astype(np.uint8), side)
    height, width = size
    grid = max(4, FIELD * height // max(size)), max(4, FIELD * width // max(size))
    centre = [np.abs(np.linspace(-1, 1, cells)) ** 4 for cells in grid]
    outline = gaussian_filter(rng.normal(size=grid), FIELD / BLOBS / 4, mode="reflect")
    outline = outline / outline.std() - 2 * (centre[0][:, None] + centre[1][None])
    outline -= np.quantile(outline, 1 - COVER)
    stain = gaussian_filter(rng.normal(size=grid), FIELD / 12, mode="reflect")
    stain *= 0.06 / stain.std()
    for top in range(0, height, side):
        rows = np.empty((min(side, height - top), width, 3), np.uint8)
        for left in range(0, width, side):
            piece = rows[:, left : left + side]
            depth = _stretched(outline, size, (top, left), piece.shape[:2])
            if depth.max() <= 0:
                piece[:] = glass.window(top, left, piece.shape)
                continue
            strength = 1 + _stretched(stain, size, (top, left), (1, 1)).item()
            table = np.rint(250 * (np.arange(256) / 250) ** strength).clip(0, 255).astype(np.uint8)
            piece[:] = table[tissue.window(top, left, piece.shape)]
            if depth.min() <= 0:
                beyond = depth <= 0
                piece[beyond] = glass.window(top, left, piece.shape)[beyond]
        yield rows


def _painted(side: int, mpp: float, seed: int) -> np.ndarray:
    """The inner part of a synthetic section, (h, w, 3)."""
    import hespotex as hx

    section = hx.datasets.synthetic(size_px=side, mpp=mpp, with_expression=False, seed=seed)
    image = section["image"]
    finest = image["scale0"]["image"] if hasattr(image, "children") else image
    inner = slice(int(0.15 * side), int(0.85 * side) | 1)  # of odd size, so that its repetitions meet tiles differently
    return np.moveaxis(np.asarray(finest[:, inner, inner]), 0, -1)


class _Plane:
    """A plane covered by a picture and its mirror images."""

    def __init__(self, pixels: np.ndarray, window: int) -> None:
        period = np.concatenate([pixels, pixels[::-1]])
        period = np.concatenate([period, period[:, ::-1]], axis=1)
        self.period = period.shape[:2]
        self.pixels = np.pad(period, [(0, window), (0, window), (0, 0)], mode="wrap")  # so that a window is one slice

    def window(self, top: int, left: int, shape: tuple[int, ...]) -> np.ndarray:
        """Pixels of a window of at most the side given."""
        y, x = top % self.period[0], left % self.period[1]
        return self.pixels[y : y + shape[0], x : x + shape[1]]


def _stretched(field: np.ndarray, size: tuple[int, int], corner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Linear interpolation of a field over the slide, at the pixels of a window."""
    weights = []
    for cells, length, start, count in zip(field.shape, size, corner, shape, strict=True):
        position = (start + np.arange(count)) / length * (cells - 1)
        low = np.minimum(position.astype(int), cells - 2)
        weights.append((low, position - low))
    (y, v), (x, u) = weights
    patch = field[y[0] : y[-1] + 2, x[0] : x[-1] + 2]
    y, x = y - y[0], x - x[0]
    rows = patch[y] * (1 - v)[:, None] + patch[y + 1] * v[:, None]
    return rows[:, x] * (1 - u) + rows[:, x + 1] * u


def _aperio(full: tuple[int, int], shape: tuple[int, int], tile_px: int, mpp: float) -> str:
    height, width = full
    scaled = "" if shape == full else f" -> {shape[1]}x{shape[0]}"
    tiles = f" ({tile_px}x{tile_px})" if tile_px else ""
    return (
        f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}]{tiles}{scaled} JPEG/YCC Q={QUALITY}|"
        f"AppMag = {round(10 / mpp):d}|MPP = {mpp:.4f}"
    )


if __name__ == "__main__":
    started = time.perf_counter()
    written = write_slide(sys.argv[1], int(sys.argv[2]))
    print(f"{written}: {written.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s")
