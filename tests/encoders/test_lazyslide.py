"""The family of lazyslide-models, with its loaders cut off from the hub."""

from __future__ import annotations

import pickle
import sys
import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _licence
from hespotex.errors import (
    CheckpointError,
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
    """``uni`` and ``lunit-dino-s16`` as one small random transformer, made by the classes of the package."""
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


@pytest.fixture
def checkpoint(small, tmp_path):
    """Weights of the small transformer as ``uni`` is published."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(timm.create_model("uni").state_dict(), path)
    return path


TILES = np.random.default_rng(0).integers(0, 255, (3, 224, 224, 3), dtype=np.uint8)


def test_a_file_on_this_machine_is_loaded_and_found_again(checkpoint, tmp_path):
    state = torch.load(checkpoint)
    state["norm.bias"] += 1  # other weights than those that the network would begin with
    torch.save(state, checkpoint)
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        encoder = quietly("lazyslide:uni", weights=checkpoint)
        features = encoder.encode(TILES, "cpu")
        assert np.abs(features - quietly("lazyslide:uni2").encode(TILES, "cpu")).min() > 0.5
        assert encoder.weights_file() == checkpoint
        assert str(checkpoint) not in str(encoder.params())
        again = hx.encoders.create(**encoder.params())
        assert again.params() == encoder.params()
    np.testing.assert_array_equal(again.encode(TILES, "cpu"), features)


def test_files_that_cannot_be_used(checkpoint, tmp_path):
    with pytest.raises(DataValueError, match="takes no weights=.* as 'h0-mini'"):
        quietly("lazyslide:h0-mini", weights=checkpoint)
    with pytest.raises(DataValueError, match="takes no weights=.* as 'quiltnet'"):
        quietly("lazyslide:quiltnet-b32", weights=checkpoint)
    with pytest.raises(DataValueError, match="takes no weights=.*timm:<folder>"):
        quietly("lazyslide:lunit-dino-s16", weights=checkpoint)
    with pytest.raises(DataValueError, match="ignores files$"):
        quietly("lazyslide:ctranspath", weights=checkpoint)
    with pytest.raises(MissingWeightsError, match="not a PyTorch checkpoint"):
        quietly("lazyslide:uni", weights=tmp_path / "nothing.bin")
    with pytest.raises(MissingWeightsError, match="not a folder"):
        quietly("lazyslide:plip", weights=checkpoint)
    torch.save({"code": print}, tmp_path / "code.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        quietly("lazyslide:omiclip", weights=tmp_path / "code.bin")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="'other.bin' is not the PyTorch checkpoint that its loader takes"):
        quietly("lazyslide:uni", weights=tmp_path / "other.bin")
    with pytest.raises(ModelMismatchError, match="other weights"):
        quietly("lazyslide:uni", weights=checkpoint, weights_sha256="0" * 64)


def test_every_loader_that_is_said_to_take_a_file_uses_it():
    """And no other does, but those that name it in an error only."""
    from hespotex.encoders._lazyslide_load import LOADS
    from hespotex.encoders.lazyslide import image_models

    using = {key for key, kind in image_models().items() if _reads(kind.__init__, "model_path")}
    assert using - set(LOADS) <= {"musk", "titan", "conch_v1.5", "conch-madeleine", "conceptclip"}
    assert set(LOADS) <= using


def _reads(function, name):
    import dis

    return any(step.argval == name for step in dis.get_instructions(function) if step.opname.startswith("LOAD"))


def test_without_the_network_the_error_says_how_to_pass_a_file():
    with pytest.raises(MissingWeightsError, match=r"pass the PyTorch checkpoint: weights='<checkpoint>'"):
        quietly("lazyslide:gigapath-flash")
    with pytest.raises(MissingWeightsError, match="takes no file; the same network takes one as 'h0-mini'"):
        quietly("lazyslide:h0-mini")


def test_half_precision_is_close(small):
    full, half = (quietly("lazyslide:lunit-dino-s16", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert next(half._network.model.model.parameters()).dtype == torch.bfloat16
    assert "dtype" not in full.params()
    assert hx.encoders.create(**half.params()).params() == half.params()
    a, b = full.encode(TILES, "cpu"), half.encode(TILES, "cpu")
    assert b.dtype == np.float32
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.999
    assert half.encode_patches(TILES, "cpu").dtype == np.float32
    with pytest.raises(DataValueError, match="int4"):
        quietly("lazyslide:lunit-dino-s16", dtype="int4")


def test_models_that_do_not_compute_in_half_precision_say_so(small, monkeypatch):
    kind = lazyslide_models.MODEL_REGISTRY["lunit-dino-s16"]
    monkeypatch.setattr(kind, "encode_image", lambda self, image: self.model(image.float()))
    with pytest.raises(DataValueError, match="does not compute in dtype='bfloat16'"):
        quietly("lazyslide:lunit-dino-s16", dtype="bfloat16")


def test_what_is_compiled_is_what_encoding_calls(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    encoder = quietly("lazyslide:lunit-dino-s16")
    encoder.compile()
    assert compiled == [(encoder._network.model.model, {"dynamic": False})]
    assert encoder.is_compiled
    assert encoder.fitting_batch_size("cpu") >= 8
    assert encoder.is_compiled


def test_batches_of_a_compiled_model_are_filled_up_and_where_torch_cannot_it_goes_on(small, monkeypatch, caplog):
    seen = []
    encoder = quietly("lazyslide:lunit-dino-s16")
    plain, run = encoder.encode(TILES, "cpu"), encoder._network.model.model.forward

    def call(images):
        seen.append(len(images))
        if len(seen) > 2:
            raise ValueError("no C++ compiler")
        return run(images)

    def compile_(module, **options):
        module._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    encoder.compile()
    np.testing.assert_allclose(encoder.encode(TILES, "cpu"), plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TILES[:1], "cpu"), plain[:1], rtol=1e-4, atol=1e-5)
    assert seen == [3, 3]
    np.testing.assert_allclose(encoder.encode(TILES, "cpu"), plain, rtol=1e-4, atol=1e-5)
    assert "no C++ compiler" in caplog.text
    assert not encoder.is_compiled


def test_scales_of_a_pyramid_share_what_is_compiled(small, monkeypatch, caplog):
    seen = []
    pyramid = quietly("pyramid:lazyslide:lunit-dino-s16", factors=(1, 2))
    module = pyramid.scales[0]._network.model.model

    def call(images):
        seen.append(len(images))
        if len(seen) > 2:
            raise ValueError("no C++ compiler")
        return torch.ones(len(images), 192)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: setattr(self, "_compiled_call_impl", call))
    pyramid.compile()
    first, second = pyramid.scales
    assert first.is_compiled
    assert second.is_compiled
    first.encode(TILES, "cpu")
    assert second.encode(TILES[:1], "cpu").shape == (1, 192)
    assert seen == [3, 3]  # filled up: each size would be compiled anew
    second.encode(TILES, "cpu")
    assert "no C++ compiler" in caplog.text
    assert module._compiled_call_impl is None
    assert not first.is_compiled
    assert not pyramid.is_compiled


def test_modules_that_are_empty_or_of_others_are_no_part_of_what_is_compiled(small, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    encoder, other = quietly("lazyslide:lunit-dino-s16"), torch.nn.Linear(1, 1)
    network = encoder._network.model.model
    network.norm_pre = torch.nn.Sequential()  # false as a condition
    run = network.forward

    def busy(images):
        other(torch.zeros(1, 1))
        return run(images)

    def encode_image(images):
        other(torch.zeros(1, 1))  # as another thread would meanwhile
        return network(images)

    monkeypatch.setattr(network, "forward", busy)
    monkeypatch.setattr(encoder._network.model, "encode_image", encode_image)
    encoder.compile()
    assert encoder._network._compilable() == [network]


def test_for_another_process_the_model_leaves_its_device(small, monkeypatch):
    """Of all scales, which share it."""
    encoder = quietly("lazyslide:lunit-dino-s16")
    other, moves = encoder.resized(2), []
    monkeypatch.setattr(type(encoder._network.model), "to", lambda self, device: moves.append(str(device)))
    encoder._network._device = torch.device("cuda")  # where it would be
    copied = pickle.loads(pickle.dumps(encoder))
    assert moves == ["cpu"]
    assert copied._network._device is None
    np.testing.assert_array_equal(other.encode(TILES, "cpu"), copied.encode(TILES, "cpu"))
    assert moves == ["cpu"] * 3


@pytest.mark.slow
def test_compiled_it_gives_the_same(small):
    encoder = quietly("lazyslide:lunit-dino-s16")
    plain = encoder.encode(TILES, "cpu")
    encoder.compile()
    np.testing.assert_allclose(encoder.encode(TILES, "cpu"), plain, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(encoder.encode(TILES[:2], "cpu"), plain[:2], rtol=1e-3, atol=1e-4)
    assert encoder.is_compiled
