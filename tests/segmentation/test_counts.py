from __future__ import annotations

import numpy as np
import pytest
from shapely import Point, box

from hespotex.errors import DataValueError
from hespotex.segmentation import count_in_circles, count_in_polygons, count_in_window


@pytest.fixture(scope="module")
def golden(data_dir) -> dict[str, np.ndarray]:
    with np.load(data_dir / "golden" / "hespotex" / "nuclei.npz") as file:
        return dict(file)


@pytest.mark.data
@pytest.mark.parametrize("group", ["inside", "border", "few", "all_equal"])
def test_windows_count_as_published(golden: dict[str, np.ndarray], group: str) -> None:
    counts = count_in_window(golden["labels"], golden[f"{group}_xy"], float(golden[f"{group}_diameter"]))
    assert np.array_equal(counts, golden[f"{group}_n_labels"])


@pytest.mark.data
def test_windows_outside_the_image_are_not_read_from_the_other_end(golden: dict[str, np.ndarray]) -> None:
    counts = count_in_window(golden["labels"], golden["outside_xy"], float(golden["outside_diameter"]))
    assert np.array_equal(counts[:5], golden["outside_n_labels"][:5])
    assert counts[5:].tolist() == [0, 0]


def test_a_lazy_label_image_counts_the_same() -> None:
    import dask.array as da

    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 9, (60, 50)), np.ones((50, 50), int)).astype(np.int32)
    xy = rng.uniform(-20, 2600, (40, 2))
    lazy = da.from_array(labels, chunks=700)
    assert np.array_equal(count_in_window(lazy, xy, 120), count_in_window(labels, xy, 120))


def test_points_in_circles_and_polygons() -> None:
    points = np.array([[0.0, 0.0], [1, 0], [5, 5], [9, 9]])
    centres = np.array([[0.0, 0.0], [5, 5], [100, 100]])
    assert count_in_circles(points, centres, np.array([1.0, 0.5, 3])).tolist() == [2, 1, 0]
    polygons = np.array([box(-1, -1, 2, 2), Point(5, 5).buffer(10), box(50, 50, 60, 60)])
    assert count_in_polygons(points, polygons).tolist() == [2, 4, 0]
    assert count_in_circles(points[:0], centres, 1.0).tolist() == [0, 0, 0]
    assert count_in_polygons(points[:0], polygons).tolist() == [0, 0, 0]


def test_bad_windows_are_refused() -> None:
    with pytest.raises(DataValueError, match="diameter_px=0"):
        count_in_window(np.zeros((4, 4), int), np.zeros((1, 2)), 0)
    with pytest.raises(DataValueError, match="finite"):
        count_in_window(np.zeros((4, 4), int), np.array([[np.nan, 0]]), 3)
