"""The family of lazyslide-models, with its loaders cut off from the hub."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _licence
from hespotex.errors import (
    DataValueError,
    HespotexWarning,
    MissingDependencyError,
    MissingWeightsError,
    ModelMismatchError,
)

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
lazyslide_models = pytest.importorskip("lazyslide_models")


@pytest.fixture(autouse=True)
def _no_licence_was_shown(monkeypatch):
    monkeypatch.setattr(_licence, "_SHOWN", set())


@pytest.fixture
def small(monkeypatch):
    """``hibou-b`` and ``lunit-dino-s16`` as one small random transformer, made by the classes of the package."""
    create = timm.create_model

    def made(name, **options):
        torch.manual_seed(0)
        return create("vit_tiny_patch16_224", num_classes=0, depth=1)

    monkeypatch.setattr(timm, "create_model", made)


def quietly(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hx.encoders.create(name, **options)


def test_features_are_those_of_the_package(small):
    with pytest.warns(HespotexWarning, match="lazyslide:lunit-dino-s16: .*lunit-non-commercial"):
        encoder = hx.encoders.create("lazyslide:lunit-dino-s16")
    tiles = np.random.default_rng(0).integers(0, 255, (2, encoder.tile_px, encoder.tile_px, 3), dtype=np.uint8)
    model = lazyslide_models.MODEL_REGISTRY["lunit-dino-s16"]()
    transform = model.get_transform()
    with torch.inference_mode():
        images = torch.stack([transform(tile) for tile in tiles])
        expected, dense = model.encode_image(images), model.encode_image_dense(images).patch_tokens
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), expected.numpy(), atol=1e-5)
    patches = encoder.encode_patches(tiles, "cpu")
    np.testing.assert_allclose(patches.reshape(2, -1, 192), dense.numpy(), atol=1e-5)
    assert (encoder.n_features, encoder.tile_px, encoder.tile_um, patches.shape[1:3]) == (192, 224, 112.0, (14, 14))
    assert quietly("dense:lazyslide:lunit-dino-s16").tile_um == 8.0


def test_parameters_identify_and_rebuild(small):
    encoder = quietly("lazyslide:lunit-dino-s16", tile_um=56)
    params = encoder.params()
    assert hx.encoders.create(**params).params() == params
    with pytest.raises(ModelMismatchError, match="other weights"):
        hx.encoders.create(**params | {"weights_sha256": "0" * 64})
    with pytest.raises(DataValueError, match="tile_px=0"):
        hx.encoders.create("lazyslide:lunit-dino-s16", tile_px=0)


def test_tiles_are_read_at_the_size_that_the_preprocessing_crops(small, monkeypatch):
    """GigaPath's resizes to 256 px and crops 224: tiles of 224 px would be enlarged."""
    assert quietly("lazyslide:gigapath").tile_px == 256


def test_every_image_encoder_is_listed_with_its_licence():
    table = hx.encoders.available(family="lazyslide")
    keys = [key.removeprefix("lazyslide:") for key in table.index]
    assert {"uni", "hibou-l", "plip", "ctranspath", "musk", "chief", "titan", "phikon"} <= set(keys)
    assert "prism" not in keys  # of whole slides
    assert "instanseg" not in keys
    assert (table["licence"].str.len() > 2).all()
    assert table.loc["lazyslide:hibou-l", "gated"]
    assert table["cached"].isna().all()  # none under the names we know, which need not be all there are
    assert table.loc["lazyslide:plip", "n_features"] == 512
    with pytest.raises(DataValueError, match="timm.list_models"):
        hx.encoders.available(family="timm")


def test_unknown_models_are_answered_by_near_ones():
    with pytest.raises(DataValueError, match="near: .*'hibou-l'"):
        hx.encoders.create("lazyslide:hibou")
    with pytest.raises(DataValueError, match="there are .*'uni2'"):
        hx.encoders.create("lazyslide:xyzzy")
    with pytest.raises(DataValueError, match="lazyslide:<model>"):
        hx.encoders.create("lazyslide")


def test_without_the_network_the_error_says_what_to_do():
    with pytest.raises(
        MissingWeightsError, match=r"accept the terms at https://huggingface.co/bioptimus/H0-mini .*hf auth"
    ):
        quietly("lazyslide:h0-mini")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "musk", None)
    with pytest.raises(MissingDependencyError, match="lazyslide:musk"):
        quietly("lazyslide:musk")
