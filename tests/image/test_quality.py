"""Scores of tiles on pixels of known defects."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from hespotex.errors import DataValueError
from hespotex.image._squidpy import QUALITY_METRICS, quality_metric
from hespotex.image.quality import blank_share, fit_folds, focus, fold_share, pen_share

PINK, PURPLE = (215, 150, 190), (110, 70, 150)


def tissue(n: int = 6, side: int = 96, seed: int = 0) -> np.ndarray:
    """Pink ground with purple nuclei of 8 px and grain, (n, side, side, 3) uint8 at 1 µm/px."""
    rng = np.random.default_rng(seed)
    spots = ndimage.gaussian_filter(rng.normal(0, 1, (n, side, side)), (0, 3, 3), mode="wrap")
    nuclei = (spots > np.quantile(spots, 0.75))[..., None]
    pixels = np.where(nuclei, PURPLE, PINK) + rng.normal(0, 12, (n, side, side, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def blurred(tiles: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(tiles.astype(float), (0, sigma, sigma, 0), mode="nearest").astype(np.uint8)


def layers(tiles: np.ndarray, times: float) -> np.ndarray:
    return (256 * ((tiles.astype(float) + 1) / 256) ** times - 1).clip(0, 255).astype(np.uint8)


def test_focus_falls_with_blur_and_not_with_contrast():
    sharp = tissue()
    scores = [focus(blurred(sharp, sigma), 1.0) for sigma in (0, 1, 2, 3)]
    assert all((finer > coarser).all() for finer, coarser in zip(scores, scores[1:], strict=False))
    assert scores[0].min() > 0.4
    assert scores[2].max() < 0.3
    pale = (255 - (255 - sharp.astype(float)) / 3).astype(np.uint8)
    assert focus(pale, 1.0) == pytest.approx(scores[0], rel=0.05)
    assert np.isnan(focus(np.full((1, 64, 64, 3), 240, np.uint8), 1.0)).all()


def test_a_blurred_tile_stays_blurred_through_noise_and_jpeg():
    import io

    from PIL import Image

    out = blurred(tissue(), 3)
    noisy = (out + np.random.default_rng(0).normal(0, 2, out.shape)).clip(0, 255).astype(np.uint8)
    packed = []
    for tile in out:
        buffer = io.BytesIO()
        Image.fromarray(tile).save(buffer, "JPEG", quality=75)
        packed.append(np.asarray(Image.open(buffer)))
    assert focus(noisy, 1.0).max() < 0.3
    assert focus(np.stack(packed), 1.0).max() < 0.3


def test_shares_are_those_painted():
    tiles = tissue(1, 96)
    tiles[0, :, :24] = 250
    assert blank_share(tiles, 1.0) == pytest.approx(0.25, abs=0.03)
    assert pen_share(tiles, 1.0) == pytest.approx(0, abs=1e-6)
    for ink in ((25, 115, 70), (40, 60, 160), (28, 28, 32)):
        tiles = tissue(1, 96)
        tiles[0, 48:] = ink
        assert pen_share(tiles, 1.0) == pytest.approx(0.5, abs=0.05)
        assert blank_share(tiles, 1.0) == pytest.approx(0, abs=0.02)


def test_tinted_glass_is_glass_and_void_is_neither():
    assert blank_share(np.full((1, 64, 64, 3), (239, 223, 234), np.uint8), 1.0) == 1
    void = np.zeros((1, 64, 64, 3), np.uint8)
    assert blank_share(void, 1.0) == 0
    assert pen_share(void, 1.0) == 0


def test_a_fold_is_denser_than_tissue_of_its_hue():
    tiles = tissue(12)
    normal = fit_folds(tiles, 1.0)
    folded = tiles.copy()
    folded[:, :, :48] = layers(tiles[:, :, :48], 2.0)
    assert fold_share(tiles, 1.0, normal).max() < 0.1
    assert np.median(fold_share(folded, 1.0, normal)) > 0.3
    crowded = np.full_like(tiles, PURPLE)  # as dense as a fold of pink, but purple
    assert layers(np.full((1, 1, 1, 3), PINK, np.uint8), 2.0).mean() > PURPLE[1]
    mixed = fit_folds(np.concatenate([tiles, crowded[:3]]), 1.0)
    assert fold_share(crowded, 1.0, mixed).max() == 0


def test_hardly_any_tissue_has_no_normal_density():
    assert fit_folds(np.full((4, 64, 64, 3), 250, np.uint8), 1.0) is None
    flat = fit_folds(np.full((9, 64, 64, 3), PINK, np.uint8), 1.0)  # of one hue
    assert len(flat.hue) == 1


def test_scores_of_squidpy():
    tile = tissue(1)[0]
    for name in QUALITY_METRICS:
        assert np.isfinite(quality_metric(name)(tile))
    assert quality_metric("tenengrad")(tile) > quality_metric("tenengrad")(blurred(tile[None], 2)[0])
    assert quality_metric("brightness_mean")(np.full((8, 8, 3), 200, np.uint8)) == pytest.approx(200)
    with pytest.raises(DataValueError, match="'sharpness' is unknown; possible: 'tenengrad'"):
        quality_metric("sharpness")
