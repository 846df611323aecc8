"""Contours against those recorded from the published program, which draws with OpenCV."""

from __future__ import annotations

import numpy as np
import pytest

from hespotex.annotation.contours import (
    contour_area,
    contour_centre,
    edges,
    fill_contour,
    follow_borders,
    image_contour,
    leading_edge,
    mask_contours,
    scale_contour,
    spot_contour,
)
from hespotex.errors import DataValueError

SQUARE = np.array([[2, 3], [2, 8], [11, 8], [11, 3]])


@pytest.mark.data
def test_contour_of_the_image_is_the_recorded_one(tesla, tesla_image):
    recorded = tesla("contour")
    contour = image_contour(tesla_image)
    assert np.array_equal(contour, recorded["contour_image"][:, 0])
    assert np.array_equal(contour, recorded["contour_used"][:, 0])
    enlarged = scale_contour(contour, 1.05)
    assert np.array_equal(enlarged, recorded["contour_enlarged"][:, 0])
    assert np.array_equal(enlarged, recorded["contour_cut"][:, 0])  # it lies within the image
    assert np.array_equal(scale_contour(contour, 0.8), recorded["contour_shrunk"][:, 0])
    assert np.array_equal(fill_contour(contour, tesla_image.shape[:2]), recorded["binary"] > 0)
    assert np.array_equal(fill_contour(enlarged, tesla_image.shape[:2]), recorded["binary_enlarged"] > 0)


@pytest.mark.data
@pytest.mark.parametrize("lattice", ["hexagon", "square"])
def test_contours_of_the_spots_are_the_recorded_ones(tesla, lattice):
    recorded = tesla("contour")
    array_row, array_column, row, column = recorded["spots"].T
    by_row = spot_contour(array_row, row, column, axis="row", lattice=lattice)
    by_column = spot_contour(array_column, column, row, axis="column", lattice=lattice)
    assert np.array_equal(by_row, recorded[f"contour_scan_x_{lattice}"][:, 0])
    assert np.array_equal(by_column, recorded[f"contour_scan_y_{lattice}"][:, 0])


@pytest.mark.data
def test_leading_edge_is_the_recorded_one(tesla):
    recorded = tesla("core_edge")
    drawn = leading_edge(recorded["labels"], recorded["targets"])
    assert np.array_equal(drawn, (recorded["leading_edge_bgr"] == 0).all(axis=-1))


def test_small_outlines_are_not_drawn():
    labels = np.zeros((80, 80), dtype=int)
    labels[10:20, 10:20] = 1
    assert not leading_edge(labels, np.array([1])).any()
    assert leading_edge(labels, np.array([1]), min_area=20).any()


def test_area_centre_and_scaling():
    assert contour_area(SQUARE) == 45
    assert contour_centre(SQUARE) == (6, 5)
    assert scale_contour(SQUARE, 2.0).tolist() == [[-2, 1], [-2, 11], [16, 11], [16, 1]]


def test_contour_without_area_has_no_centre():
    with pytest.raises(DataValueError, match="no area"):
        contour_centre(np.array([[1, 1], [2, 2], [3, 3]]))


def test_borders_of_a_ring_with_a_hole_and_of_a_pixel():
    mask = np.zeros((9, 12), dtype=bool)
    mask[1:8, 1:8], mask[3:6, 3:6], mask[4, 10] = True, False, True
    by_size = sorted(follow_borders(mask), key=len)
    assert [len(c) for c in by_size] == [1, 12, 24]
    assert by_size[0].tolist() == [[10, 4]]
    assert contour_area(by_size[2]) == 36
    assert np.array_equal(fill_contour(by_size[2], mask.shape)[1:8, 1:8], np.ones((7, 7), dtype=bool))
    assert mask[by_size[1][:, 1], by_size[1][:, 0]].all()


def test_following_a_random_mask_visits_the_border_pixels_of_each_piece():
    from scipy import ndimage

    mask = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 50)), 1.5) > 0.05
    visited = np.zeros_like(mask)
    for contour in follow_borders(mask):
        step = np.abs(np.diff(np.vstack([contour, contour[:1]]), axis=0)).max(axis=1)
        assert (step <= 1).all()
        visited[contour[:, 1], contour[:, 0]] = True
    assert np.array_equal(visited, mask & ~ndimage.binary_erosion(mask))


def test_edges_of_a_step_lie_along_it():
    grey = np.zeros((20, 20), dtype=np.uint8)
    grey[:, 10:] = 200
    assert set(np.nonzero(edges(grey))[1]) <= {9, 10}
    assert edges(grey)[:, 9:11].any(axis=1).all()


def test_an_even_image_has_no_contour():
    with pytest.raises(DataValueError, match="nothing stands out"):
        image_contour(np.full((20, 20, 3), 200, dtype=np.uint8))


def test_spots_on_one_line_have_no_contour():
    with pytest.raises(DataValueError, match="one line"):
        spot_contour(np.zeros(4), np.zeros(4), np.arange(4.0), axis="row")


def test_checklist_01_shrinking_and_enlarging_cut_to_whole_pixels():
    enlarged = scale_contour(SQUARE, 1.05)
    assert enlarged.dtype.kind == "i"
    assert enlarged.tolist() == [[1, 2], [1, 8], [11, 8], [11, 2]]


def test_contours_of_a_mask_run_on_both_sides_of_its_edge():
    mask = np.zeros((60, 60), dtype=bool)
    mask[20:40, 20:40] = True
    contours = mask_contours(mask)
    assert len(contours) == 2
    np.testing.assert_allclose([contour_area(contour) for contour in contours], 20 * 20, rtol=0.05)
