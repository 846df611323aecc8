from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from hespotex.segmentation._smooth import capped_distance, gaussian_taps, look_up, smooth


@pytest.mark.parametrize("shape", [(40, 57), (3, 30), (30, 2), (1, 1)])
@pytest.mark.parametrize("sigma", [0.5, 1.3, 3.0])
def test_blur_is_that_of_scipy(shape: tuple[int, int], sigma: float) -> None:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = ndimage.gaussian_filter(image, sigma, truncate=3.0)
    np.testing.assert_allclose(smooth(image, gaussian_taps(sigma)), expected, atol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 4.5, 30.0])
def test_distance_is_euclidean_up_to_its_cap(cap: float) -> None:
    image = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(70, 90)), 4).astype(np.float32)
    expected = np.minimum(ndimage.distance_transform_edt(image > -0.02), cap)
    np.testing.assert_allclose(capped_distance(image, np.float32(-0.02), np.float32(cap)), expected, atol=1e-5)


def test_distance_without_anything_outside_is_the_cap() -> None:
    assert (capped_distance(np.ones((5, 6), np.float32), np.float32(0), np.float32(2.5)) == 2.5).all()


def test_a_part_of_an_image_gives_the_same_bits() -> None:
    """What threads and blocks rely on."""
    image = np.random.default_rng(2).normal(size=(64, 75)).astype(np.float32)
    taps = gaussian_taps(0.8)
    assert np.array_equal(smooth(image, taps)[20:40, 20:50], smooth(image[13:47, 11:59].copy(), taps)[7:27, 9:39])


def test_look_up_takes_one_channel_of_an_image() -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    table = np.linspace(-1, 1, 256).astype(np.float32)
    assert np.array_equal(look_up(rgb[..., 1], table), table[rgb[..., 1]])
