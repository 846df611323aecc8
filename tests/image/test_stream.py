from __future__ import annotations

import threading
import time

import dask.array as da
import numpy as np
import pytest

from hespotex.data.geometry import Slide, resolve_slide
from hespotex.data.pyramid import Level
from hespotex.errors import DataValueError, ScaleError
from hespotex.image._chunks import ChunkReader
from hespotex.image._prefetch import prefetch
from hespotex.image.stream import iter_blocks, iter_tiles, working_grid


class CountingArray:
    """An array that counts how often each of its chunks is read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.reads = pixels, []
        self.shape, self.dtype, self.ndim = pixels.shape, pixels.dtype, pixels.ndim

    def __getitem__(self, key):
        self.reads.append(tuple((part.start, part.stop) for part in key[1:]))
        return self.pixels[key]


def noise(height: int = 300, width: int = 260, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (3, height, width), dtype=np.uint8)


def slide_of(pixels, chunks=64, mpp=0.5, factors=()) -> Slide:
    source = pixels if isinstance(pixels, CountingArray) else np.asarray(pixels)
    levels = [Level(da.from_array(source, chunks=(3, chunks, chunks), asarray=False, name=False), 1.0)]
    for factor in factors:
        height, width = (size // factor for size in pixels.shape[1:])
        small = pixels[:, : height * factor, : width * factor].reshape(3, height, factor, width, factor)
        small = small.mean((2, 4)).round().astype(np.uint8)
        levels.append(Level(da.from_array(small, chunks=(3, chunks, chunks)), float(factor)))
    return Slide("image", tuple(levels), mpp, np.diag([mpp, mpp, 1.0]))


def tiles_of(slide: Slide, centres, **options) -> tuple[np.ndarray, np.ndarray]:
    rows, pixels, padded = [], [], []
    for batch in iter_tiles(slide, np.asarray(centres, dtype=float), progress_bar=False, **options):
        rows.append(batch.rows)
        pixels.append(batch.pixels)
        padded.append(batch.padded)
    order = np.argsort(np.concatenate(rows))
    assert sorted(np.concatenate(rows)) == list(range(len(centres)))
    return np.concatenate(pixels)[order], np.concatenate(padded)[order]


def assembled(slide: Slide, **options) -> np.ndarray:
    out = None
    for block in iter_blocks(slide, progress_bar=False, **options):
        if out is None:
            out = np.zeros((*block.grid.shape, 3), np.uint8)
        out[block.place] = block.pixels[block.core]
    return out


def test_a_tile_at_native_scale_is_a_cut_of_the_image():
    pixels = noise()
    tiles, padded = tiles_of(slide_of(pixels), [[100, 120], [33, 40]], tile_um=16, tile_px=32)
    np.testing.assert_array_equal(tiles[0], pixels[:, 104:136, 84:116].transpose(1, 2, 0))
    np.testing.assert_array_equal(tiles[1], pixels[:, 24:56, 17:49].transpose(1, 2, 0))
    assert not padded.any()


@pytest.mark.parametrize("tile_px", [16, 32, 48])
def test_one_bright_pixel_lies_where_it_should(tile_px):
    """Pixel i covers [i, i + 1): a tile around i + 0.5 has it in its middle, whatever the enlargement."""
    pixels = np.zeros((3, 200, 200), np.uint8)
    pixels[:, 90, 70] = 255
    tiles, _ = tiles_of(slide_of(pixels), [[70.5, 90.5], [74.5, 88.5]], tile_um=16, tile_px=tile_px)
    weight = tiles[..., 0].astype(float)
    position = (np.arange(tile_px) + 0.5) * 32 / tile_px - 16
    for tile, expected in zip(weight, [(0, 0), (-4, 2)], strict=True):
        x, y = (tile.sum(0) @ position) / tile.sum(), (tile.sum(1) @ position) / tile.sum()
        assert (x, y) == pytest.approx(expected, abs=0.15)


def test_tiles_depend_neither_on_chunks_nor_on_batches_nor_on_order():
    pixels, rng = noise(), np.random.default_rng(1)
    centres = rng.uniform(0, 260, (60, 2))
    reference, padded = tiles_of(slide_of(pixels), centres, tile_um=30, tile_px=40, batch_size=7)
    for chunks, batch_size in ((17, 64), (1000, 1)):
        tiles, _ = tiles_of(slide_of(pixels, chunks), centres, tile_um=30, tile_px=40, batch_size=batch_size)
        np.testing.assert_array_equal(tiles, reference)
    order = rng.permutation(60)
    tiles, again = tiles_of(slide_of(pixels), centres[order], tile_um=30, tile_px=40)
    np.testing.assert_array_equal(tiles, reference[order])
    np.testing.assert_array_equal(again, padded[order])


def test_border_tiles_are_padded_flagged_and_never_shifted():
    pixels = np.full((3, 100, 100), 10, np.uint8)
    tiles, padded = tiles_of(slide_of(pixels), [[0, 50], [50, 50], [99, 99], [16, 16]], tile_um=16, tile_px=32)
    assert padded.tolist() == [True, False, True, False]
    assert (tiles[0][:, :16] == 255).all()
    assert (tiles[0][:, 16:] == 10).all()
    assert (tiles[2][17:] == 255).all()


def test_multiscale_and_single_scale_give_nearly_the_same_tiles():
    y, x = np.mgrid[:512, :512]
    smooth = np.stack([127 + 100 * np.sin(x / 25), 127 + 100 * np.cos(y / 30), (x + y) / 4]).astype(np.uint8)
    centres = [[200, 210], [300.5, 280.25]]
    one, _ = tiles_of(slide_of(smooth), centres, tile_um=64, tile_px=32)
    many, _ = tiles_of(slide_of(smooth, factors=(2, 4)), centres, tile_um=64, tile_px=32)
    assert np.abs(one.astype(int) - many).max() <= 3


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_mark_near_the_far_corner_lies_where_it_should_at_every_level(factor):
    """An odd size, of which halving drops a part: the ratio of sizes is not the size of a pixel."""
    pixels = np.zeros((3, 1031, 1031), np.uint8)
    pixels[:, 1008:1016, 1008:1016] = 255
    slide = slide_of(pixels, factors=(2, 4, 8))
    mpp = 0.5 * factor
    assert working_grid(slide, mpp).level.downsample == factor
    tiles, _ = tiles_of(slide, [[1012, 1012]], tile_um=16 * mpp, tile_px=16, fill=0)
    weight, position = tiles[0, ..., 0].astype(float), (np.arange(16) + 0.5 - 8) * mpp
    assert (weight.sum(0) @ position / weight.sum(), weight.sum(1) @ position / weight.sum()) == pytest.approx(
        (0, 0), abs=0.02
    )
    grid = working_grid(slide, mpp)
    found = np.argwhere(assembled(slide, mpp=mpp)[..., 0] == 255)
    np.testing.assert_allclose(grid.to_pixels(found.mean(0) + 0.5), [1012, 1012])


def test_a_level_without_the_odd_last_row_has_no_white_border():
    slide = slide_of(np.full((3, 207, 203), 10, np.uint8), factors=(2, 4, 8))
    tiles, padded = tiles_of(slide, [[203 - 64, 207 - 64]], tile_um=64, tile_px=16)
    assert not padded.any()
    assert tiles.max() == 10
    whole = assembled(slide, mpp=4.0)
    assert whole.shape == (26, 26, 3)
    assert whole.max() == 10


@pytest.mark.parametrize("offset", [(101, 203), (64, 64), (7, 90)])
@pytest.mark.parametrize("tile_um", [64.0, 128.0, 256.0])
def test_a_crop_at_any_pixel_gives_the_same_tiles(plain_section, offset, tile_um):
    """spatialdata cuts coarser levels at pixels of their own; tiles lie within 0.05 µm of those of the whole."""
    y, x = np.mgrid[:1011, :1109]
    spot = (255 * np.exp(-((x - 600) ** 2 + (y - 500) ** 2) / 2 / 16**2)).astype(np.uint8)
    sdata = plain_section(np.stack([spot] * 3), scale_factors=[2, 2, 2])
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=list(offset), max_coordinate=[1050, 990], target_coordinate_system="global"
    )
    found = []
    for section, centre in ((sdata, (603.0, 497.0)), (crop, (603.0 - offset[0], 497.0 - offset[1]))):
        slide = resolve_slide(section)
        assert len(slide.levels) == 4
        tiles, _ = tiles_of(slide, [centre], tile_um=tile_um, tile_px=64)
        weight, position = tiles[0, ..., 0].astype(float), (np.arange(64) + 0.5) * tile_um / 64
        found.append((weight.sum(0) @ position / weight.sum(), weight.sum(1) @ position / weight.sum()))
    assert found[1] == pytest.approx(found[0], abs=0.05)


def test_scaled_image_gives_the_same_tiles():
    """The same tissue at half the pixel size: tiles are laid in µm."""
    y, x = np.mgrid[:400, :400] + 0.5

    def paint(scale: float) -> np.ndarray:
        u, v = x[: int(400 * scale), : int(400 * scale)] / scale, y[: int(400 * scale), : int(400 * scale)] / scale
        return np.stack([127 + 100 * np.sin(u / 25), 127 + 100 * np.cos(v / 30), (u + v) / 4]).astype(np.uint8)

    fine, _ = tiles_of(slide_of(paint(1.0), mpp=0.5), [[200, 210]], tile_um=60, tile_px=60)
    coarse, _ = tiles_of(slide_of(paint(0.5), mpp=1.0), [[100, 105]], tile_um=60, tile_px=60)
    assert np.abs(fine.astype(int) - coarse).max() <= 3


def test_each_chunk_is_read_once():
    source = CountingArray(noise())
    slide = slide_of(source)
    source.reads.clear()
    centres = np.random.default_rng(0).uniform(20, 240, (200, 2))
    tiles_of(slide, centres, tile_um=20, tile_px=20)
    assert len(source.reads) == len(set(source.reads))
    source.reads.clear()
    assembled(slide, mpp=0.7, block_px=50, halo_px=9)
    assert len(source.reads) == len(set(source.reads)) == 5 * 5


def test_memory_holds_the_frontier_only():
    reader = ChunkReader(
        da.zeros((3, 1000, 300), chunks=(3, 100, 100), dtype=np.uint8),
        np.array([(y, 0, y + 120, 300) for y in range(0, 900, 100)]),
    )
    for index in range(9):
        reader.read(index)
        assert len(reader._decoded) <= 3
    assert len(reader._decoded) == 0


@pytest.mark.parametrize("mpp", [0.5, 0.3, 0.73, 1.0, 1.7])
def test_blocks_are_one_grid_whatever_their_size(mpp):
    pixels = noise()
    reference = assembled(slide_of(pixels), mpp=mpp, block_px=1000)
    for block_px, halo_px, chunks in ((32, 0, 64), (57, 11, 40)):
        np.testing.assert_array_equal(
            assembled(slide_of(pixels, chunks), mpp=mpp, block_px=block_px, halo_px=halo_px), reference
        )


def test_blocks_are_area_means():
    pixels = noise(96, 90)
    np.testing.assert_array_equal(assembled(slide_of(pixels), mpp=0.5), pixels.transpose(1, 2, 0))
    halved = assembled(slide_of(pixels), mpp=1.0)
    expected = pixels.reshape(3, 48, 2, 45, 2).mean((2, 4)).transpose(1, 2, 0)
    assert np.abs(halved - expected).max() <= 0.5
    fractional = assembled(slide_of(pixels), mpp=0.75)
    first = pixels[:, :2, :2].astype(float) * np.outer([1, 0.5], [1, 0.5])
    np.testing.assert_allclose(fractional[0, 0], first.sum((1, 2)) / 2.25, atol=0.51)


def test_a_halo_shows_the_neighbours_and_white_beyond_the_border():
    pixels = noise(128, 128)
    blocks = {(b.y, b.x): b for b in iter_blocks(slide_of(pixels), mpp=0.5, block_px=64, halo_px=8, progress_bar=False)}
    image = pixels.transpose(1, 2, 0)
    np.testing.assert_array_equal(blocks[0, 0].pixels[8:, 8:], image[:72, :72])
    assert (blocks[0, 0].pixels[:8] == 255).all()
    np.testing.assert_array_equal(blocks[64, 64].pixels[:-8, :-8], image[56:, 56:])


def test_blocks_that_nobody_wants_are_not_read():
    source = CountingArray(noise(256, 256))
    slide = slide_of(source)
    source.reads.clear()
    boxes = np.array([[70, 10, 100, 20]])
    blocks = list(iter_blocks(slide, mpp=0.5, block_px=64, boxes=boxes, progress_bar=False))
    assert [(block.y, block.x) for block in blocks] == [(0, 64)]
    assert source.reads == [((0, 64), (64, 128))]
    assert list(iter_blocks(slide, mpp=0.5, block_px=64, boxes=np.empty((0, 4)), progress_bar=False)) == []


def test_the_grid_takes_whole_pixels_within_one_percent():
    slide = slide_of(noise(), mpp=0.499, factors=(2,))
    grid = working_grid(slide, 0.5)
    assert (grid.mpp, grid.step, grid.factor) == (0.499, (1, 1), (1, 1))
    assert working_grid(slide, 1.0).level.downsample == 2
    assert working_grid(slide, 1.0).factor == (2.0, 2.0)
    grid = working_grid(slide, 0.6)
    assert grid.mpp == 0.6
    assert grid.factor == pytest.approx((0.6 / 0.499,) * 2)
    points = np.array([[10.0, 20.0]])
    np.testing.assert_allclose(grid.to_pixels(grid.from_pixels(points)), points)


def test_what_cannot_be_read():
    slide = slide_of(noise())
    with pytest.raises(ScaleError, match="enlarge"):
        next(iter_tiles(slide, np.array([[50.0, 50.0]]), tile_um=10, tile_px=100))
    with pytest.raises(ScaleError, match="enlarge"):
        next(iter_blocks(slide, mpp=0.1))
    with pytest.raises(DataValueError, match="finite"):
        next(iter_tiles(slide, np.array([[np.nan, 50.0]]), tile_um=10, tile_px=10))
    with pytest.raises(DataValueError, match="block_px"):
        next(iter_blocks(slide, mpp=0.5, block_px=0))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "hespotex-prefetch"]


def test_leaving_early_stops_the_thread():
    slide = slide_of(noise(), chunks=32)
    for _ in iter_blocks(slide, mpp=0.5, block_px=16, progress_bar=False):
        assert threads()
        break
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_ctrl_c_passes_through():
    def consume() -> None:
        for index, _ in enumerate(prefetch(iter(range(1000)))):
            if index == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not threads()


def test_errors_of_the_source_reach_the_caller_after_what_came_before():
    def source():
        yield 1
        yield 2
        raise OSError("truncated")

    seen = []
    with pytest.raises(OSError, match="truncated"):
        seen.extend(iter_into(prefetch(source()), seen))
    assert seen == [1, 2]
    assert list(prefetch(iter(range(20)), depth=1)) == list(range(20))


def iter_into(source, seen):
    for item in source:
        seen.append(item)
    return []
