from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import DataValueError


def test_pixels_come_as_they_are_row_by_row(slide_of, features_of, noise):
    encoder = hx.encoders.create("crops")
    assert (encoder.tile_um, encoder.mpp, encoder.n_features) == (14.0, 0.5, 28 * 28 * 3)
    found = features_of(encoder, slide_of(noise), [[100, 60], [14, 200]])
    np.testing.assert_array_equal(found[0].reshape(28, 28, 3), noise[46:74, 86:114])
    np.testing.assert_array_equal(found[1].reshape(28, 28, 3), noise[186:214, 0:28])


def test_beyond_the_image_is_white(slide_of, features_of, noise):
    crop = features_of(hx.encoders.create("crops"), slide_of(noise), [[0, 0]])[0].reshape(28, 28, 3)
    assert (crop[:14] == 255).all()
    np.testing.assert_array_equal(crop[14:, 14:], noise[:14, :14])


def test_sizes():
    assert hx.encoders.create("crops", tile_px=16).tile_um == 8.0
    encoder = hx.encoders.create("crops", tile_um=28, tile_px=14)
    assert (encoder.mpp, encoder.n_features) == (2.0, 588)
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()
    assert encoder.resized(2).tile_um == 56
    assert encoder.tile_um == 28
    with pytest.raises(DataValueError, match="tile_px=0"):
        hx.encoders.create("crops", tile_px=0)
    with pytest.raises(DataValueError, match="contradict"):
        hx.encoders.create("crops", tile_um=14, mpp=1)
