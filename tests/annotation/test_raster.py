from __future__ import annotations

import numpy as np
import pytest

from hespotex.annotation.raster import from_raster, to_raster
from hespotex.errors import DataValueError

GRID = np.array([[5, -2], [5, 0], [7, -1]])


def test_there_and_back_with_holes_and_an_offset():
    values = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    raster = to_raster(values, GRID)
    assert raster.shape == (3, 3, 2)
    assert raster.dtype == np.float32
    assert np.isnan(raster).sum() == 2 * (9 - 3)
    np.testing.assert_array_equal(from_raster(raster, GRID), values)
    np.testing.assert_array_equal(raster[2, 1], values[2])
    shifted = to_raster(values, GRID + 100)
    np.testing.assert_array_equal(shifted, raster)


def test_integers_keep_their_type_where_they_hold_the_fill():
    labels = np.array([1, 2, 3], dtype=np.int32)
    assert to_raster(labels, GRID, fill=-1).dtype == np.int32
    assert to_raster(labels, GRID).dtype == np.float64
    assert to_raster(labels, GRID, fill=-1, shape=(10, 4)).shape == (10, 4)
    assert to_raster(np.array([True, True, False]), GRID, fill=False).dtype == bool


def test_bad_input():
    with pytest.raises(DataValueError, match="2 rows for 3 cells"):
        to_raster(np.ones(2), GRID)
    with pytest.raises(DataValueError, match="two cells at one place"):
        to_raster(np.ones(2), GRID[[0, 0]])
    with pytest.raises(DataValueError, match="at least one cell"):
        to_raster(np.ones(0), GRID[:0])
    with pytest.raises(DataValueError, match="whole numbers"):
        to_raster(np.ones(3), GRID / 2)
    with pytest.raises(DataValueError, match=r"shape=\(2, 2\)"):
        to_raster(np.ones(3), GRID, shape=(2, 2))
    with pytest.raises(DataValueError, match="smaller"):
        from_raster(np.ones((2, 2)), GRID)
