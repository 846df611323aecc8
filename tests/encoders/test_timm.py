from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _licence
from hespotex.errors import CheckpointError, DataValueError, HespotexWarning, MissingWeightsError, ModelMismatchError

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

ARCHITECTURE = "resnet10t"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.save_file(timm.create_model(ARCHITECTURE, num_classes=0).state_dict(), path)
    return path


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)


def make(weights, **options):
    return hx.encoders.create(f"timm:{ARCHITECTURE}", weights=weights, tile_px=64, **options)


def test_features_are_those_of_timm(weights, tiles):
    encoder = make(weights, mean=0.5, std=(0.2, 0.3, 0.4))
    model = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    model.load_state_dict(safetensors.load_file(weights))
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = model((x - 0.5) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)).numpy()
    features = encoder.encode(tiles, "cpu")
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert features.dtype == np.float32
    assert features.shape == (3, encoder.n_features)


def test_parameters_identify_and_rebuild(weights, tiles, tmp_path):
    encoder = make(weights, tile_um=112)
    params = encoder.params()
    assert params["weights_name"] == "tiny.safetensors"
    assert str(weights.parent) not in str(params)
    assert encoder.mpp == 112 / 64
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(weights.read_bytes())
    again = hx.encoders.create(**params, weights=moved)
    assert again.params() == params
    np.testing.assert_array_equal(again.encode(tiles, "cpu"), encoder.encode(tiles, "cpu"))
    assert hx.encoders.create(**params).params() == params  # found where it was used before
    with (
        hx.settings.override(cache_dir=tmp_path / "elsewhere"),
        pytest.raises(MissingWeightsError, match=params["weights_sha256"]),
    ):
        hx.encoders.create(**params)


def test_half_precision_is_close(weights, tiles):
    full, half = make(weights).encode(tiles, "cpu"), make(weights, dtype="bfloat16").encode(tiles, "cpu")
    cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert cosine.min() > 0.999
    with pytest.raises(DataValueError, match="int4"):
        make(weights, dtype="int4")


def test_a_classifier_in_the_file_is_left_out(tmp_path, weights):
    model = timm.create_model(ARCHITECTURE, num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "whole.pt")
    assert make(tmp_path / "whole.pt").n_features == make(weights).n_features


