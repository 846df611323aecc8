"""Core and edge, and the scores of lymphoid structures, against numbers recorded from the published program.

Statements 17, 18 and 19 of its checklist.
"""

from __future__ import annotations

import numpy as np
import pytest

from hespotex.annotation.core_edge import core_edge, passes_published_filter, published_core_edge
from hespotex.annotation.tls import cluster_score, tls_score
from hespotex.errors import DataValueError


def recorded_tumour(tesla):
    recorded, imputed, contour = tesla("core_edge"), tesla("imputation_default"), tesla("contour")
    points, scale = imputed["superpixel_xy"], float(recorded["resize_factor"])
    row, column = (points * scale).astype(int).T
    target = np.isin(recorded["labels"][row, column], recorded["targets"]) & (contour["binary"][tuple(points.T)] > 0)
    return recorded, points, target


@pytest.mark.data
def test_checklist_17_published_core_and_edge_are_the_recorded_ones(tesla):
    recorded, points, target = recorded_tumour(tesla)
    made = published_core_edge(points, target, int(recorded["res"]), recorded["binary_tumor"].shape)
    assert np.array_equal(made.kept, recorded["kept_superpixel"])
    assert np.array_equal(made.is_core, recorded["is_core"])
    assert np.array_equal(made.tumour, recorded["binary_tumor"] > 0)
    assert np.array_equal(made.core, recorded["binary_core"] > 0)


def test_checklist_17_the_published_tumour_is_its_largest_piece_less_what_hangs_by_one_side():
    points = np.stack(np.meshgrid(np.arange(1, 13), np.arange(1, 13), indexing="ij"), axis=-1).reshape(-1, 2) * 5
    row, column = points.T // 5
    block = (row <= 7) & (column <= 7)
    tail = (row == 8) & (column == 3)
    other = (row >= 10) & (column >= 10)
    made = published_core_edge(points, block | tail | other, 5, (80, 80))
    assert np.array_equal(np.sort(made.kept), np.flatnonzero(block))
    core = made.kept[made.is_core]
    assert 0 < len(core) < len(made.kept)
    assert (made.core & ~made.tumour).sum() == 0
    places = {(int(r), int(c)) for r, c in points[core] // 5}
    # Cutting to whole pixels moves the shrunken contour by up to one towards the origin.
    assert places == {(r, c) for r in range(1, 7) for c in range(1, 7)}


@pytest.mark.data
@pytest.mark.parametrize("region", ["core", "edge"])
def test_checklist_19_filter_keeps_the_recorded_genes(tesla, region):
    recorded = tesla("core_edge")
    table = dict(zip(recorded["de_columns"], recorded[f"de_{region}_table"].T, strict=True))
    passed = passes_published_filter(
        in_fraction=table["in_group_fraction"],
        out_fraction=table["out_group_fraction"],
        fold_change=table["fold_change"],
        mean=table["all_mean_exp"],
        p_adjusted=table["pvals_adj"],
    )
    expected = np.isin(recorded[f"de_{region}_gene"], recorded[f"de_{region}_filtered_gene"])
    assert np.array_equal(passed, expected)


def test_checklist_19_thresholds_of_the_filter():
    passing = {"in_fraction": 0.6, "out_fraction": 0.6, "fold_change": 1.21, "mean": 0.11, "p_adjusted": 0.049}

    def passes(**changed):
        return bool(
            passes_published_filter(**{key: np.array([value]) for key, value in {**passing, **changed}.items()})[0]
        )

    assert passes()
    assert passes(out_fraction=0.0)
    failing = {"in_fraction": 0.5, "out_fraction": 0.61, "fold_change": 1.2, "mean": 0.1, "p_adjusted": 0.05}
    assert not any(passes(**{name: value}) for name, value in failing.items())


def square_grid(side):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)


