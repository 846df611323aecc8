from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from hespotex.data import UNITS, normalize
from hespotex.errors import DataValueError

COUNTS = np.array([[1, 3], [0, 0], [10, 0]])
LIBRARY = np.array([8.0, 0.0, 10.0])


def test_full_library_unit_has_the_known_values():
    expected = np.log1p([[1e4 / 8, 3e4 / 8], [0, 0], [1e4, 0]])
    np.testing.assert_allclose(normalize(COUNTS, LIBRARY, "log1p_cp10k"), expected, rtol=1e-6)


def test_panel_unit_ignores_the_library():
    expected = np.log1p([[2.5e5, 7.5e5], [0, 0], [1e6, 0]])
    np.testing.assert_allclose(normalize(COUNTS, LIBRARY * 7, "log1p_cpm_panel"), expected, rtol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
def test_sparse_and_dense_agree_and_empty_rows_stay_zero(unit):
    dense = normalize(COUNTS, LIBRARY, unit)
    np.testing.assert_array_equal(dense, normalize(sparse.csr_array(COUNTS), LIBRARY, unit))
    assert dense.dtype == np.float32
    assert np.isfinite(dense).all()
    assert (dense[1] == 0).all()


@pytest.mark.parametrize("unit", UNITS)
def test_spots_are_normalised_independently(unit):
    whole = normalize(COUNTS, LIBRARY, unit)
    np.testing.assert_array_equal(whole[[2, 0]], normalize(COUNTS[[2, 0]], LIBRARY[[2, 0]], unit))


def test_unknown_unit_lists_the_possible_ones():
    with pytest.raises(DataValueError, match="log1p_cp10k"):
        normalize(COUNTS, LIBRARY, "cpm")
