from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hespotex.image.tissue import mask_polygons, tissue_mask

SIZES = {"min_area_um2": 50_000.0, "max_hole_um2": 40_000.0}


def slide(glass=(244, 240, 241), tissue=(150, 90, 160)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :200]
    truth = (x - 90) ** 2 + (y - 110) ** 2 < 50**2
    rgb = np.where(truth[..., None], tissue, glass) + rng.normal(0, 4, (200, 200, 3))
    return rgb.clip(0, 255).astype(np.uint8), truth


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("glass", [(244, 240, 241), (233, 216, 232), (130, 132, 127)])
def test_tissue_on_glass_of_any_tint(glass):
    tissue = tuple(int(value * 0.6) for value in (0.85 * glass[0], 0.5 * glass[1], 0.9 * glass[2]))
    rgb, truth = slide(glass, tissue)
    assert overlap(tissue_mask(rgb, 16.0, **SIZES), truth) > 0.9


def test_black_background_and_grey_frames_are_no_tissue():
    rgb, truth = slide()
    rgb[:, :30] = 0
    rgb[170:190, 40:190] = 170
    assert overlap(tissue_mask(rgb, 16.0, **SIZES), truth) > 0.9


def test_holes_and_crumbs():
    rgb, truth = slide()
    rgb[105:115, 85:95] = (244, 240, 241)
    rgb[20:26, 20:26] = (150, 90, 160)
    mask = tissue_mask(rgb, 16.0, **SIZES)
    assert mask[110, 90]
    assert not mask[23, 23]


def test_bare_glass_has_no_tissue():
    assert not tissue_mask(np.full((50, 50, 3), 240, np.uint8), 16.0, **SIZES).any()
    assert not tissue_mask(np.zeros((50, 50, 3), np.uint8), 16.0, **SIZES).any()


def test_uneven_and_dusty_glass_has_no_tissue():
    """Otsu's threshold divides whatever it is given."""
    rng = np.random.default_rng(0)
    uneven = 243 + np.linspace(0, [0, -8, -14], 200)[None] + rng.normal(0, 0.5, (200, 200, 3))
    spots = rng.random((200, 200, 1)) > 0.99
    dusty = 243 - spots * np.array([10, 20, 30]) + rng.normal(0, 0.5, (200, 200, 3))
    for glass in (uneven, dusty):
        assert not tissue_mask(glass.clip(0, 255).astype(np.uint8), 16.0, **SIZES).any()


def test_outlines_follow_the_mask():
    mask = np.zeros((40, 50), bool)
    mask[5:25, 10:40] = True
    mask[10:20, 20:30] = False
    mask[30:35, 2:8] = True
    large, small = mask_polygons(mask)
    assert large.area == 30 * 20 - 100
    assert large.bounds == (10, 5, 40, 25)
    assert len(large.interiors) == 1
    assert small.area == 30
    assert mask_polygons(np.zeros((3, 3), bool)) == []


@pytest.mark.data
def test_spots_of_a_blackened_image_lie_on_its_tissue(data_dir):
    from PIL import Image

    folder = data_dir / "her2st_a1_lowres"
    image = Image.open(folder / "A1_image.png").convert("RGB").resize((400, 428), Image.Resampling.BOX)
    mask = tissue_mask(np.asarray(image), 16.0, **SIZES)
    spots = pd.read_csv(folder / "A1_selection.tsv", sep="\t")
    x, y = (spots["pixel_x"] / 6954 * 400).astype(int), (spots["pixel_y"] / 7435 * 428).astype(int)
    assert mask[y, x].mean() > 0.95
    assert mask.mean() < 0.45


def test_corners_of_glass_that_tissue_cuts_off_stay_glass():
    rgb, truth = slide()
    crop = slice(67, 153), slice(47, 133)
    mask = tissue_mask(rgb[crop], 16.0, **SIZES)
    assert not mask[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert overlap(mask, truth[crop]) > 0.95
