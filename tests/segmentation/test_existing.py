from __future__ import annotations

import numpy as np
import pytest
import shapely
from shapely import MultiPolygon, Point, Polygon, box

from hespotex.errors import DataValueError, HespotexWarning
from hespotex.image.stream import working_grid
from hespotex.segmentation._fill import edges_of, pixel_boxes, sum_pixels
from hespotex.segmentation._nuclei import Nuclei
from hespotex.segmentation._outline import FEATURES, measure_regions
from hespotex.segmentation._raster import rasterise
from hespotex.segmentation.existing import check_outlines, iter_given
from hespotex.segmentation.geojson import GivenOutlines

from ._scenes import discs, lattice, slide_of

SHAPE = (300, 380)


def given(shapes, ids=None) -> GivenOutlines:
    geometries = np.empty(len(shapes), dtype=object)
    geometries[:] = shapes
    return GivenOutlines(geometries, np.arange(1, len(shapes) + 1) if ids is None else np.asarray(ids))


def measured(outlines: GivenOutlines, image: np.ndarray, *, mpp: float = 0.5, at: float = 0.5, **options) -> Nuclei:
    slide = slide_of(image, mpp)
    return Nuclei.concatenate(
        list(iter_given(outlines, slide, mpp=at, progress_bar=False, **options)), working_grid(slide, at)
    )


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray, GivenOutlines]:
    centres = lattice(SHAPE, 24, seed=3)
    image, truth = discs(SHAPE, centres, radius=8, seed=1)
    return image, truth, given([Point(*centre).buffer(8, 64) for centre in centres])


@pytest.mark.parametrize("block_px", [64, 1024])
def test_pixels_under_discs_are_those_of_their_label_image(scene, block_px: int) -> None:
    image, truth, outlines = scene
    nuclei = measured(outlines, image, block_px=block_px, n_jobs=2)
    regions = measure_regions(truth, image, 0.5)
    order = np.argsort(nuclei.ids)
    assert nuclei.ids[order].tolist() == regions.names.tolist()
    stain = [FEATURES.index(name) for name in ("mean_haematoxylin", "std_haematoxylin")]
    np.testing.assert_allclose(nuclei.regions.features[order][:, stain], regions.features[:, stain], rtol=0.02)
    np.testing.assert_allclose(nuclei.regions.features[:, 0], np.pi * 16, rtol=1e-3)
    drawn = rasterise(nuclei)[:]
    assert (drawn != truth).mean() < 0.002
    assert (np.diff(np.floor(nuclei.regions.centroids[:, 1])) >= 0).all()


def test_blocks_and_threads_change_nothing(scene) -> None:
    image, _, outlines = scene
    one, other = measured(outlines, image, block_px=50, n_jobs=3), measured(outlines, image, n_jobs=1)
    assert one.ids.tolist() == other.ids.tolist()
    np.testing.assert_allclose(one.regions.features, other.regions.features, rtol=1e-5)
    assert np.array_equal(rasterise(one)[:], rasterise(other)[:])


def test_holes_and_pieces_and_specks_are_measured_as_they_are() -> None:
    image = np.full((60, 60, 3), 230, np.uint8)
    image[20:30, 20:30] = 60
    ring = box(10, 10, 40, 40).difference(box(20, 20, 30, 30))
    two = shapely.MultiPolygon([box(45, 0, 50, 5), box(50, 10, 55, 15)])
    speck = box(24.6, 24.6, 24.9, 24.9)  # holds the middle of no pixel
    nuclei = measured(given([ring, two, box(20, 20, 30, 30), speck]), image, block_px=23)
    rows = {name: row for row, name in enumerate(nuclei.ids.tolist())}
    dye = nuclei.regions.features[:, FEATURES.index("mean_haematoxylin")]
    spread = nuclei.regions.features[:, FEATURES.index("std_haematoxylin")]
    assert dye[rows[3]] == dye[rows[4]] > 2 * dye[rows[1]]
    assert dye[rows[1]] == dye[rows[2]]
    assert spread.max() < 1e-3
    drawn = rasterise(nuclei)[:]
    assert [(drawn == name).sum() for name in (1, 2, 3, 4)] == [800, 50, 99, 1]
    assert nuclei.given[rows[1]].equals(ring)


