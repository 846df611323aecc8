from __future__ import annotations

import threading
import tracemalloc
from contextlib import closing

import dask.array as da
import numpy as np
import pytest
from shapely import area, is_valid

from hespotex.data.geometry import Level, Slide
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning
from hespotex.pp._nuclei_source import OfPixels
from hespotex.segmentation import Watershed, _tiled
from hespotex.segmentation._appearance import estimate_appearance, sample_tissue
from hespotex.segmentation._nuclei import Nuclei
from hespotex.segmentation._outline import FEATURES
from hespotex.segmentation._raster import rasterise
from hespotex.segmentation._tiled import iter_nuclei, segment_slide

from ._scenes import discs, lattice, matched, slide_of

SHAPE = (300, 380)


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    return discs(SHAPE, lattice(SHAPE, 24, seed=3), radius=8, seed=1)


def segment(image: np.ndarray, block_px: int, n_jobs: int = 1) -> Nuclei:
    backend = Watershed(16.0, estimate_appearance(image))
    return segment_slide(
        slide_of(image),
        lambda block: backend(block.pixels),
        mpp=0.5,
        halo_px=backend.halo_px,
        block_px=block_px,
        n_jobs=n_jobs,
        progress_bar=False,
    )


@pytest.mark.parametrize("block_px", [90, 256])
def test_blocks_give_what_the_whole_image_gives(scene: tuple[np.ndarray, np.ndarray], block_px: int) -> None:
    image, truth = scene
    whole, tiled = segment(image, 1000), segment(image, block_px)
    assert np.array_equal(rasterise(tiled)[:], rasterise(whole)[:])
    assert np.array_equal(whole.regions.features, tiled.regions.features)
    hits, n_true, n_found = matched(truth, rasterise(tiled)[:])
    assert hits == n_true == n_found


