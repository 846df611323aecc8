from __future__ import annotations

import numpy as np

from hespotex.segmentation._tree import TreeOptions, select_regions


def cone(shape: tuple[int, int], y: float, x: float, radius: float, height: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.clip(height * (1 - np.hypot(rows - y, columns - x) / (2 * radius)), 0, None)


LEVELS = np.linspace(0.1, 0.9, 9)


def test_one_round_region_is_kept_whole_and_not_its_core() -> None:
    image = (cone((60, 60), 30, 30, 10, 1) > 0.5) * 0.95
    labels = select_regions(image, LEVELS, 20)
    assert labels.max() == 1
    assert np.array_equal(labels > 0, image > 0)


def test_two_peaks_in_one_clump_become_two_regions() -> None:
    image = np.maximum(cone((60, 90), 30, 30, 9, 1), cone((60, 90), 30, 56, 9, 1))
    assert select_regions(image, LEVELS, 18).max() == 2


def test_each_region_is_taken_at_its_own_height() -> None:
    image = np.maximum(cone((60, 120), 30, 30, 10, 0.35), cone((60, 120), 30, 85, 10, 1))
    labels = select_regions(image, LEVELS, 18)
    assert labels[30, 30] > 0
    assert labels[30, 85] > 0


def test_regions_of_wrong_size_or_form_are_left_out() -> None:
    image = np.zeros((80, 200))
    image[10:12, 10:12] = 1  # too small
    image[20:70, 60:120] = 1  # too large
    image[40:42, 130:195] = 1  # too long
    assert select_regions(image, LEVELS, 14).max() == 0
    assert select_regions(image, LEVELS, 14, TreeOptions(min_area=0.01)).max() == 1


def test_an_empty_image_gives_no_regions() -> None:
    labels = select_regions(np.zeros((20, 30)), LEVELS, 10)
    assert labels.shape == (20, 30)
    assert labels.max() == 0