def test_every_piece_has_a_core_and_an_edge_of_the_width_asked_for():
    grid = square_grid(30)
    row, column = grid.T
    large = (row < 15) & (column < 15)
    small = (row >= 20) & (column >= 20)
    made = core_edge(grid, large | small, 10.0, depth_um=30.0)
    assert (made.component[large] == 0).all()
    assert (made.component[small] == 1).all()
    assert (made.component[~(large | small)] == -1).all()
    assert made.is_core[small].any()
    # Three rows from the border have their centres 5, 15 and 25 µm inside.
    ring = np.minimum.reduce([row, column, 14 - row, 14 - column])
    assert np.array_equal(made.is_core[large], ring[large] > 2)
    np.testing.assert_allclose(made.depth_um[large][ring[large] < 3], ring[large][ring[large] < 3] * 10 + 5)


def test_core_of_a_ring_lies_in_the_ring():
    grid = square_grid(41)
    radius = np.hypot(*(grid - 20).T)
    ring = (radius > 10) & (radius < 20)
    made = core_edge(grid, ring, 10.0, depth_um=30.0)
    assert made.is_core.any()
    assert (ring | ~made.is_core).all()
    assert (np.abs(radius[made.is_core] - 15) < 3).all()


def test_width_is_in_micrometres_whatever_the_size_of_superpixels():
    fine = core_edge(square_grid(40), np.ones(1600, dtype=bool), 5.0, depth_um=50.0)
    coarse = core_edge(square_grid(20), np.ones(400, dtype=bool), 10.0, depth_um=50.0)
    assert fine.is_core.sum() * 25 == coarse.is_core.sum() * 100 == 100 * 100


def test_pieces_too_small_are_left_out():
    grid = square_grid(6)
    target = np.zeros(36, dtype=bool)
    target[[0, 1, 6, 7, 35]] = True
    assert core_edge(grid, target, 8.0, min_cells=2).component.max() == 0
    assert core_edge(grid, target, 8.0).component.max() == 1
    assert (core_edge(grid, np.zeros(36, dtype=bool), 8.0).component == -1).all()


def test_impossible_tumours():
    grid = square_grid(4)
    with pytest.raises(DataValueError, match="depth_um"):
        core_edge(grid, np.ones(16, dtype=bool), 8.0, depth_um=0)
    with pytest.raises(DataValueError, match="no superpixel belongs"):
        published_core_edge(grid, np.zeros(16, dtype=bool), 1, (10, 10))
    alone = np.zeros(16, dtype=bool)
    alone[0] = True
    with pytest.raises(DataValueError, match="two neighbours"):
        published_core_edge(grid, alone, 1, (10, 10))


@pytest.mark.data
@pytest.mark.parametrize("num_required", [2, 3])
@pytest.mark.parametrize("pooling", ["min", "mean"])
def test_checklist_18_scores_of_lymphoid_structures_are_the_recorded_ones(tesla, num_required, pooling):
    recorded = tesla("tls")
    scores = [
        cluster_score(labels, np.column_stack([np.arange(4), means]))
        for labels, means in zip(recorded["labels"], recorded["label_means"], strict=True)
    ]
    made = tls_score(scores, num_required, pooling)
    np.testing.assert_allclose(made, recorded[f"tls_{num_required}_{pooling}"], atol=1e-12)


def test_checklist_18_score_is_0_or_at_least_a_half_and_0_where_two_of_four_are_absent():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(4, 20, 30))
    scores[:2, 5:9] = 0.0
    made = tls_score(list(scores))
    assert made.shape == (20, 30)
    assert ((made == 0) | (made >= 0.5)).all()
    assert made.max() == 1
    assert (made[5:9] == 0).all()


def test_scores_without_a_structure():
    assert not tls_score([np.zeros((3, 3))] * 4).any()
    with pytest.raises(DataValueError, match="num_required=5"):
        tls_score([np.zeros((3, 3))] * 4, 5)
    with pytest.raises(DataValueError, match="nothing to score"):
        cluster_score(np.zeros(3, dtype=int), np.array([[0, 0.0]]))
