from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy import ndimage
from skimage.measure import find_contours, regionprops

from hespotex.errors import DataValueError
from hespotex.image.color import haematoxylin
from hespotex.segmentation._outline import FEATURES, measure_regions, simplify_outlines

from ._scenes import discs, lattice


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    """Ragged regions that touch each other, the border and themselves at corners; some have holes."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(90, 110)), 1.5)
    labels = ndimage.label(noise > 0)[0]
    labels[:, 55:][labels[:, 55:] > 0] += labels.max()
    return labels


def regions_of(labels: np.ndarray, **options):
    image = np.random.default_rng(1).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    return measure_regions(labels, image, 0.5, **options), image


def test_outlines_are_those_of_marching_squares(blobs: np.ndarray) -> None:
    regions, _ = regions_of(blobs, simplify_um=0)
    for name, polygon in zip(regions.names, regions.polygons, strict=True):
        contours = find_contours(np.pad(blobs == name, 1).astype(float), 0.5)
        outer = max(contours, key=lambda ring: shapely.Polygon(ring).area)[:, ::-1] - 0.5
        assert shapely.Polygon(outer).normalize().equals_exact(polygon.normalize(), 1e-9)


def test_measures_are_those_of_scikit_image(blobs: np.ndarray) -> None:
    regions, image = regions_of(blobs, simplify_um=0)
    values = dict(zip(FEATURES, regions.features.T, strict=True))
    dot = regionprops(np.ones((1, 1), int))[0].axis_major_length
    within = 1 / 12 - (dot / 4) ** 2  # of one pixel, where scikit-image leaves it out
    for row, expected in enumerate(regionprops(blobs)):
        y0, x0, y1, x1 = regions.boxes[row]
        assert (y0, x0, y1, x1) == expected.bbox
        assert np.array_equal(regions.masks[row], expected.image)
        assert regions.centroids[row] == pytest.approx(np.array(expected.centroid)[::-1] + 0.5)
        assert values["area_um2"][row] == pytest.approx(expected.area * 0.25)
        variance = (expected.axis_major_length / 4) ** 2
        assert values["major_axis_um"][row] == pytest.approx(2 * np.sqrt(variance + within), rel=1e-4)
        polygon = regions.polygons[row]
        assert values["perimeter_um"][row] == pytest.approx(polygon.length / 2, rel=1e-5)
        assert values["solidity"][row] == pytest.approx(polygon.area / polygon.convex_hull.area, rel=1e-5)
        assert values["circularity"][row] == pytest.approx(4 * np.pi * polygon.area / polygon.length**2, rel=1e-5)
    dye = haematoxylin(image)
    inside = [dye[blobs == name].astype(float) for name in regions.names]
    np.testing.assert_allclose(values["mean_haematoxylin"], [part.mean() for part in inside], rtol=1e-4)
    np.testing.assert_allclose(values["std_haematoxylin"], [part.std() for part in inside], rtol=1e-3, atol=1e-6)


def test_of_pieces_the_longest_and_holes_are_closed() -> None:
    labels = np.zeros((20, 30), np.int32)
    labels[2:9, 2:9] = 1
    labels[4:6, 4:6] = 0
    labels[9:12, 9:12] = 1  # touches at a corner only
    regions, _ = regions_of(labels, simplify_um=0)
    assert regions.polygons[0].bounds == (2, 2, 9, 9)
    assert not regions.polygons[0].interiors
    assert regions.masks[0].sum() == 49 - 4 + 9


def test_regions_outside_the_core_are_left_out_and_places_are_moved(blobs: np.ndarray) -> None:
    whole, _ = regions_of(blobs)
    part, _ = regions_of(blobs, keep=(slice(20, 60), slice(0, 110)), origin=(1000, 5000))
    inside = (whole.centroids[:, 1] >= 20) & (whole.centroids[:, 1] < 60)
    assert 0 < inside.sum() < len(whole)
    assert np.array_equal(part.names, whole.names[inside])
    assert np.array_equal(part.boxes, whole.boxes[inside] + [1000, 5000, 1000, 5000])
    assert np.array_equal(part.features, whole.features[inside])
    moved = shapely.transform(part.polygons, lambda xy: xy - [5000, 1000])
    assert shapely.equals_exact(moved, whole.polygons[inside], 1e-9).all()


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint64])
def test_names_may_be_any_whole_numbers(dtype: type) -> None:
    labels = np.zeros((12, 12), dtype)
    labels[1:4, 1:4], labels[6:9, 6:9] = 60000, 7
    regions, _ = regions_of(labels)
    assert regions.names.tolist() == [7, 60000]
    assert regions.centroids.tolist() == [[7.5, 7.5], [2.5, 2.5]]


def test_an_image_without_regions_has_none() -> None:
    regions, _ = regions_of(np.zeros((5, 6), np.int32))
    assert len(regions) == 0
    assert regions.features.shape == (0, len(FEATURES))
    assert regions.boxes.shape == (0, 4)


def test_simplified_outlines_have_few_vertices_and_the_same_area() -> None:
    image, labels = discs((300, 300), lattice((300, 300), 32), 8)
    full, simple = (measure_regions(labels, image, 0.5, simplify_um=um) for um in (0, 0.25))
    assert np.array_equal(full.features, simple.features)
    n_full, n_simple = (shapely.get_num_coordinates(regions.polygons).sum() for regions in (full, simple))
    assert n_simple < 0.4 * n_full
    change = shapely.area(simple.polygons) / shapely.area(full.polygons) - 1
    assert np.abs(change).max() <= 0.02
    assert shapely.is_valid(simple.polygons).all()
    assert shapely.hausdorff_distance(full.polygons, simple.polygons).max() <= 0.75


def test_a_wide_tolerance_counts_as_half_a_pixel(blobs: np.ndarray) -> None:
    half, wide = (regions_of(blobs, simplify_um=um)[0].polygons for um in (0.25, 10.0))
    assert shapely.equals_exact(half, wide, 0).all()


def test_tiny_outlines_survive_simplification() -> None:
    labels = np.diag(np.arange(1, 8))
    regions, _ = regions_of(labels)
    assert (shapely.area(regions.polygons) > 0).all()
    assert shapely.is_valid(regions.polygons).all()
    ring = shapely.box(0, 0, 0.3, 0.3)
    assert simplify_outlines(np.array([ring]), 0.5)[0].equals(ring)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_named(tolerance: float) -> None:
    with pytest.raises(DataValueError, match="simplify_um"):
        regions_of(np.eye(4, dtype=int), simplify_um=tolerance)
