from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from hespotex.segmentation._flood import grow_regions
from hespotex.segmentation._necks import split_necks

from ._scenes import discs


def grown(image: np.ndarray, labels: np.ndarray, *, share: float = 0.5, reach: int = 100) -> np.ndarray:
    out = labels.astype(np.int32)
    grow_regions(image.astype(np.float32), out, int(out.max()), np.float32(0.1), np.float32(2.0), share, reach)
    return out


def seed(shape: tuple[int, int], *places: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(shape, np.int32)
    for name, place in enumerate(places, start=1):
        labels[place] = name
    return labels


def test_a_region_ends_at_its_share_of_its_own_height() -> None:
    image = np.array([[1.0, 0.9, 0.7, 0.51, 0.49, 0.6, 0.05]])
    # What lies behind a place that is too low is not reached: regions stay connected.
    assert grown(image, seed(image.shape, (0, 0))).tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    assert grown(image, seed(image.shape, (0, 0)), share=0.05).tolist() == [[1, 1, 1, 1, 1, 1, 0]]


def test_no_further_than_its_reach() -> None:
    distance = np.abs(np.mgrid[:21, :21] - 10).sum(axis=0)
    labels = grown(np.ones((21, 21)), seed((21, 21), (10, 10)), reach=4)
    assert np.array_equal(labels > 0, distance <= 4)


def test_two_regions_meet_in_the_valley_between_them() -> None:
    x = np.arange(30)
    image = np.tile(1.5 - 0.06 * np.minimum(np.abs(x - 4), np.abs(x - 24)), (5, 1))
    labels = grown(image, seed(image.shape, (2, 4), (2, 24)), share=0.3)
    assert (labels[:, :14] == 1).all()
    assert (labels[:, 15:] == 2).all()


def test_the_image_elsewhere_does_not_matter() -> None:
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 60)), 2) * 5 + 0.6
    labels = seed(image.shape, (10, 10), (12, 25), (30, 40))
    alone = grown(image, labels, reach=5)
    beside = grown(np.hstack([image, np.zeros((40, 8)), 50 + image]), np.pad(labels, ((0, 0), (0, 68))), reach=5)
    assert np.array_equal(alone, beside[:, :60])


def split(labels: np.ndarray, diameter: float = 20.0, min_area: float = 0.14) -> np.ndarray:
    return split_necks(labels.astype(np.int32), diameter, depth=0.1, min_area=min_area, split_area=0.9)


@pytest.mark.parametrize("gap", [1.55, 1.7, 2.0])
def test_two_discs_that_touch_are_parted_at_the_neck(gap: float) -> None:
    _, truth = discs((60, 90), np.array([[30.0, 30.0], [30 + gap * 10, 30]]), 10)
    labels = split(truth > 0)
    assert labels.max() == 2
    for name in (1, 2):
        _, counts = np.unique(truth[labels == name], return_counts=True)
        assert counts.max() / counts.sum() > 0.9
    assert np.array_equal(labels > 0, truth > 0)


def test_a_chain_is_parted_into_all_its_members() -> None:
    _, truth = discs((40, 160), np.array([[20.0 + 18 * k, 20] for k in range(7)]), 10)
    assert split(truth > 0).max() == 7


def test_one_nucleus_stays_one() -> None:
    y, x = np.mgrid[:60, :60] - 30
    assert split(y**2 + x**2 < 200).max() == 1
    assert split((y / 1.0) ** 2 + (x / 2.5) ** 2 < 100).max() == 1
    assert split(np.zeros((5, 5))).max() == 0


def test_parts_too_small_stay_with_their_neighbour() -> None:
    _, truth = discs((60, 90), np.array([[30.0, 30.0]]), 12)
    truth[28:33, 38:60] = 1
    truth[25:36, 55:65] = 1  # a knob on a stalk
    assert split(truth > 0).max() == 2
    assert split(truth > 0, min_area=0.5).max() == 1


def test_neighbours_keep_their_names_and_pixels() -> None:
    _, truth = discs((60, 120), np.array([[30.0, 30.0], [47, 30], [90, 30]]), 10)
    truth[truth == 2] = 1
    labels = split(truth)
    assert set(np.unique(labels)) == {0, 1, 3, 4}
    assert np.array_equal(labels == 3, truth == 3)