def test_weights_that_cannot_be_used(tmp_path, weights):
    with pytest.raises(MissingWeightsError, match="weights="):
        make(None)
    with pytest.raises(MissingWeightsError, match="not a file"):
        make(tmp_path / "nothing.pt")
    with pytest.raises(ModelMismatchError, match="other weights"):
        make(weights, weights_sha256="0" * 64)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(truncated)
    torch.save({"code": print}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        make(tmp_path / "code.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02noise")
    with pytest.raises(CheckpointError, match="damaged"):
        make(tmp_path / "noise.pt")
    with pytest.raises(DataValueError, match="tile_px=0"):
        hx.encoders.create(f"timm:{ARCHITECTURE}", weights=weights, tile_px=0)
    torch.save({"weight": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="names to tensors"):
        make(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="do not fit"):
        hx.encoders.create("timm:resnet18", weights=weights)
    with pytest.raises(DataValueError, match="near"):
        hx.encoders.create("timm:resnet10", weights=weights)
    with pytest.raises(DataValueError, match="pad_type"):
        make(weights, pad_type="same")


VIT = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1, "num_classes": 3, "global_pool": ""}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small transformer as timm publishes it: configuration and weights, with a classifier."""
    folder = tmp_path_factory.mktemp("published")
    config = {**VIT, "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def wide():
    return np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)


def tokens_of(folder, tiles):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).eval()
    model.load_state_dict(safetensors.load_file(folder / "model.safetensors"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    with torch.no_grad():
        return model.forward_features((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()


def test_a_folder_as_timm_publishes_it_says_how_it_is_to_be_used(folder, wide):
    encoder = hx.encoders.create(f"timm:{folder}")
    assert encoder.name == "timm:vit_tiny_patch16_224"
    tokens = tokens_of(folder, wide)
    np.testing.assert_allclose(encoder.encode(wide, "cpu"), tokens[:, 0], atol=1e-4)
    np.testing.assert_allclose(encoder.encode_patches(wide, "cpu").reshape(2, 196, -1), tokens[:, 1:], atol=1e-4)
    params = json.loads(json.dumps(encoder.params()))
    assert str(folder) not in str(params)
    assert params["model_args"] == {"depth": 1}
    again = hx.encoders.create(**params)
    assert again.params() == encoder.params()
    by_file = hx.encoders.create(f"timm:{folder / 'model.safetensors'}", pooling="class+mean")
    expected = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    np.testing.assert_allclose(by_file.encode(wide, "cpu"), expected, atol=1e-4)
    assert hx.encoders.create(**by_file.params()).n_features == 384


def test_a_model_of_the_hub_is_taken_from_its_cache(folder, wide, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_licence, "_SHOWN", set())
    with pytest.raises(MissingWeightsError, match="huggingface.co/me/mine"):
        hx.encoders.create("timm:hf-hub:me/mine")
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "main-commit"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("main-commit")
    with pytest.warns(HespotexWarning, match="timm:hf-hub:me/mine: .*https://huggingface.co/me/mine"):
        encoder = hx.encoders.create("timm:hf-hub:me/mine")
    assert encoder.params()["weights_name"] == "hf-hub:me/mine"
    np.testing.assert_allclose(encoder.encode(wide, "cpu"), tokens_of(folder, wide)[:, 0], atol=1e-4)
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()


def test_timm_s_own_weights_are_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(_licence, "_SHOWN", set())
    with pytest.raises(MissingWeightsError, match="huggingface.co/timm/resnet10t.c3_in1k"):
        hx.encoders.create("timm:resnet10t", weights="pretrained")
    with pytest.raises(MissingWeightsError, match="names no weights"):
        hx.encoders.create("timm:vit_small_patch16_18x2_224", weights="pretrained")


def test_arguments_of_the_architecture(folder, weights, wide):
    path = folder / "model.safetensors"
    encoder = hx.encoders.create("timm:vit_tiny_patch16_224", weights=path, model_args={"depth": 1})
    assert encoder.params()["model_args"] == {"depth": 1}
    with pytest.raises(CheckpointError, match="Missing key"):
        hx.encoders.create("timm:vit_tiny_patch16_224", weights=path)
    with pytest.raises(DataValueError, match="does not take all of"):
        make(weights, model_args={"fins": 3})
    with pytest.raises(DataValueError, match="mlp_layer='Glue'"):
        hx.encoders.create("timm:vit_tiny_patch16_224", weights=path, model_args={"mlp_layer": "Glue"})
    with pytest.raises(DataValueError, match="no vision transformer with a class token"):
        make(weights, pooling="mean")


def test_folders_that_say_nothing(tmp_path, weights):
    with pytest.raises(MissingWeightsError, match=r"weights=.*tiny\.safetensors"):
        hx.encoders.create(f"timm:{weights}")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(CheckpointError, match="no configuration of a timm model"):
        hx.encoders.create(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t"}')
    with pytest.raises(MissingWeightsError, match="holds none of"):
        hx.encoders.create(f"timm:{tmp_path}")


def test_a_head_before_the_features_does_not_change_how_many_come_out(tmp_path):
    network = timm.create_model("mobilenetv3_small_050", num_classes=0)
    safetensors.save_file(network.state_dict(), tmp_path / "w.safetensors")
    sdata = hx.datasets.synthetic(size_px=200)
    options = {"weights": tmp_path / "w.safetensors", "progress_bar": False, "copy": True}
    features = hx.pp.embed(sdata, "timm:mobilenetv3_small_050", **options)
    assert features.shape[1] == 1024
    dense = hx.encoders.create("dense:timm:mobilenetv3_small_050", weights=tmp_path / "w.safetensors")
    assert dense.n_features == network.num_features == 288  # of the last map


@pytest.fixture
def described(folder, tmp_path, monkeypatch):
    """The model ``me/mine`` in the hub's cache, of which this machine knows the revision v1 alone."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_licence, "_SHOWN", {"timm:hf-hub:me/mine"})
    model = tmp_path / "hub" / "models--me--mine"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (model / "refs").mkdir()
    (model / "refs" / "v1").write_text("a" * 40)
    return folder


def test_a_model_of_the_hub_is_rebuilt_without_its_configuration(described, wide):
    encoder = hx.encoders.create("timm:hf-hub:me/mine", revision="v1")
    params = json.loads(json.dumps(encoder.params()))
    for weights in ({}, {"weights": encoder.weights_file()}):
        again = hx.encoders.create(**params, **weights)
        assert again.params() == params
        np.testing.assert_array_equal(again.encode(wide, "cpu"), encoder.encode(wide, "cpu"))
    with pytest.raises(CheckpointError, match="'config=' is no configuration of a timm model"):
        hx.encoders.create("timm:hf-hub:me/mine", config={"layers": 3})
    with pytest.raises(DataValueError, match="'timm:resnet18' is not one"):
        hx.encoders.create("timm:resnet18", config=params["config"])


def test_weights_of_the_hub_come_with_a_word_on_their_licence(described):
    options = {"weights": "hf-hub:me/mine", "revision": "v1", "model_args": {"depth": 1}}
    with pytest.warns(
        HespotexWarning, match="vit_tiny_patch16_224 with hf-hub:me/mine: .*https://huggingface.co/me/mine"
    ):
        params = hx.encoders.create("timm:vit_tiny_patch16_224", **options).params()
    with warnings.catch_warnings(action="error"):
        hx.encoders.create(**params)


def test_a_folder_called_like_an_architecture_is_not_meant(weights, tmp_path, monkeypatch):
    (tmp_path / ARCHITECTURE).mkdir()
    monkeypatch.chdir(tmp_path)
    assert make(weights).name == f"timm:{ARCHITECTURE}"
    with pytest.raises(DataValueError, match="pretrained tag"):
        hx.encoders.create(f"timm:{ARCHITECTURE}.none", weights=weights)


@pytest.mark.parametrize("tile_px", [112, 256])
def test_positions_of_a_transformer_are_interpolated_for_other_tiles(folder, tile_px):
    path, options = folder / "model.safetensors", {"model_args": {"depth": 1}, "mean": 0.5, "std": 0.5}
    encoder = hx.encoders.create("timm:vit_tiny_patch16_224", weights=path, tile_px=tile_px, **options)
    assert (encoder.tile_um, encoder.mpp) == (tile_px / 2, 0.5)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=tile_px).eval()
    state = timm.models.vision_transformer.checkpoint_filter_fn(safetensors.load_file(path), model)
    model.load_state_dict(state)
    tiles = np.random.default_rng(0).integers(0, 255, (2, tile_px, tile_px, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model.forward_features((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), expected[:, 0].numpy(), atol=1e-4)
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()


def test_a_tile_that_does_not_fit_is_refused_when_the_encoder_is_made(folder, tmp_path):
    path, options = folder / "model.safetensors", {"model_args": {"depth": 1}}
    with pytest.raises(DataValueError, match="tile_px=250 .*not whole patches.*224 and other multiples of 16"):
        hx.encoders.create("timm:vit_tiny_patch16_224", weights=path, tile_px=250, **options)
    safetensors.save_file(
        timm.create_model("mixer_s32_224", num_classes=0).state_dict(), tmp_path / "mixer.safetensors"
    )
    with pytest.raises(DataValueError, match="tile_px=256 .*it takes 224$"):
        hx.encoders.create("timm:mixer_s32_224", weights=tmp_path / "mixer.safetensors", tile_px=256)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:hf-hub:MahmoodLab/uni@main", {}),
        ("timm:hf-hub:a b", {}),
        ("timm:hf-hub:a/b/c", {"config": {"architecture": ARCHITECTURE}}),
        ("open_clip:hf-hub:a b", {}),
        ("uni", {"weights": "hf-hub:MahmoodLab/uni@main"}),
    ],
)
def test_names_that_no_model_of_the_hub_has(name, options):
    pytest.importorskip("open_clip")
    hint = "pass revision='main' beside 'hf-hub:MahmoodLab/uni'" if "@" in str((name, options)) else "<owner>/<model>"
    with pytest.raises(DataValueError, match=hint):
        hx.encoders.create(name, **options)


def test_a_model_of_the_hub_is_suggested_where_its_name_is_given_as_a_file():
    with pytest.raises(MissingWeightsError, match="'hf-hub:MahmoodLab/UNI'"):
        make("MahmoodLab/UNI")
    with pytest.raises(MissingWeightsError, match="not a file$"):
        make("models/uni.safetensors")