def test_threads_change_nothing(scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    one, three = segment(image, 128), segment(image, 128, n_jobs=3)
    assert np.array_equal(one.regions.centroids, three.regions.centroids)


def test_outlines_and_measures_fit_the_discs(scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, truth = scene
    nuclei = segment(image, 200)
    values = dict(zip(FEATURES, nuclei.regions.features.T, strict=True))
    assert abs(np.median(values["area_um2"]) / (np.pi * 16) - 1) < 0.1
    assert np.median(values["eccentricity"]) < 0.4
    assert np.median(values["solidity"]) > 0.93
    assert abs(np.median(values["major_axis_um"]) - 8) < 0.8
    assert is_valid(nuclei.outlines()).all()
    # Corners of pixels are cut: an outline is a little smaller than its pixels.
    assert np.abs(area(nuclei.outlines()) / 4 / values["area_um2"] - 1).max() < 0.1
    centres = nuclei.centroids()
    assert (truth[centres[:, 1].astype(int), centres[:, 0].astype(int)] > 0).all()


def test_a_backend_that_disagrees_with_itself_makes_no_doubles() -> None:
    """A disc whose centroid shifts with the block it is seen from lies in the core of both."""
    image = np.full((100, 200, 3), 255, np.uint8)

    def backend(block) -> np.ndarray:
        labels = np.zeros(block.pixels.shape[:2], np.int32)
        top, left = block.y - block.halo_px, block.x - block.halo_px
        shift = -3 if block.x == 0 else 3
        labels[40 - top : 60 - top, 90 + shift - left : 110 + shift - left] = 1
        return labels

    nuclei = segment_slide(slide_of(image), backend, mpp=0.5, halo_px=40, block_px=100, n_jobs=1, progress_bar=False)
    assert len(nuclei.ids) == 1


@pytest.mark.parametrize("name", [900_000, 2**40])
def test_given_names_are_kept_and_order_is_along_rows(name: int) -> None:
    labels = np.zeros((100, 100), np.int64)
    labels[70:80, 10:20], labels[10:20, 60:70] = 7, name
    nuclei = segment_slide(
        slide_of(np.full((100, 100, 3), 200, np.uint8)),
        lambda block: np.pad(labels, 20)[block.y : block.y + 90, block.x : block.x + 90],
        mpp=0.5,
        halo_px=20,
        block_px=50,
        n_jobs=1,
        keep_names=True,
        progress_bar=False,
    )
    assert nuclei.ids.tolist() == [name, 7]
    assert np.array_equal(rasterise(nuclei)[:], labels)
    assert nuclei.centroids().tolist() == [[65, 15], [15, 75]]


def test_pieces_with_the_number_of_another_nucleus_are_reported() -> None:
    labels = np.zeros((200, 200), np.int64)
    labels[40:60, 40:60] = 1  # whole, on a corner of four blocks
    labels[10:20, 10:20] = labels[10:20, 180:190] = labels[170:180, 30:40] = 2

    def backend(block) -> np.ndarray:
        return np.pad(labels, 30)[block.y : block.y + 110, block.x : block.x + 110]

    image = np.full((200, 200, 3), 200, np.uint8)
    options = {"mpp": 0.5, "halo_px": 30, "block_px": 50, "n_jobs": 1, "keep_names": True, "progress_bar": False}
    with pytest.warns(HespotexWarning, match="2 pieces of the label image have the number of another nucleus"):
        nuclei = segment_slide(slide_of(image), backend, **options)
    assert nuclei.ids.tolist() == [2, 1]
    assert nuclei.centroids().tolist() == [[15, 15], [50, 50]]


def test_nothing_works_on_when_the_nuclei_are_no_longer_wanted() -> None:
    """Also where a traceback, as in a notebook, keeps what was in use."""
    image = np.full((400, 400, 3), 200, np.uint8)
    before = set(threading.enumerate())

    def backend(block) -> np.ndarray:
        height, width = block.pixels.shape[:2]
        return np.pad(np.ones((10, 10), np.int32), [(20, height - 30), (20, width - 30)])

    nuclei = iter_nuclei(slide_of(image), backend, mpp=0.5, halo_px=5, block_px=50, n_jobs=2, progress_bar=False)
    with closing(nuclei):
        next(nuclei)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


def test_nuclei_beyond_the_surroundings_are_reported() -> None:
    def backend(block) -> np.ndarray:
        return np.ones(block.pixels.shape[:2], np.int32)

    image = np.full((200, 200, 3), 200, np.uint8)
    with pytest.warns(HespotexWarning, match="were cut"):
        segment_slide(slide_of(image), backend, mpp=0.5, halo_px=5, block_px=50, n_jobs=1, progress_bar=False)


def test_a_bad_backend_is_named() -> None:
    image = np.full((50, 50, 3), 200, np.uint8)
    options = {"mpp": 0.5, "halo_px": 5, "n_jobs": 1, "progress_bar": False}
    with pytest.raises(DataValueError, match="shape"):
        segment_slide(slide_of(image), lambda block: np.zeros((3, 3), int), **options)
    with pytest.raises(DataTypeError, match="float64"):
        segment_slide(slide_of(image), lambda block: np.zeros(block.pixels.shape[:2]), **options)
    with pytest.raises(DataValueError, match="negative label -1"):
        segment_slide(slide_of(image), lambda block: np.full(block.pixels.shape[:2], -1), **options)
    with pytest.raises(DataValueError, match="halo_px=0"):
        segment_slide(slide_of(image), lambda block: None, **{**options, "halo_px": 0})


def test_a_coarser_grid_gives_outlines_in_level_0_pixels() -> None:
    image, truth = discs((400, 400), np.array([[200.0, 100.0], [300, 300]]), 16)
    backend = Watershed(16.0, estimate_appearance(image))
    nuclei = segment_slide(
        slide_of(image, 0.25), lambda block: backend(block.pixels), mpp=0.5, halo_px=80, n_jobs=1, progress_bar=False
    )
    assert np.allclose(nuclei.centroids(), [[200, 100], [300, 300]], atol=1)
    assert np.allclose(area(nuclei.outlines()), np.pi * 256, rtol=0.1)


def test_the_sample_is_taken_from_tissue_and_not_from_glass() -> None:
    image = np.full((3200, 3200, 3), 240, np.uint8)
    part, _ = discs((640, 960), lattice((640, 960), 30), 8)
    image[1280:1920, 640:1600] = part
    pixels = sample_tissue(slide_of(image, chunk=800), 0.5)
    assert (pixels[:, 0] < 150).mean() > 0.1
    assert len(pixels) < 0.2 * image[..., 0].size
    assert estimate_appearance(pixels).has_nuclei


def test_slides_wider_than_a_run_of_blocks_are_read_run_by_run(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = scene
    one = segment(image, 64)
    monkeypatch.setattr(_tiled, "_RUN_BLOCKS", 2)
    several = segment(image, 64, n_jobs=2)
    for name, array in one.regions.arrays().items():
        assert np.array_equal(array, several.regions.arrays()[name]), name


def test_a_cluster_finds_the_same_to_the_bit(scene, cluster) -> None:
    image, _ = scene
    backend = Watershed(16.0, estimate_appearance(image))
    options = {"mpp": 0.5, "halo_px": backend.halo_px, "block_px": 90, "progress_bar": False}
    here = segment_slide(slide_of(image), OfPixels(backend), n_jobs=1, **options)
    there = segment_slide(slide_of(image), OfPixels(backend), client=cluster, **options)
    assert len(here) > 50
    for name, array in here.regions.arrays().items():
        assert np.array_equal(array, there.regions.arrays()[name]), name


def test_memory_holds_one_row_of_blocks(scene) -> None:
    """Rows are handed over as soon as they are there, with no double of the row before and ids that go on."""
    image, _ = scene
    backend, blocks = Watershed(16.0, estimate_appearance(image)), []

    def counting(block) -> np.ndarray:
        blocks.append(block.y)
        return backend(block.pixels)

    rows = iter_nuclei(
        slide_of(image), counting, mpp=0.5, halo_px=backend.halo_px, block_px=75, n_jobs=1, progress_bar=False
    )
    ids, seen = [], []
    for part in rows:
        seen.append(len(blocks))
        ids.extend(part.ids.tolist())
        assert len(np.unique(part.regions.centroids[:, 1] // 75)) == 1
    assert seen == [6, 12, 18, 24]
    assert ids == list(range(1, len(ids) + 1))


def test_memory_does_not_grow_with_the_slide() -> None:
    tile, truth = discs((384, 384), lattice((384, 384), 40, jitter=0), 8)

    def peak(n_rows: int) -> int:
        array = da.map_blocks(
            lambda: np.moveaxis(tile, -1, 0).copy(),
            chunks=((3,), (384,) * n_rows, (384,) * 2),
            dtype=np.uint8,
            meta=tile[:0],
        )
        slide = Slide("image", (Level(array, 1.0),), 0.5, np.diag([0.5, 0.5, 1.0]))
        rows = iter_nuclei(
            slide,
            lambda block: np.pad(truth, 24),
            mpp=0.5,
            halo_px=24,
            block_px=384,
            n_jobs=1,
            progress_bar=False,
        )
        tracemalloc.start()
        found = sum(len(part) for part in rows)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == 2 * truth.max() * n_rows
        return highest

    peak(2)  # whatever is imported and compiled first
    assert peak(70) < 1.25 * peak(10)  # where 70 rows of results are kept, it is 1.4 times


def looks_different(block, seen: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Label image of a block with the boxes (y0, x0, y1, x1) that it sees, which lie in its surroundings."""
    labels = np.zeros(block.pixels.shape[:2], np.int32)
    top, left = block.y - block.halo_px, block.x - block.halo_px
    for name, (y0, x0, y1, x1) in enumerate(seen, start=1):
        labels[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] = name
    return labels


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([(40, 93, 60, 113)], [(40, 87, 60, 107)], 1),  # each sees it in the core of the other
        ([(40, 87, 60, 107)], [(40, 93, 60, 113)], 1),  # each sees it in its own
        ([(40, 80, 60, 119)], [(40, 101, 60, 125)], 1),  # the second does not even see it cross the border
        ([(40, 80, 60, 99)], [(40, 84, 60, 120)], 1),  # nor the first
        ([(40, 90, 60, 114)], [(40, 88, 60, 101), (40, 101, 60, 113)], 2),  # one to the first, two to the second
        ([(40, 70, 60, 90)], [(40, 110, 60, 130)], 2),  # two, each seen by one block alone
        ([(40, 99, 60, 110)], [], 1),  # the neighbour sees nothing
        ([(40, 60, 60, 100)], [(40, 100, 60, 140)], 2),  # they touch at the border
    ],
)
def test_what_two_blocks_see_differently_is_there_once(first, second, expected: int, turned: bool) -> None:
    def backend(block) -> np.ndarray:
        seen = first if (block.y if turned else block.x) == 0 else second
        return looks_different(block, [(x0, y0, x1, y1) if turned else (y0, x0, y1, x1) for y0, x0, y1, x1 in seen])

    image = np.full((200, 100, 3) if turned else (100, 200, 3), 255, np.uint8)
    nuclei = segment_slide(slide_of(image), backend, mpp=0.5, halo_px=64, block_px=100, n_jobs=1, progress_bar=False)
    assert len(nuclei) == expected
    assert nuclei.ids.tolist() == list(range(1, expected + 1))


@pytest.mark.parametrize("block_px", [64, 100])
def test_a_segmenter_that_is_never_sure_loses_and_doubles_nothing(block_px: int) -> None:
    """As networks do, it sees every nucleus up to 2 px elsewhere from each block."""
    shape = (400, 400)
    centres = lattice(shape, 19, jitter=1, seed=5)

    def backend(block) -> np.ndarray:
        rng = np.random.default_rng([block.y, block.x])
        moved = (centres + rng.uniform(-2, 2, centres.shape)).round().astype(int)
        return looks_different(block, [(y - 8, x - 8, y + 8, x + 8) for x, y in moved.tolist()])

    image = np.full((*shape, 3), 255, np.uint8)
    nuclei = segment_slide(
        slide_of(image), backend, mpp=0.5, halo_px=64, block_px=block_px, n_jobs=2, progress_bar=False
    )
    assert len(nuclei) == len(centres)
    assert (np.abs(nuclei.centroids()[:, None] - centres).max(axis=2).min(axis=1) < 3).all()
    assert nuclei.ids.tolist() == list(range(1, len(centres) + 1))
