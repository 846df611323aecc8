"""Overlaps of discs, polygons and points."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy import sparse

from hespotex.data.shares import aggregate, disc_overlaps, disc_shares, inside_shares, polygon_shares
from hespotex.errors import DataValueError


def grid(side, size=8.0):
    row, column = np.divmod(np.arange(side * side), side)
    return shapely.box(column * size, row * size, (column + 1) * size, (row + 1) * size)


def test_a_disc_within_the_grid_is_covered_whole():
    share = disc_shares(np.array([[83.0, 77.7], [60.0, 90.0]]), 27.5, grid(20), 64.0)
    np.testing.assert_allclose(share.sum(axis=1), np.pi * 27.5**2 / 64, rtol=1e-12)
    assert share.max() <= 1 + 1e-12


def test_overlaps_match_a_fine_polygon_for_any_shape():
    rng = np.random.default_rng(0)
    star = shapely.Polygon([(0, 0), (10, 2), (4, 5), (9, 12), (1, 7)], holes=[[(2, 2), (4, 3), (3, 5)]])
    pair = shapely.MultiPolygon([shapely.box(0, 0, 3, 3), shapely.box(6, 6, 11, 9)])
    for shape in (star, star.reverse(), pair, shapely.box(2, 2, 5, 9)):
        centres = rng.uniform(-2, 12, size=(40, 2))
        radius = rng.uniform(0.5, 8, size=40)
        discs = shapely.buffer(shapely.points(centres), radius, quad_segs=2000)
        expected = shapely.area(shapely.intersection(discs, shape))
        np.testing.assert_allclose(disc_overlaps(centres, radius, np.repeat(shape, 40)), expected, atol=2e-4)


def test_what_the_border_cuts_off_counts_nothing():
    tissue = shapely.box(0, 0, 100, 50)
    cells = shapely.intersection(grid(20), tissue)
    share = disc_shares(np.array([[50.0, 50.0]]), 20.0, cells, 64.0)
    assert share.sum() * 64 == pytest.approx(np.pi * 400 / 2)


def test_turning_everything_leaves_the_shares():
    centres = np.array([[33.0, 41.0], [90.0, 70.0]])
    share = disc_shares(centres, 27.5, grid(20), 64.0)
    turned = shapely.transform(grid(20), lambda xy: np.column_stack([-xy[:, 1], xy[:, 0]]))
    again = disc_shares(np.column_stack([-centres[:, 1], centres[:, 0]]), 27.5, turned, 64.0)
    np.testing.assert_allclose(share.toarray(), again.toarray(), atol=1e-12)


def test_polygons_and_points():
    region = np.array([shapely.box(4, 0, 20, 8)])
    np.testing.assert_allclose(polygon_shares(region, grid(3), 64.0).toarray()[0], [0.5, 1, 0.5, 0, 0, 0, 0, 0, 0])
    points = np.array([[5.0, 5.0], [30.0, 5.0]])
    np.testing.assert_array_equal(inside_shares(region, points).toarray(), [[1, 0]])


def test_sums_are_conserved_over_a_partition():
    values = np.random.default_rng(1).normal(size=(400, 3))
    halves = np.array([shapely.box(0, 0, 77.3, 160), shapely.box(77.3, 0, 160, 160)])
    total = aggregate(polygon_shares(halves, grid(20), 64.0), values)
    np.testing.assert_allclose(total.sum(axis=0), values.sum(axis=0))


def test_an_observation_without_parts_has_sum_0_and_no_mean():
    share = sparse.csr_array((2, 3))
    assert aggregate(share, np.ones((3, 1))).tolist() == [[0.0], [0.0]]
    assert np.isnan(aggregate(share, np.ones((3, 1)), "mean")).all()


def test_wrong_sizes_and_words_are_refused():
    with pytest.raises(DataValueError, match="3 parts, values has 2 rows"):
        aggregate(sparse.csr_array((2, 3)), np.ones((2, 1)))
    with pytest.raises(DataValueError, match="how='median'"):
        aggregate(sparse.csr_array((2, 3)), np.ones((3, 1)), "median")
