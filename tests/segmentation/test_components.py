from __future__ import annotations

import numpy as np
from scipy import ndimage

from hespotex.segmentation._components import choose_regions, score_regions
from hespotex.segmentation.watershed import TreeOptions


def cone(shape: tuple[int, int], y: float, x: float, radius: float, height: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.clip(height * (1 - np.hypot(rows - y, columns - x) / (2 * radius)), 0, None)


LEVELS = np.linspace(0.1, 0.9, 9)


def select_regions(image: np.ndarray, diameter: float, options: TreeOptions | None = None) -> np.ndarray:
    above = np.searchsorted(LEVELS, image, side="left").astype(np.uint8)
    return choose_regions(above, len(LEVELS), (options or TreeOptions()).shape(diameter))[0]


def test_one_round_region_is_kept_whole_and_not_its_core() -> None:
    image = (cone((60, 60), 30, 30, 10, 1) > 0.5) * 0.95
    labels = select_regions(image, 20)
    assert labels.max() == 1
    assert np.array_equal(labels > 0, image > 0)


def test_two_peaks_in_one_clump_become_two_regions() -> None:
    image = np.maximum(cone((60, 90), 30, 30, 9, 1), cone((60, 90), 30, 56, 9, 1))
    assert select_regions(image, 18).max() == 2


def test_each_region_is_taken_at_its_own_height() -> None:
    image = np.maximum(cone((60, 120), 30, 30, 10, 0.35), cone((60, 120), 30, 85, 10, 1))
    labels = select_regions(image, 18)
    assert labels[30, 30] > 0
    assert labels[30, 85] > 0


def test_regions_of_wrong_size_or_form_are_left_out() -> None:
    image = np.zeros((80, 200))
    image[10:12, 10:12] = 1  # too small
    image[20:70, 60:120] = 1  # too large
    image[40:42, 130:195] = 1  # too long
    assert select_regions(image, 14).max() == 0
    assert select_regions(image, 14, TreeOptions(min_area=0.01)).max() == 1


def test_an_empty_image_gives_no_regions() -> None:
    labels = select_regions(np.zeros((20, 30)), 10)
    assert labels.shape == (20, 30)
    assert labels.max() == 0


def test_the_same_choice_as_from_one_label_image_per_threshold() -> None:
    """The definition, written out: a region is kept if it scores at least the mean of the best choice within it."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(120, 150)), 3.0)
    image /= image.max()
    diameter, options = 14.0, TreeOptions(min_roundness=0.2)
    labels = [ndimage.label(image > level)[0] for level in LEVELS]
    scored = [score_regions(cut, int(cut.max()), options.shape(diameter)) for cut in labels]

    def best(level: int, name: int) -> tuple[float, np.ndarray]:
        """Score and mask of the best choice within a region."""
        mask = labels[level] == name
        parts, chosen = 0.0, np.zeros(image.shape, bool)
        if level + 1 < len(LEVELS):
            total = merit = 0.0
            for part in np.unique(labels[level + 1][mask]):
                value, pixels = best(level + 1, part) if part else (0.0, chosen)
                if value > 0:
                    size = float((labels[level + 1] == part).sum())
                    total, merit, chosen = total + size, merit + size * value, chosen | pixels
            parts = merit / total if total else 0.0
        own = scored[level][1][name]
        return (own, mask) if own > 0 and own >= parts - 1e-12 else (parts, chosen)

    expected = np.zeros(image.shape, bool)
    for name in range(1, labels[0].max() + 1):
        expected |= best(0, name)[1]
    found = select_regions(image, diameter, options)
    assert found.max() > 5
    assert np.array_equal(found > 0, expected)


def test_places_in_the_image_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.normal(size=(80, 90)), 2.0) * 8
    here = select_regions(image, 10)
    there = select_regions(np.pad(image, ((300, 5), (700, 9))), 10)[300:380, 700:790]
    assert here.max() > 3
    assert np.array_equal(here > 0, there > 0)


def test_single_pixels_that_touch_nothing_are_regions_each() -> None:
    image = (np.indices((41, 60)).sum(axis=0) % 2).astype(float)
    assert select_regions(image, 3, TreeOptions(min_area=0.01, spread=0.1)).max() == image.sum()
