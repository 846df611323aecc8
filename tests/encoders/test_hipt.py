"""The transformers of HIPT; statements 3, 4 and 5 of the iStar checklist."""

from __future__ import annotations

import argparse
import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch

import hespotex as hx
from hespotex.encoders import _licence, _vit, create, hipt
from hespotex.encoders._vit import VisionTransformer
from hespotex.encoders.hipt import HIPT, Networks, image_maps, random_networks
from hespotex.errors import CheckpointError, DataValueError, HespotexWarning, MissingWeightsError, ModelMismatchError


@pytest.fixture(scope="session")
def recorded(data_dir):
    folder = data_dir / "golden" / "istar"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/istar")
    return folder


@pytest.fixture
def shallow(monkeypatch):
    """Transformers of one block each: fast, and as wide as the real ones."""

    def make():
        return (
            VisionTransformer(hipt.LOCAL, 1, hipt.HEADS, patch_px=hipt.SIDE),
            VisionTransformer(hipt.REGIONAL, 1, hipt.HEADS, n_inputs=hipt.LOCAL),
        )

    monkeypatch.setattr(hipt, "_new", make)
    return make


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 2 × 2 patches in place of 16 × 16."""
    monkeypatch.setattr(hipt, "WINDOW", 512)


@pytest.fixture
def folder(shallow, tmp_path, monkeypatch):
    """A folder with weights: safetensors, and a checkpoint of a whole training."""
    monkeypatch.setattr(_licence, "_SHOWN", {"hipt"})
    torch.manual_seed(5)
    lower, upper = shallow()
    safetensors.torch.save_file(lower.state_dict(), tmp_path / "vit256_small.safetensors")
    teacher = {f"module.backbone.{name}": value for name, value in upper.state_dict().items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    checkpoint = {"teacher": teacher, "student": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "vit4k_xs.pth")
    return tmp_path


def tissue(height, width, seed=0):
    return (
        np.random.default_rng(seed)
        .integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        .repeat(16, 0)
        .repeat(16, 1)
    )


@pytest.mark.data
def test_transformers_equal_the_published(recorded):
    golden = np.load(recorded / "vit_tiny.npz")

    def loaded(network, prefix):
        state = {name: torch.tensor(golden[prefix + name]) for name in network.state_dict()}
        assert sum(name.startswith(prefix) for name in golden.files) == len(state)
        network.load_state_dict(state)
        return network.eval()

    lower = loaded(VisionTransformer(24, 2, 6, patch_px=16), "vit256.")
    upper = loaded(VisionTransformer(12, 2, 6, n_inputs=24), "vit4k.")
    with torch.no_grad():
        np.testing.assert_allclose(lower.positions(16, 16), golden["vit256_pos"], atol=1e-6)
        np.testing.assert_allclose(lower(torch.tensor(golden["image"])), golden["vit256_tokens"], atol=1e-5)
        for grid in ("5x7", "14x14"):
            tokens = upper(torch.tensor(golden[f"grid{grid}"]))
            np.testing.assert_allclose(tokens, golden[f"vit4k_tokens_{grid}"], atol=1e-5)


@pytest.mark.data
def test_checklist_4_names_shapes_and_number_of_parameters(recorded):
    names = json.loads((recorded / "vit_parameter_names.json").read_text())
    for name, network, n_parameters in zip(hipt._NAMES, hipt._new(), (21_665_664, 2_781_504), strict=True):
        assert {key: list(value.shape) for key, value in network.state_dict().items()} == names[name]
        assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters


@pytest.mark.data
def test_checklist_3_and_5_a_whole_image_equals_the_published(recorded):
    names = json.loads((recorded / "vit_parameter_names.json").read_text())
    golden = np.load(recorded / "vit_full.npz")
    networks = hipt._new()
    for name, network in zip(hipt._NAMES, networks, strict=True):
        state = {}
        for key, shape in names[name].items():
            values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
            state[key] = torch.from_numpy(values * np.float32(0.02) + ("norm" in key and key.endswith("weight")))
        network.load_state_dict(state)
    both = Networks(*networks)
    image = golden["image_over_4"].repeat(4, axis=0).repeat(4, axis=1)
    regional, local = image_maps(image, both, legacy=True)
    np.testing.assert_allclose(regional[::16, ::16], golden["cls_map_blocks"], atol=1e-4)
    np.testing.assert_allclose(local[::4, ::4], golden["sub_map_stride4"], atol=1e-4)
    with torch.no_grad():
        tokens = networks[1](torch.tensor(golden["grid3x4"]))[0]
    np.testing.assert_allclose(tokens, golden["vit4k_tokens_3x4"], atol=1e-4)
    tokens = both.local(image[None, :256, :256], batch_size=1, device="cpu")
    np.testing.assert_allclose(tokens[0][0], golden["patch0_cls"], atol=1e-4)


def test_checklist_3_tokens(shallow):
    lower, upper = shallow()
    with torch.no_grad():
        assert lower(torch.zeros(1, 3, 256, 256)).shape == (1, 257, 384)
        assert upper(torch.zeros(1, 384, 3, 5)).shape == (1, 16, 192)


def test_checklist_5_regional_features_are_constant_within_a_patch(shallow):
    regional, local = image_maps(tissue(512, 768), random_networks(), legacy=False)
    assert regional.shape == (32, 48, 192)
    assert local.shape == (32, 48, 384)
    blocks = regional.reshape(2, 16, 3, 16, 192)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    assert np.ptp(regional[::16, ::16], axis=(0, 1)).min() > 0
    assert np.ptp(local[:16, :16], axis=(0, 1)).min() > 0


def test_the_stream_gives_the_features_of_the_image(shallow, small_windows, slide_of, features_of):
    image = tissue(1024, 768)
    encoder = HIPT("random")
    regional, local = image_maps(image, encoder._networks)
    row, column = np.divmod(np.arange(64 * 48), 48)
    centres = np.column_stack([column, row]) * 16 + 5.0
    found = features_of(encoder, slide_of(image), centres)
    assert found.shape == (64 * 48, 579)
    np.testing.assert_allclose(found[:, :192], regional.reshape(-1, 192), atol=1e-4)
    np.testing.assert_allclose(found[:, 192:576], local.reshape(-1, 384), atol=1e-4)
    np.testing.assert_allclose(found[:, 576:], image[::16, ::16].reshape(-1, 3) / 255, atol=1e-6)
    some = np.array([5, 700, 3000])
    np.testing.assert_allclose(features_of(encoder, slide_of(image), centres[some]), found[some], atol=1e-5)


def test_borders_are_completed_with_white(shallow, slide_of, features_of):
    image = tissue(304, 272)[:300, :270]
    white = np.full((512, 512, 3), 255, np.uint8)
    white[:300, :270] = image
    encoder = HIPT("random")
    centres = np.array([[10.0, 10.0], [269.9, 299.9], [270.0, 300.0]])
    found = features_of(encoder, slide_of(image), centres)
    regional, local = image_maps(white, encoder._networks)
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)
    np.testing.assert_allclose(found[1, :576], np.concatenate([regional[18, 16], local[18, 16]]), atol=1e-4)


def test_attention_over_the_whole_slide(shallow, small_windows, slide_of, features_of, monkeypatch):
    image = tissue(768, 768)
    encoder = HIPT("random", global_attention=True)
    class_tokens, _ = hipt._local_maps(image, encoder._networks, 8, "cpu")
    expected = encoder._networks.regional(class_tokens, device="cpu")
    found = features_of(encoder, slide_of(image), [[300.0, 520.0], [1.0, 1.0]])
    np.testing.assert_allclose(found[:, :192], expected[[2, 0], [1, 0]], atol=1e-4)
    windows = features_of(HIPT("random"), slide_of(image), [[300.0, 520.0], [1.0, 1.0]])
    assert np.abs(windows[:, :192] - found[:, :192]).max() > 1e-3
    np.testing.assert_allclose(windows[:, 192:], found[:, 192:], atol=1e-5)
    monkeypatch.setattr(hipt, "MAX_ATTENTION_GB", 1e-6)
    with pytest.raises(DataValueError, match="global_attention=True: 10 patches"):
        features_of(encoder, slide_of(image), [[1.0, 1.0]])


def test_shifts_are_averaged(shallow, slide_of, features_of):
    image = tissue(256, 256)
    encoder = HIPT("random", shifts=2)
    found = features_of(encoder, slide_of(image), [[100.0, 140.0], [3.0, 250.0]])
    white = np.full((768, 768, 3), 255, np.uint8)
    white[256:512, 256:512] = image
    expected = 0
    for up in (0, 128):
        for left in (0, 128):
            rows, columns = (1 if shift == 0 else 2 for shift in (up, left))
            part = white[256 - up :, 256 - left :][: rows * 256, : columns * 256]
            maps = np.concatenate(image_maps(part, encoder._networks), axis=2)
            cells = maps[[8 + up // 16, 15 + up // 16], [6 + left // 16, left // 16]]
            expected = expected + cells / 4
    np.testing.assert_allclose(found[:, :576], expected, atol=1e-4)


def test_equal_patches_are_computed_once(shallow, monkeypatch):
    seen = []
    original = _vit.VisionTransformer.forward
    monkeypatch.setattr(_vit.VisionTransformer, "forward", lambda self, x: (seen.append(len(x)), original(self, x))[1])
    patches = np.full((5, 256, 256, 3), 255, np.uint8)
    patches[2] = 7
    networks = random_networks()
    class_tokens, _ = networks.local(patches, batch_size=8, device="cpu")
    assert seen == [2]
    np.testing.assert_array_equal(class_tokens[0], class_tokens[4])
    assert not np.array_equal(class_tokens[0], class_tokens[2])


def test_random_weights_follow_their_seed_and_leave_the_global_state(shallow):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    patches = tissue(256, 256)[None]
    first, again, other = (random_networks(seed).local(patches, batch_size=1, device="cpu")[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    encoder = HIPT("random", seed=4, mpp=1.0, dtype="bfloat16")
    assert (encoder.tile_um, encoder.mpp) == (16.0, 1.0)
    params = json.loads(json.dumps(encoder.params()))
    assert create(**params).params() == params
    assert encoder.resized(2).tile_um == 32.0


def test_weights_are_loaded_from_a_folder_with_their_licence_shown(
    folder, monkeypatch, slide_of, features_of, tmp_path
):
    monkeypatch.setattr(_licence, "_SHOWN", set())
    with pytest.warns(HespotexWarning, match="non-commercial"):
        encoder = create("hipt", weights=folder)
    params = encoder.params()
    assert params["weights_name"] == "vit256_small.safetensors, vit4k_xs.pth"
    assert str(folder) not in str(params)
    slide = slide_of(tissue(256, 256))
    expected = features_of(encoder, slide, [[40.0, 40.0]])
    assert np.abs(expected - features_of(HIPT("random"), slide, [[40.0, 40.0]])).max() > 1e-3
    files = {"vit256": folder / "vit256_small.safetensors", "vit4k": folder / "vit4k_xs.pth"}
    np.testing.assert_array_equal(features_of(HIPT(files), slide, [[40.0, 40.0]]), expected)
    again = create(**params)  # found where they were used before
    np.testing.assert_array_equal(features_of(again, slide, [[40.0, 40.0]]), expected)
    with (
        hx.settings.override(cache_dir=tmp_path / "elsewhere"),
        pytest.raises(MissingWeightsError, match=params["weights_sha256"]["vit4k"]),
    ):
        create(**params)
    with pytest.raises(ModelMismatchError, match="other weights"):
        create("hipt", weights=folder, weights_sha256={"vit256": "0" * 64})


def test_weights_that_cannot_be_used(folder):
    with pytest.raises(MissingWeightsError, match="may not pass on"):
        HIPT()
    with pytest.raises(MissingWeightsError, match="not a folder"):
        HIPT(folder / "nothing")
    with pytest.raises(MissingWeightsError, match="'vit4k'"):
        HIPT({"vit256": folder / "vit256_small.safetensors"})
    swapped = {"vit256": folder / "vit4k_xs.pth", "vit4k": folder / "vit256_small.safetensors"}
    with pytest.raises(CheckpointError, match="'vit256' of HIPT"):
        HIPT(swapped)
    state = safetensors.torch.load_file(folder / "vit256_small.safetensors")
    del state["norm.bias"]
    torch.save({"teacher": state}, folder / "vit256_partial.pth")
    with pytest.raises(MissingWeightsError, match="one file that begins with 'vit256'"):
        HIPT(folder)
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        HIPT({"vit256": folder / "vit256_partial.pth", "vit4k": folder / "vit4k_xs.pth"})
    torch.save({"teacher": state, "code": print}, folder / "vit256_partial.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        HIPT({"vit256": folder / "vit256_partial.pth", "vit4k": folder / "vit4k_xs.pth"})


@pytest.mark.parametrize(
    "options",
    [
        {"shifts": 3},
        {"shifts": 2, "global_attention": True},
        {"tile_um": 0},
        {"tile_um": 8, "mpp": 1},
        {"dtype": "int4"},
    ],
)
def test_options_that_make_no_sense(shallow, options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        HIPT("random", **options)
    with pytest.raises(DataValueError, match="multiples of 256"):
        image_maps(tissue(256, 272), random_networks())


def test_no_centres_no_features(shallow, slide_of):
    slide = slide_of(tissue(256, 256))
    run = {"batch_size": 4, "device": "cpu", "progress_bar": False}
    assert list(HIPT("random").embed(slide, np.empty((0, 2)), **run)) == []
