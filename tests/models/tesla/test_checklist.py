"""TESLA's faithfulness checklist as far as it concerns imputation, against numbers recorded from the published program.

11, 20: ``annotation/test_tesla_bands.py``. 12–16: ``annotation/test_tesla_self_labelling.py``.
17–19: ``annotation/test_tesla_core_edge.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from hespotex.annotation.contours import fill_contour, image_contour, scale_contour
from hespotex.data.section import Parts, Section, Targets
from hespotex.models import create
from hespotex.models._interpolation import find_neighbours, neighbour_weights
from hespotex.models.tesla import TESLA
from hespotex.models.tesla.imputation import channel_weights, distance_quantile, third_axis
from hespotex.models.tesla.model import _Space
from hespotex.models.tesla.published import superpixel_points, window_means, window_side

CASES = ("default", "odd_exp", "nohist", "all_spots", "k1_s2")


def weighting(recorded):
    return "power" if recorded["k_is_int"] else "exponential"


def imputed(recorded):
    """Neighbours, weights and T of a recorded case."""
    superpixels = np.column_stack([recorded["superpixel_xy"], recorded["superpixel_z"]])
    spots = np.column_stack([recorded["spot_xy"], recorded["spot_z"]])
    k = int(recorded["num_nbs"])
    cut = distance_quantile(superpixels, spots, k / len(spots))
    found = find_neighbours(cKDTree(spots), superpixels, k, cut=cut)
    return found, neighbour_weights(found.distance, weighting(recorded), float(recorded["k"])), cut


def paper(recorded, **options):
    switches = {
        "unit": "counts",
        "colour_weight": float(recorded["s"]),
        "neighbours": int(recorded["num_nbs"]),
        "weighting": weighting(recorded),
        "power": float(recorded["k"]),
        "px_um": 1.0,
    }
    return create("tesla", preset="paper", **{**switches, **options})


def section_of(recorded):
    """The recorded section, all of one colour."""
    xy, spots = recorded["superpixel_xy"].astype(float), recorded["spot_xy"].astype(float)
    m, n = len(xy), len(spots)
    share = sparse.csr_array(np.eye(n, m))
    parts = Parts(np.arange(m), xy, share, colour=np.full((m, 3), 0.5), level="superpixel")
    expression = recorded["log_expression_spots"]
    targets = Targets(expression, np.ones(n), tuple(f"g{i}" for i in range(expression.shape[1])), unit="counts")
    return Section("s", np.arange(n).astype(str), np.empty((n, 0)), spots, targets=targets, parts=parts)


def spread(spot, weight, n):
    """Weights by spot, (m, n), from those by neighbour."""
    matrix = np.zeros((len(spot), n))
    for column in range(spot.shape[1]):
        held = spot[:, column] >= 0
        matrix[np.flatnonzero(held), spot[held, column]] = weight[held, column]
    return matrix


def test_paper_preset_has_the_published_settings():
    config = TESLA.preset("paper")
    published = {
        "unit": "log1p_counts",
        "colour_weight": 1.0,
        "colour_scale": "extent",
        "colour_formula": "published",
        "neighbours": 10,
        "weighting": "power",
        "power": 2.0,
        "cut": "quantile",
        "empty": "zero",
    }
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_01_grid_is_the_recorded_one(tesla, tesla_image, case):
    recorded = tesla(f"imputation_{case}")
    enlarged = fill_contour(scale_contour(image_contour(tesla_image), 1.05), tesla_image.shape[:2])
    assert np.array_equal(superpixel_points(enlarged, int(recorded["res"])), recorded["superpixel_xy"])


def test_checklist_01_grid_starts_at_one_step():
    points = superpixel_points(np.ones((21, 31), dtype=bool), 10)
    assert points.tolist() == [[10, 10], [10, 20], [10, 30], [20, 10], [20, 20], [20, 30]]


def test_checklist_02_x_is_the_row_and_y_the_column():
    mask = np.zeros((10, 30), dtype=bool)
    mask[4, 20] = True
    assert superpixel_points(mask, 4).tolist() == [[4, 20]]
    image = np.zeros((10, 30, 3))
    image[4, 20] = 9
    assert window_means(image, np.array([[4, 20]]), 2)[0, 0] == 1.0
    assert window_means(image, np.array([[20, 4]]) % 10, 2)[0, 0] == 0.0


def test_checklist_03_side_of_the_colour_window_and_its_cut_at_borders():
    assert [window_side(res) for res in (50, 49, 25)] == [51, 49, 25]
    image = np.arange(30.0).reshape(5, 6, 1)
    means = window_means(image, np.array([[0, 0], [2, 3], [4, 5]]), 2)[:, 0]
    np.testing.assert_allclose(means, [image[:2, :2].mean(), image[1:4, 2:5].mean(), image[3:, 4:].mean()])


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_03_04_05_colours_and_the_third_axis_are_the_recorded_ones(tesla, tesla_image, case):
    recorded = tesla(f"imputation_{case}")
    res, scale = int(recorded["res"]), float(recorded["Z"])
    superpixels = window_means(tesla_image, recorded["superpixel_xy"], res)
    along = superpixels @ channel_weights(superpixels)
    plain = window_means(tesla_image, recorded["spot_xy"], res).mean(axis=1)
    np.testing.assert_allclose(along, recorded["superpixel_col"], atol=1e-9)
    np.testing.assert_allclose(plain, recorded["spot_col"], atol=1e-9)
    assert scale == pytest.approx(float(recorded["s"]) * recorded["superpixel_xy"].std(axis=0).max())
    np.testing.assert_allclose(third_axis(along, scale), recorded["superpixel_z"], atol=1e-9)
    np.testing.assert_allclose(third_axis(plain, scale), recorded["spot_z"], atol=1e-9)


def test_checklist_04_the_paper_preset_colours_spots_by_their_plain_mean(make_parts):
    section, _ = make_parts(side=15)
    rng = np.random.default_rng(0)
    colour = rng.uniform(size=(section.parts.n_parts, 3)) * [1.0, 0.5, 0.1]
    section = replace(section, parts=replace(section.parts, colour=colour))
    space = create("tesla", preset="paper", unit="counts", px_um=1.0)._space(section)
    scale = section.parts.coordinates.std(axis=0).max()
    variance = colour.var(axis=0)
    along = colour @ (variance / variance.sum())
    np.testing.assert_allclose(space.superpixels[:, 2], (along - along.mean()) / along.std() * scale)
    plain = colour[cdist(section.coordinates, section.parts.coordinates).argmin(axis=1)].mean(axis=1)
    expected = (plain - plain.mean()) / plain.std() * scale
    np.testing.assert_allclose(space.spots[:, 2], expected[space.order])


def test_checklist_05_third_axis_has_mean_0_and_the_spread_asked_for():
    z = third_axis(np.random.default_rng(0).normal(3, 2, size=50), 7.0)
    assert z.mean() == pytest.approx(0)
    assert z.std() == pytest.approx(7.0)


def test_checklist_05_model_spreads_colour_over_the_larger_extent(make_parts):
    section, _ = make_parts(side=15)
    parts = section.parts
    wide = replace(section, parts=replace(parts, coordinates=parts.coordinates * [3.0, 1.0]))
    model = create("tesla", preset="paper", unit="counts", colour_weight=2.0, px_um=1.0)
    z = model._space(wide).superpixels[:, 2]
    assert z.mean() == pytest.approx(0)
    assert z.std() == pytest.approx(2 * wide.parts.coordinates[:, 0].std())


def test_checklist_06_without_histology_it_is_inverse_distance_weighting(make_parts):
    section, _ = make_parts(side=20)
    model = create("tesla", preset="paper", unit="counts", colour_weight=0.0, px_um=1.0, neighbours=25)
    distance = cdist(section.parts.coordinates, section.coordinates) + 0.1
    weight = distance**-2
    expected = weight / weight.sum(axis=1, keepdims=True) @ section.targets[:]
    np.testing.assert_allclose(model.fit([section]).predict(section).mean, expected, rtol=1e-5)


def test_checklist_07_weights():
    distance = np.array([[10.0, 20.0, 30.0]])
    np.testing.assert_allclose(neighbour_weights(distance), [[0.7326, 0.1850, 0.0825]], atol=5e-5)
    np.testing.assert_allclose(neighbour_weights(distance, "exponential"), [[0.6624, 0.2461, 0.0914]], atol=5e-5)
    on_top = neighbour_weights(np.array([[0.0, 9.9, 19.9]]))
    np.testing.assert_allclose(on_top, [[0.999875, 0.99988e-4, 0.24997e-4]], rtol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_07_08_09_neighbours_weights_and_expression_are_the_recorded_ones(tesla, case):
    recorded = tesla(f"imputation_{case}")
    found, weight, cut = imputed(recorded)
    assert cut == pytest.approx(float(recorded["T"]), abs=1e-9)
    clear = ~recorded["rows_with_tie"]
    spot, n = np.where(np.isfinite(found.distance), found.spot, -1), len(recorded["spot_xy"])
    here, there = spread(spot, weight, n), spread(recorded["neighbours"], recorded["weights"], n)
    np.testing.assert_allclose(here[clear], there[clear], atol=1e-9)
    expression = np.einsum("mk,mkg->mg", weight, recorded["log_expression_spots"][found.spot].astype(float))
    np.testing.assert_allclose(expression[clear], recorded["expression"][clear], atol=1e-9)
    assert np.array_equal(np.flatnonzero(np.isinf(found.distance[:, 0])), recorded["no_neighbour"])


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_09_the_model_gives_the_recorded_expression(tesla, case, monkeypatch):
    recorded = tesla(f"imputation_{case}")
    section, model = section_of(recorded), paper(recorded)
    if case != "nohist":  # the colours of the recorded spots are not those of any superpixel
        order = np.arange(section.n_obs)
        spots = np.column_stack([recorded["spot_xy"], recorded["spot_z"]])
        superpixels = np.column_stack([recorded["superpixel_xy"], recorded["superpixel_z"]])
        monkeypatch.setattr(model, "_space", lambda _: _Space(spots, order, superpixels))
    made = model.fit([section]).predict(section, block_rows=64)
    clear = ~recorded["rows_with_tie"]
    np.testing.assert_allclose(made.mean[clear], recorded["expression"][clear], atol=2e-6)
    assert not made.mean[recorded["no_neighbour"]].any()


def test_checklist_08_weights_sum_to_1_and_values_stay_among_those_of_the_spots(make_parts):
    rng = np.random.default_rng(0)
    distance = rng.uniform(1, 9, size=(50, 6))
    distance[rng.uniform(size=distance.shape) < 0.3] = np.inf
    distance[0] = np.inf
    for name in ("power", "exponential"):
        weight = neighbour_weights(distance, name)
        np.testing.assert_allclose(weight[1:].sum(axis=1), 1)
        assert not weight[0].any()
        assert not weight[np.isinf(distance)].any()
    section, _ = make_parts()
    measured = section.targets[:]
    mean = create("tesla").fit([section]).predict(section).mean
    assert (mean >= measured.min(axis=0) - 1e-4).all()
    assert (mean <= measured.max(axis=0) + 1e-4).all()


def test_checklist_08_superpixels_without_neighbour_are_0(make_parts):
    section, _ = make_parts()
    model = create("tesla", preset="paper", unit="counts", px_um=1.0, neighbours=2).fit([section])
    space = model._space(section)
    cut = distance_quantile(space.superpixels, space.spots, 2 / section.n_obs)
    empty = cdist(space.superpixels, space.spots).min(axis=1) > cut
    assert 0 < empty.sum() < len(empty)
    mean = model.predict(section).mean
    assert not mean[empty].any()
    assert mean[~empty].any(axis=1).all()


@pytest.mark.parametrize("quantile", [0.0, 0.01, 0.25, 0.5, 0.999, 1.0])
def test_checklist_09_the_tree_equals_brute_force(quantile, monkeypatch):
    from hespotex.models.tesla import imputation

    monkeypatch.setattr(imputation, "_PAIRS_AT_ONCE", 500)  # many blocks
    rng = np.random.default_rng(0)
    points, spots = rng.normal(size=(400, 3)) * 50, rng.normal(size=(40, 3)) * 50
    distance = cdist(points, spots)
    cut = distance_quantile(points, spots, quantile)
    assert cut == pytest.approx(np.quantile(distance, quantile), abs=1e-9)
    found = find_neighbours(cKDTree(spots), points, 7, cut=cut)
    nearest = np.argsort(distance, axis=1)[:, :7]
    assert np.array_equal(found.spot, nearest)
    expected = np.take_along_axis(distance, nearest, axis=1)
    kept = expected <= np.quantile(distance, quantile) * (1 + 1e-12)
    assert np.array_equal(np.isfinite(found.distance), kept)
    np.testing.assert_allclose(found.distance[kept], expected[kept], atol=1e-9)


def test_checklist_09_quantile_of_many_equal_distances():
    points, spots = np.zeros((300, 2)), np.tile([[3.0, 4.0]], (7, 1))
    assert distance_quantile(points, spots, 0.3) == 5.0


def test_checklist_10_with_all_spots_as_neighbours_none_is_dropped():
    rng = np.random.default_rng(0)
    points, spots = rng.normal(size=(200, 3)), rng.normal(size=(12, 3))
    cut = distance_quantile(points, spots, 1.0)
    assert cut == pytest.approx(cdist(points, spots).max())
    assert np.isfinite(find_neighbours(cKDTree(spots), points, 12, cut=cut).distance).all()
