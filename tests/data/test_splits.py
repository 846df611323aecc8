import numpy as np
import pytest

from hespotex.data.splits import Fold, check_folds, group_folds, spatial_blocks
from hespotex.errors import DataValueError, HespotexWarning, LeakageError


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_no_patient_crosses_folds_and_everything_is_tested_once(seed, leave_one_out):
    rng = np.random.default_rng(seed)
    groups = rng.choice([f"P{k}" for k in range(rng.integers(2, 12))], size=rng.integers(4, 40))
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        groups[0], n_groups = "other", 2
    n_splits = None if leave_one_out else int(rng.integers(2, n_groups + 1))
    folds = group_folds(groups, n_splits, seed=seed)
    assert len(folds) == (n_groups if leave_one_out else n_splits)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(groups)))
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert sorted([*fold.train, *fold.test]) == list(range(len(groups)))
    check_folds(folds, groups)


def test_folds_are_balanced_named_and_reproducible():
    groups = [f"P{k}" for k in range(8) for _ in range(k + 1)]  # 36 sections
    folds = group_folds(groups, 3, seed=1)
    assert max(len(fold.test) for fold in folds) - min(len(fold.test) for fold in folds) <= 3
    again = group_folds(groups, 3, seed=1)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))
    equal = [group_folds([f"P{k}" for k in range(12)], 3, seed=seed)[0].test.tolist() for seed in (1, 2)]
    assert equal[0] != equal[1]
    assert [fold.name for fold in group_folds(["b", "a", "b"])] == ["b", "a"]


def test_one_group_cannot_be_left_out():
    with pytest.raises(DataValueError, match="force=True"):
        group_folds(["C", "C", "C"])
    with pytest.raises(DataValueError, match="n_splits=4"):
        group_folds(["A", "B", "C"], 4)
    with pytest.raises(DataValueError, match="n_splits=1"):
        group_folds(["A", "B", "C"], 1)


def test_leaking_folds_are_refused_or_forced():
    folds = group_folds(["C2", "C3", "D1"])
    with pytest.raises(LeakageError, match=r"patient 'C' is in training and test of fold 'C2', 'C3'\."):
        check_folds(folds, ["C", "C", "D"])
    with pytest.warns(HespotexWarning, match="near-copies"):
        check_folds(folds, ["C", "C", "D"], force=True)


def test_a_fold_cannot_hold_the_same_data_twice():
    with pytest.raises(LeakageError, match="fold 'x'"):
        Fold("x", np.array([0, 1]), np.array([1, 2]))
    with pytest.raises(DataValueError, match="no training data"):
        Fold("x", np.array([], dtype=int), np.array([1]))


def test_blocks_are_squares_of_the_given_side():
    xy = np.random.default_rng(0).uniform(0, 1000, size=(500, 2)) + 5e4
    block = spatial_blocks(xy, side_um=250)
    assert sorted(np.unique(block)) == list(range(len(np.unique(block))))
    for name in np.unique(block):
        assert np.ptp(xy[block == name], axis=0).max() <= 250
    assert len(np.unique(block)) == 16


@pytest.mark.parametrize("n_blocks", [8, 20, 50])
def test_blocks_aim_at_a_number(n_blocks):
    row, col = np.divmod(np.arange(900), 30)
    inside = (row - 15) ** 2 + (col - 15) ** 2 < 150
    found = len(np.unique(spatial_blocks(np.column_stack([col, row])[inside] * 100.0, n_blocks=n_blocks)))
    assert 0.6 * n_blocks <= found <= 1.5 * n_blocks


def test_blocks_of_odd_input():
    assert spatial_blocks(np.zeros((3, 2))).tolist() == [0, 0, 0]
    for wrong, options in [
        (np.zeros((0, 2)), {}),
        (np.zeros((3, 3)), {}),
        (np.full((3, 2), np.nan), {}),
        (np.ones((3, 2)), {"side_um": 0}),
        (np.ones((3, 2)), {"n_blocks": 0}),
    ]:
        with pytest.raises(DataValueError):
            spatial_blocks(wrong, **options)
