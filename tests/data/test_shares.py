"""Overlaps of discs, polygons and points."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy import sparse

from hespotex.data.shares import aggregate, disc_overlaps, disc_shares, inside_shares, polygon_shares, reconcile
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


def test_a_point_on_the_border_of_two_regions_counts_once():
    regions = np.array([shapely.box(0, 0, 10, 10), shapely.box(10, 0, 20, 10), shapely.box(5, 0, 20, 10)])
    points = np.array([[10.0, 5.0], [10.0, 10.0], [0.0, 0.0], [15.0, 5.0], [30.0, 5.0]])
    share = inside_shares(regions[:2], points).toarray()
    np.testing.assert_array_equal(share, [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    # Regions that overlap still each hold what lies inside them.
    assert inside_shares(regions, points).toarray()[:, 3].tolist() == [0, 1, 1]


def test_regions_drawn_across_themselves_are_mended():
    knot = np.array([shapely.Polygon([(0, 0), (16, 16), (16, 0), (0, 16)])])
    assert polygon_shares(knot, grid(2), 64.0).sum() == pytest.approx(2 * 64 / 64)
    assert inside_shares(knot, np.array([[1.0, 8.0], [8.0, 1.0]])).toarray().tolist() == [[1, 0]]


def test_sums_are_conserved_over_a_partition():
    values = np.random.default_rng(1).normal(size=(400, 3))
    halves = np.array([shapely.box(0, 0, 77.3, 160), shapely.box(77.3, 0, 160, 160)])
    total = aggregate(polygon_shares(halves, grid(20), 64.0), values)
    np.testing.assert_allclose(total.sum(axis=0), values.sum(axis=0))


def test_many_genes_are_summed_without_a_copy_of_all_of_them():
    import tracemalloc

    values = np.random.default_rng(0).normal(size=(20_000, 500)).astype(np.float32)
    share = sparse.csr_array((np.full(20_000, 0.5), (np.arange(20_000) % 10, np.arange(20_000))), shape=(10, 20_000))
    tracemalloc.start()
    total = aggregate(share, values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes
    np.testing.assert_allclose(total, share.toarray() @ values.astype(float), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(aggregate(share, sparse.csr_array(values[:, :3])), total[:, :3], atol=1e-9)


def test_an_observation_without_parts_has_sum_0_and_no_mean():
    share = sparse.csr_array((2, 3))
    assert aggregate(share, np.ones((3, 1))).tolist() == [[0.0], [0.0]]
    assert np.isnan(aggregate(share, np.ones((3, 1)), "mean")).all()


def test_wrong_sizes_and_words_are_refused():
    with pytest.raises(DataValueError, match="3 parts, values has 2 rows"):
        aggregate(sparse.csr_array((2, 3)), np.ones((2, 1)))
    with pytest.raises(DataValueError, match="how='median'"):
        aggregate(sparse.csr_array((2, 3)), np.ones((3, 1)), "median")


def random_shares(n=12, m=60, seed=0):
    """Each part under one observation at most, as with spots apart from each other."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(-3, n, size=m)
    under = np.flatnonzero(owner >= 0)
    return sparse.csr_array((rng.uniform(0.1, 1, len(under)), (owner[under], under)), shape=(n, m))


def test_reconciled_parts_add_up_and_keep_their_proportions():
    share = random_shares()
    rng = np.random.default_rng(1)
    expected, counts = rng.gamma(1.0, size=(60, 4)), rng.poisson(5, size=(12, 4))
    found = reconcile(share, expected, sparse.csr_array(counts))
    np.testing.assert_allclose(aggregate(share, found), counts, atol=1e-9)
    under = share[[0]].indices
    factor = found[under] / expected[under]
    np.testing.assert_allclose(factor, np.broadcast_to(factor[0], factor.shape))
    apart = np.asarray(share.sum(axis=0)) == 0
    overall = counts.sum(axis=0) / aggregate(share, expected).sum(axis=0)
    np.testing.assert_allclose(found[apart], expected[apart] * overall)


def test_reconciling_again_changes_nothing():
    share = random_shares()
    rng = np.random.default_rng(2)
    counts = rng.poisson(5, size=(12, 2))
    once = reconcile(share, rng.gamma(1.0, size=(60, 2)), counts)
    np.testing.assert_allclose(reconcile(share, once, counts), once, atol=1e-9)


def test_overlapping_observations_are_met_where_a_map_exists():
    rng = np.random.default_rng(3)
    share = sparse.csr_array(np.array([[1.0, 1, 0.5, 0], [0, 0, 0.5, 1.0]]))
    counts = share @ rng.gamma(1.0, size=(4, 3))
    np.testing.assert_allclose(share @ reconcile(share, np.ones((4, 3)), counts), counts, rtol=1e-5)


def test_sums_that_contradict_each_other_keep_their_total():
    share = sparse.csr_array(np.array([[1.0, 1.0], [1.0, 1.0]]))  # the same parts, counted twice
    found = reconcile(share, np.array([[1.0], [3.0]]), np.array([[4.0], [8.0]]))
    assert found.ravel().tolist() == pytest.approx([1.5, 4.5])


def test_where_nothing_was_expected_counts_go_by_the_shares():
    share = sparse.csr_array(np.array([[1.0, 0.5], [0.0, 0.0]]))
    found = reconcile(share, np.zeros((2, 1)), np.array([[6.0], [4.0]]))
    assert found.ravel().tolist() == pytest.approx([4, 4])


def test_what_cannot_be_reconciled_is_refused():
    share = sparse.csr_array(np.eye(2))
    with pytest.raises(DataValueError, match="counts has shape"):
        reconcile(share, np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(DataValueError, match="negative or not finite"):
        reconcile(share, -np.ones((2, 1)), np.ones((2, 1)))
