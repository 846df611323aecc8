from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from hespotex.data import Parts, Prediction, Section, Targets
from hespotex.data.section import rows_of
from hespotex.errors import DataValueError


class OnDisk:
    """A row field that remembers how much of it was read."""

    def __init__(self, array):
        self._array, self.shape, self.rows_read = array, array.shape, 0

    def __getitem__(self, rows):
        block = self._array[rows]
        self.rows_read += len(block)
        return block


def section(n=6, **changes):
    rng = np.random.default_rng(0)
    values = {
        "name": "a",
        "ids": np.arange(n).astype(str),
        "features": rng.normal(size=(n, 3)).astype(np.float32),
        "coordinates": rng.normal(size=(n, 2)),
    }
    return Section(**{**values, **changes})


def targets(n=6):
    counts = sparse.csr_array(np.random.default_rng(1).poisson(2, (n, 4)))
    return Targets(counts, np.full(n, 50.0), ("g1", "g2", "g3", "g4"))


def test_defaults_are_one_region_and_the_section_as_its_own_group():
    made = section()
    assert made.group == "a"
    assert made.n_obs == 6
    np.testing.assert_array_equal(made.region, np.zeros(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"features": np.zeros((5, 3))},
        {"coordinates": np.zeros((7, 2))},
        {"targets": targets(5)},
        {"edges": sparse.csr_array((4, 4))},
        {"extras": {"n_nuclei": np.zeros(3)}},
    ],
)
def test_fields_of_another_length_are_refused(changes):
    with pytest.raises(DataValueError, match="rows, expected 6"):
        section(**changes)


def test_targets_normalise_only_the_rows_that_are_sliced():
    whole = targets()
    source = OnDisk(whole.counts.toarray())
    lazy = Targets(source, whole.library_size, whole.genes)
    np.testing.assert_array_equal(lazy[2:4], whole[:][2:4])
    assert source.rows_read == 2


def test_targets_in_another_unit_keep_their_counts():
    np.testing.assert_array_equal(targets().in_unit("counts")[:], targets().counts.toarray())


def test_a_section_without_expression_says_so():
    with pytest.raises(DataValueError, match="'a' has no measured expression"):
        section().require_targets()


def test_a_missing_extra_names_the_call_that_makes_it():
    with pytest.raises(DataValueError, match="segment_nuclei"):
        section().extra("n_nuclei", "hx.pp.segment_nuclei(sdata)")


def test_parts_share_matrix_has_to_fit():
    with pytest.raises(DataValueError, match="2 columns for 3 parts"):
        Parts(np.arange(3).astype(str), np.zeros((3, 2)), sparse.csr_array((6, 2)))
    parts = Parts(np.arange(3).astype(str), np.zeros((3, 2)), sparse.csr_array((5, 3)))
    with pytest.raises(DataValueError, match="5 rows for 6"):
        section(parts=parts)


def prediction(n, **changes):
    values = {
        "ids": np.arange(n).astype(str),
        "genes": ("g1", "g2"),
        "unit": "log1p_cp10k",
        "mean": np.arange(n * 2, dtype=np.float32).reshape(n, 2),
    }
    return Prediction(**{**values, **changes})


def test_blocks_join_to_the_whole():
    whole = prediction(5, std=np.ones((5, 2), np.float32))
    blocks = [
        Prediction(whole.ids[s], whole.genes, whole.unit, whole.mean[s], std=whole.std[s])
        for s in (slice(0, 2), slice(2, 5))
    ]
    joined = Prediction.concatenate(blocks)
    np.testing.assert_array_equal(joined.mean, whole.mean)
    np.testing.assert_array_equal(joined.std, whole.std)
    np.testing.assert_array_equal(joined.ids, whole.ids)


def test_blocks_that_disagree_are_refused():
    with pytest.raises(DataValueError, match="agree"):
        Prediction.concatenate([prediction(2), prediction(2, unit="counts")])
    with pytest.raises(DataValueError, match="'std'"):
        Prediction.concatenate([prediction(2), prediction(2, std=np.ones((2, 2)))])


def test_rows_of_any_field_are_dense():
    array = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(rows_of(sparse.csr_array(array), slice(1, 3)), array[1:])
    np.testing.assert_array_equal(rows_of(array), array)