def test_a_coarser_grid_draws_them_coarser(scene) -> None:
    image, _, outlines = scene
    nuclei = measured(outlines, image, mpp=0.25, at=0.5)
    assert nuclei.grid.shape == (150, 190)
    np.testing.assert_allclose(nuclei.regions.features[:, 0], np.pi * 4, rtol=1e-3)
    np.testing.assert_allclose(shapely.area(nuclei.outlines()), np.pi * 64, rtol=1e-3)
    assert abs((rasterise(nuclei)[:] > 0).sum() / (np.pi * 16 * len(nuclei)) - 1) < 0.02


def test_sums_are_those_of_a_mask() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((40, 50)).astype(np.float32)
    polygons = np.array(
        [Point(*xy).buffer(r) for xy, r in zip(rng.uniform(-2, 52, (30, 2)), rng.uniform(1, 9, 30), strict=True)]
    )
    nobody = np.full((30, 2), -1)
    sums = sum_pixels(*edges_of(polygons), pixel_boxes(polygons, values.shape), nobody, values, 0, 0)
    y, x = np.mgrid[:40, :50] + 0.5
    for polygon, (count, total, squares) in zip(polygons, sums, strict=True):
        inside = shapely.contains_xy(polygon, x, y)
        assert count == inside.sum()
        np.testing.assert_allclose([total, squares], [values[inside].sum(), (values[inside] ** 2).sum()], rtol=1e-5)


def test_broken_empty_and_far_outlines_are_counted_in_one_warning() -> None:
    slide = slide_of(np.full((100, 100, 3), 200, np.uint8))
    bow = Polygon([(10, 10), (20, 20), (20, 10), (10, 20)])
    line = Polygon([(1, 1), (2, 2), (1, 1)])
    shapes = [bow, line, Point(500, 5).buffer(3), box(40, 40, 50, 50), None, Point(3, 3), Point(-1, 50).buffer(4)]
    with pytest.warns(HespotexWarning, match=r"of 7 outlines of 'x' 1 crossed .* 3 enclose nothing .* 2 lie beyond"):
        found = check_outlines(given(shapes, list("abcdefg")), slide, "'x'")
    assert found.ids.tolist() == ["a", "d"]
    assert shapely.is_valid(found.geometries).all()
    assert found.geometries[0].area == 50
    assert found.geometries[1].equals_exact(shapes[3], 0)


def test_ids_have_to_be_unique_and_something_has_to_remain() -> None:
    slide = slide_of(np.full((100, 100, 3), 200, np.uint8))
    with pytest.raises(DataValueError, match=r"more than once.*'b'"):
        check_outlines(given([box(0, 0, 9, 9)] * 3, ["a", "b", "b"]), slide, "'x'")
    with pytest.raises(DataValueError, match="none of the 1 outlines.*beyond"):
        check_outlines(given([box(500, 500, 509, 509)]), slide, "'x'")


def test_an_outline_around_everything_costs_no_more_than_the_image() -> None:
    """Somebody drew a frame, or units are wrong: what lies beyond the image is not drawn."""
    image = np.full((60, 80, 3), 200, np.uint8)
    outlines = given([box(-1e9, -1e9, 1e9, 1e9), box(70, 50, 100, 100), box(1e300, 1e300, 1e301, 1e301)])
    with pytest.warns(HespotexWarning, match="2 lie beyond"):
        checked = check_outlines(outlines, slide_of(image), "frame")
    nuclei = measured(checked, image)
    assert nuclei.regions.boxes.tolist() == [[0, 0, 60, 80]]
    assert (rasterise(nuclei)[:] == 1).all()


def test_empty_geometries_are_left_out() -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    outlines = given([Polygon(), MultiPolygon(), None, Point(3, 4), box(10, 10, 20, 20)])
    with pytest.warns(HespotexWarning, match="4 enclose nothing"):
        checked = check_outlines(outlines, slide_of(image), "some")
    assert checked.ids.tolist() == [5]


@pytest.mark.parametrize("at", [(10.0, 10.0), (80.0, 60.0), (79.999999, 0.000001)])
def test_specks_have_one_pixel_of_the_image(at: tuple[float, float]) -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    x, y = at
    sign = 1 if y < 1 else -1
    speck = Polygon([(x, y), (x - 1e-9, y), (x, y + sign * 1e-9)])
    nuclei = measured(check_outlines(given([speck]), slide_of(image), "specks"), image)
    assert (rasterise(nuclei)[:] == 1).sum() == 1
