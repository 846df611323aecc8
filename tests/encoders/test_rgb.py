from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import rgb
from hespotex.errors import DataValueError, ScaleError


def mean_by_area(pixels: np.ndarray, centre: np.ndarray, side: float) -> np.ndarray:
    """Pixel by pixel: the mean over a square, by the share of each pixel inside."""
    height, width = pixels.shape[:2]
    weights = []
    for at, size in ((centre[1], height), (centre[0], width)):
        first = np.arange(size)
        weights.append(np.clip(np.minimum(first + 1, at + side / 2) - np.maximum(first, at - side / 2), 0, None))
    area = weights[0][:, None] * weights[1][None]
    return (pixels * area[..., None]).sum((0, 1)) / area.sum() / 255


CENTRES = np.array([[100.0, 100], [33.3, 250.75], [0.2, 0.4], [401.9, 300.9], [400.0, 7.0], [255.5, 256.5], [256, 256]])


@pytest.mark.parametrize("tile_um", [8.0, 3.7, 0.5, 40.0])
def test_the_mean_is_exact_also_at_the_border(slide_of, features_of, noise, tile_um):
    found = features_of(hx.encoders.create("rgb", tile_um=tile_um, mpp=0.5), slide_of(noise), CENTRES)
    expected = [mean_by_area(noise, centre, tile_um / 0.5) for centre in CENTRES]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_nothing_depends_on_blocks_chunks_order_or_company(slide_of, features_of, noise, monkeypatch):
    encoder = hx.encoders.create("rgb", mpp=0.5)
    centres = np.random.default_rng(1).uniform(0, [402, 301], (300, 2))
    expected = features_of(encoder, slide_of(noise), centres)
    monkeypatch.setattr(rgb, "_BLOCK_PX", 64)
    order = np.random.default_rng(2).permutation(300)
    np.testing.assert_array_equal(features_of(encoder, slide_of(noise, chunk=37), centres[order]), expected[order])
    np.testing.assert_array_equal(features_of(encoder, slide_of(noise), centres[:5]), expected[:5])
    assert list(encoder.embed(slide_of(noise), np.empty((0, 2)), batch_size=8, device="cpu", progress_bar=False)) == []


def test_a_coarser_level_serves_larger_tiles(slide_of, features_of, noise):
    """Of which the last odd row and column are missing."""
    encoder = hx.encoders.create("rgb", tile_um=32.0)
    whole, coarse = (features_of(encoder, slide_of(noise, n_levels=n), CENTRES) for n in (1, 3))
    np.testing.assert_allclose(coarse, whole, atol=0.01)
    assert np.abs(coarse - whole).max() > 0


def test_parameters_rebuild_the_encoder():
    encoder = hx.encoders.create("rgb", tile_um=10)
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()
    assert encoder.resized(4).params() == hx.encoders.create("rgb", tile_um=40).params()
    for wrong in ({"tile_um": 0}, {"tile_um": float("nan")}, {"mpp": -1.0}):
        with pytest.raises(DataValueError, match=next(iter(wrong))):
            hx.encoders.create("rgb", **wrong)


def test_a_coarse_image_is_read_as_it_is(slide_of, features_of, noise):
    found = features_of(hx.encoders.create("rgb"), slide_of(noise, mpp=8.0), [[100.5, 50.5]])
    np.testing.assert_allclose(found[0], noise[50, 100] / 255, atol=1e-6)
    with pytest.raises(ScaleError, match="enlarge"):
        features_of(hx.encoders.create("rgb"), slide_of(noise, mpp=20.0), [[100.5, 50.5]])


def test_through_pp(section):
    hx.pp.embed(section, "rgb")
    colours = section["table"].obsm["X_rgb"]
    assert colours.shape == (section["table"].n_obs, 3)
    assert 0 <= colours.min() < colours.max() <= 1
