from __future__ import annotations

import numpy as np
import pytest

from hespotex.errors import DataValueError
from hespotex.models.nn.nuclei import nuclei_factor, nuclei_reference


@pytest.mark.parametrize("group", ["inside", "border", "few", "all_equal", "outside"])
def test_equals_the_published(golden, group):
    recorded = golden("nuclei")
    np.testing.assert_allclose(nuclei_factor(recorded[f"{group}_n_labels"]), recorded[f"{group}_f"], atol=1e-7)


@pytest.mark.parametrize(
    ("counts", "factors"), [([1, 5, 20, 37], [1.05, 1.25, 2.0, 2.0]), ([2, 8], [1.25, 2.0]), ([0, 20], [1.05, 2.0])]
)
def test_worked_values(counts, factors):
    assert nuclei_factor(np.array(counts)).ravel().tolist() == pytest.approx(factors)


def test_checklist_17_equal_counts_give_two():
    assert (nuclei_factor(np.full(5, 7)) == 2).all()


def test_checklist_16_shape_and_range():
    factor = nuclei_factor(np.random.default_rng(0).integers(0, 50, 100))
    assert factor.shape == (100, 1)
    assert factor.min() > 1
    assert factor.max() == 2


def test_with_a_reference_a_count_means_the_same_on_every_section():
    one, other = nuclei_factor(np.array([4, 8]), 16.0), nuclei_factor(np.array([4, 40]), 16.0)
    assert one[0] == other[0] == 1.25
    assert other[1] == 2.0


def test_reference_is_the_upper_tail_of_all_training_sections():
    assert nuclei_reference([np.arange(51), np.arange(51, 101)]) == 95.0
    assert nuclei_reference([np.zeros(5)]) == 1.0


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [np.nan, 2.0]])
def test_impossible_counts_are_an_error(bad):
    with pytest.raises(DataValueError, match="segment_nuclei"):
        nuclei_factor(np.array(bad))
