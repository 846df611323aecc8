from __future__ import annotations

import numpy as np
import pytest

from hespotex.errors import GeometryError
from hespotex.image.patches import patch_half_side, patch_windows, resize, spot_patches

GROUPS = [
    ("cubic", "d16", 0.9999),
    ("cubic", "d31", 0.9999),
    ("area", "d223", 0.9999),
    ("area", "d223_5", 1.0),
    ("area", "d260", 1.0),
    ("area", "d300_clipped", 0.88),
]


@pytest.mark.parametrize(("file", "group", "share"), GROUPS)
def test_checklist_09_patches_equal_the_published_to_one_grey_level(golden, file, group, share):
    recorded = golden(f"patches_{file}")
    image, diameter = recorded["image"], float(recorded[f"{group}_diameter"])
    assert patch_half_side(diameter) == recorded[f"{group}_r"]
    ours = spot_patches(image, recorded[f"{group}_xy"], diameter)
    difference = np.abs(ours.astype(int) - recorded[f"{group}_patches"].astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() >= share


@pytest.mark.parametrize("group", ["inside", "border", "few", "all_equal"])
def test_checklist_09_windows_equal_the_published(golden, group):
    recorded = golden("nuclei")
    shape = recorded["labels"].shape
    windows = patch_windows(recorded[f"{group}_xy"], float(recorded[f"{group}_diameter"]), shape)
    cut = np.stack([windows[:, 1] - windows[:, 0], windows[:, 3] - windows[:, 2]], axis=1)
    np.testing.assert_array_equal(cut, recorded[f"{group}_window_shape"])
    labels = [len(np.unique(recorded["labels"][a:b, c:d])) for a, b, c, d in windows]
    np.testing.assert_array_equal(labels, recorded[f"{group}_n_labels"])


def test_checklist_09_worked_window():
    assert patch_half_side(178.6) == 89
    assert patch_windows(np.array([[100, 50]]), 178.6, (1000, 1000)).tolist() == [[0, 139, 11, 189]]


@pytest.mark.parametrize("centre", [(500, 50), (50, 500), (-200, 50), (50, -200)])
def test_spots_outside_the_image_are_an_error_on_all_four_sides(centre):
    with pytest.raises(GeometryError, match="1 of 2 spots lie outside"):
        patch_windows(np.array([centre, (50, 50)]), 30, (100, 100))


@pytest.mark.parametrize("shape", [(16, 16), (224, 224), (300, 260), (300, 170), (60, 300)])
def test_a_flat_patch_stays_flat(shape):
    assert (resize(np.full((*shape, 3), 137, dtype=np.uint8)) == 137).all()


def test_a_patch_of_the_right_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, size=(224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(image), image)


def test_area_is_the_mean_of_whole_boxes():
    image = np.random.default_rng(0).integers(0, 256, size=(448, 448, 3), dtype=np.uint8)
    boxes = image.reshape(224, 2, 224, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(image) - boxes).max() <= 0.5
