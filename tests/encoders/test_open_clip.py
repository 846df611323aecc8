"""Tests on a ViT of two narrow layers in open_clip's own file layout: the real one weighs 0.6 GB."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _licence
from hespotex.errors import CheckpointError, DataValueError, HespotexWarning, MissingWeightsError, ModelMismatchError

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
safetensors = pytest.importorskip("safetensors.torch")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-vit.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny-vit.json")
    torch.manual_seed(0)
    path = folder / "open_clip_model.safetensors"
    safetensors.save_file(open_clip.create_model("tiny-vit").state_dict(), path)
    torch.save(safetensors.load_file(path), folder / "open_clip_pytorch_model.bin")
    return path


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)


def make(weights, **options):
    return hx.encoders.create("open_clip:tiny-vit", weights=weights, **options)


def published(weights, tiles, *, quick_gelu=False, raw=False) -> np.ndarray:
    """Image features by open_clip's own call, of unit length."""
    model = open_clip.create_model("tiny-vit", pretrained=str(weights), force_quick_gelu=quick_gelu).eval()
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float()
    if not raw:
        x = (x / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return model.encode_image(x, normalize=True).numpy()


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_checklist_10_features_are_those_of_open_clip(weights, tiles, quick_gelu, raw):
    features = make(weights, quick_gelu=quick_gelu, raw_pixels=raw).encode(tiles, "cpu")
    np.testing.assert_allclose(features, published(weights, tiles, quick_gelu=quick_gelu, raw=raw), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Random weights of the image tower of ViT-B-32, 0.35 GB."""
    path = tmp_path_factory.mktemp("full_size") / "open_clip_model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = open_clip.create_model("ViT-B-32-quickgelu").visual
    safetensors.save_file({f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}, path)
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("name", "options"), [("open_clip:ViT-B-32-quickgelu", {}), ("quiltnet", {"quick_gelu": True, "raw_pixels": True})]
)
def test_checklist_10_512_features_of_unit_length_from_a_frozen_network(full_size, monkeypatch, name, options):
    from open_clip.transformer import QuickGELU

    monkeypatch.setattr(_licence, "_SHOWN", {"quiltnet"})
    encoder = hx.encoders.create(name, weights=full_size, **options)
    network = encoder._network._network
    kinds = [type(module) for module in network.modules()]
    assert (kinds.count(QuickGELU), kinds.count(torch.nn.GELU)) == (12, 0)
    before = safetensors.load_file(full_size)
    tiles = np.random.default_rng(0).integers(0, 255, (3, encoder.tile_px, encoder.tile_px, 3), dtype=np.uint8)
    features = encoder.encode(tiles, "cpu")
    assert (encoder.tile_px, encoder.n_features) == (224, 512)
    assert features.shape == (3, 512)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert np.ptp(features, axis=0).max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    after = network.state_dict()
    assert len(after) == len(before)
    assert all(torch.equal(after[key.removeprefix("visual.")], tensor) for key, tensor in before.items())


def test_preprocessing_is_that_of_open_clip(weights, plain_section):
    """From the slide: the same numbers as open_clip's own transform of the cut-out."""
    from PIL import Image

    from hespotex.data.geometry import resolve_slide

    sdata = plain_section()
    image = np.asarray(sdata["image"]).transpose(1, 2, 0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-vit", pretrained=str(weights))
    with torch.no_grad():
        expected = (
            model.eval().encode_image(transform(Image.fromarray(image[200:300, 100:200]))[None], normalize=True).numpy()
        )
    encoder = make(weights, tile_um=50)
    (_, features), *_ = encoder.embed(
        resolve_slide(sdata), np.array([[150.0, 250.0]]), batch_size=1, device="cpu", progress_bar=False
    )
    cosine = float((features * expected).sum())
    assert cosine > 0.999


def test_switches_change_the_features_and_the_parameters(weights, tiles):
    encoders = [
        make(weights),
        make(weights, quick_gelu=True),
        make(weights, raw_pixels=True),
        make(weights, normalize=False),
    ]
    features = [encoder.encode(tiles, "cpu") for encoder in encoders]
    assert all(np.abs(features[0] - other).max() > 1e-4 for other in features[1:])
    assert len({json.dumps(encoder.params(), sort_keys=True) for encoder in encoders}) == 4
    again = hx.encoders.create(**encoders[1].params())
    np.testing.assert_array_equal(again.encode(tiles, "cpu"), features[1])


def test_checklist_09_patches_are_cut_from_the_slide_as_published(weights, plain_section, golden, monkeypatch):
    from hespotex.data.geometry import resolve_slide
    from hespotex.image.patches import spot_patches

    recorded = golden("patches_area")
    image, diameter, xy = recorded["image"], float(recorded["d260_diameter"]), recorded["d260_xy"]
    sdata = plain_section(np.ascontiguousarray(image.transpose(2, 0, 1)), centres=xy, chunks=100)
    encoder = make(weights, patch="published", tile_um=diameter * 0.5)
    seen = []
    monkeypatch.setattr(type(encoder), "encode", lambda self, tiles, device: seen.append(tiles) or tiles[:, 0, :16, 0])
    batches = encoder.embed(resolve_slide(sdata), xy, batch_size=2, device="cpu", progress_bar=False)
    rows = np.concatenate([rows for rows, _ in batches])
    expected = spot_patches(image, xy, diameter, side=64).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.concatenate(seen), expected[rows])
    assert sorted(rows) == list(range(len(xy)))
    assert encoder.params()["patch"] == "published"
    with pytest.raises(DataValueError, match="'tile', 'published'"):
        make(weights, patch="square")


def test_weights_are_hashed_once_and_again_when_they_change(weights, tmp_path, monkeypatch):
    import hashlib

    read, original = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or original(*given))
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.read_bytes())
    with hx.settings.override(cache_dir=tmp_path):
        params = make(path).params()
        hx.encoders.create(**params)
        assert len(read) == 1
        with path.open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(MissingWeightsError):
            hx.encoders.create(**params)
    assert len(read) == 2


def test_both_file_formats(weights, tiles):
    other = weights.with_name("open_clip_pytorch_model.bin")
    np.testing.assert_array_equal(make(weights).encode(tiles, "cpu"), make(other).encode(tiles, "cpu"))


def test_weights_that_do_not_fit(weights, tmp_path):
    with pytest.raises(MissingWeightsError, match="hf-hub"):
        make(None)
    state = safetensors.load_file(weights)
    state["visual.proj"] = state["visual.proj"][:, :8].contiguous()
    safetensors.save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="size mismatch for proj"):
        make(tmp_path / "narrow.safetensors")
    safetensors.save_file({"text.weight": torch.zeros(1)}, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="Missing key"):
        make(tmp_path / "text.safetensors")
    with pytest.raises(DataValueError, match="ViT-B-32"):
        hx.encoders.create("open_clip:vit-b-32", weights=weights)


@pytest.fixture
def licence_was_shown(monkeypatch):
    monkeypatch.setattr(_licence, "_SHOWN", {"quiltnet"})


@pytest.fixture
def tiny_quiltnet(monkeypatch, licence_was_shown):
    """QuiltNet with the tiny architecture in place of ViT-B-32."""
    original = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: original("tiny-vit", **options))


def test_quiltnet_takes_a_local_file_and_states_its_licence_once(weights, tiny_quiltnet, monkeypatch):
    monkeypatch.setattr(_licence, "_SHOWN", set())
    with pytest.warns(HespotexWarning, match="quiltnet: .*Quilt-1M"):
        hx.encoders.create("quiltnet", weights=weights)
    with warnings.catch_warnings(action="error"):
        encoder = hx.encoders.create("quiltnet", weights=weights)
    assert encoder.name == "quiltnet"
    assert encoder.tile_um == 100
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()


def test_quiltnet_is_taken_from_the_hubs_cache(weights, tiny_quiltnet, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        return str(weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    encoder = hx.encoders.create("quiltnet", revision="abc")
    assert asked == [("wisdomik/QuiltNet-B-32", "open_clip_model.safetensors", "abc")]
    assert encoder.params()["weights_name"] == "hf-hub:wisdomik/QuiltNet-B-32"


def test_other_models_of_the_hub_are_found_again_in_its_cache(weights, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(_licence, "_SHOWN", set())
    snapshot = tmp_path / "hub" / "models--me--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / weights.name).symlink_to(weights)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with pytest.warns(HespotexWarning, match="https://huggingface.co/me/clip"):
        params = make("hf-hub:me/clip").params()
    assert params["weights_name"] == "hf-hub:me/clip"
    with hx.settings.override(cache_dir=tmp_path / "elsewhere"):
        assert hx.encoders.create(**params).params() == params
        with pytest.raises(ModelMismatchError, match="other weights"):
            hx.encoders.create(**params | {"weights_sha256": "0" * 64})


@pytest.fixture
def layout(tmp_path):
    """A small model of the hub as open_clip publishes it: configuration and weights of both towers."""
    folder = tmp_path / "published" / "quilt"
    folder.mkdir(parents=True)
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    config = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"], quick_gelu=True)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def published_layout(folder, tiles) -> np.ndarray:
    """Image features by open_clip's own loader of such a folder, with its own normalisation."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        return model.encode_image(
            (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std, normalize=True
        ).numpy()


def test_a_folder_as_open_clip_publishes_it_says_how_it_is_to_be_used(layout, tiles):
    encoder = hx.encoders.create(f"open_clip:{layout}")
    assert encoder.name == "open_clip:quilt"
    assert (encoder.n_features, encoder.tile_px) == (16, 64)
    expected = published_layout(layout, tiles)
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), expected, atol=1e-5)
    params = json.loads(json.dumps(encoder.params()))
    assert str(layout.parent) not in str(params)
    assert "text_cfg" not in str(params)
    again = hx.encoders.create(**params)
    assert again.params() == encoder.params()
    np.testing.assert_array_equal(again.encode(tiles, "cpu"), encoder.encode(tiles, "cpu"))
    by_file = hx.encoders.create(f"open_clip:{layout / 'open_clip_pytorch_model.bin'}")
    assert by_file.params() == params


def test_a_model_of_the_hub_is_taken_by_its_name_from_the_cache(layout, tiles, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_licence, "_SHOWN", set())
    with pytest.raises(MissingWeightsError, match="huggingface.co/me/quilt .*open_clip:<folder>"):
        hx.encoders.create("open_clip:hf-hub:me/quilt")
    snapshot = tmp_path / "hub" / "models--me--quilt" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in layout.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with pytest.warns(HespotexWarning, match="open_clip:hf-hub:me/quilt: .*https://huggingface.co/me/quilt"):
        encoder = hx.encoders.create("open_clip:hf-hub:me/quilt")
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), published_layout(layout, tiles), atol=1e-5)
    params = json.loads(json.dumps(encoder.params()))
    assert params["weights_name"] == "hf-hub:me/quilt"
    assert hx.encoders.create(**params).params() == params
    (snapshot / "open_clip_config.json").unlink()  # what it said is part of the parameters
    assert hx.encoders.create(**params).params() == params


def test_a_tower_of_timm_is_made_without_its_text_tower(layout, tiles):
    """As in BiomedCLIP, whose text tower would be asked for on the hub."""
    path = layout / "open_clip_config.json"
    tower = {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    text = {"hf_model_name": "somebody/bert", "hf_tokenizer_name": "somebody/bert"}
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}}))
    model = open_clip.CLIP(16, {**tower, "timm_model_pretrained": False}, CONFIG["text_cfg"])
    torch.save(model.state_dict(), layout / "open_clip_pytorch_model.bin")
    encoder = hx.encoders.create(f"open_clip:{layout}")
    assert encoder.encode(tiles, "cpu").shape == (3, encoder.n_features) == (3, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no configuration of an open_clip model"),
        ('{"architecture": "resnet10t"}', "no configuration of an open_clip model: KeyError"),
        ('{"model_cfg": {"embed_dim": 16, "vision_cfg": {"fins": 3}, "text_cfg": {}}}', "cannot make .*fins"),
    ],
)
def test_configurations_that_are_none(layout, text, says):
    (layout / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        hx.encoders.create(f"open_clip:{layout}")


def test_folders_that_say_nothing(layout):
    (layout / "open_clip_config.json").unlink()
    with pytest.raises(
        MissingWeightsError, match="has no open_clip_config.json beside it .*'open_clip:<architecture>'"
    ):
        hx.encoders.create(f"open_clip:{layout}")


def test_quiltnet_offline_says_what_to_do(licence_was_shown, tmp_path):
    with hx.settings.override(cache_dir=tmp_path), pytest.raises(MissingWeightsError) as caught:
        hx.encoders.create("quiltnet")
    for advice in ("huggingface.co/wisdomik/QuiltNet-B-32", "hf auth login", "weights='<file>'"):
        assert advice in str(caught.value)


HALF = [0.5, 0.5, 0.5]


@pytest.fixture
def listed(monkeypatch):
    """``say(**means)``: tags that open_clip lists for the tiny architecture, by the mean of each."""

    def say(**means):
        tags = {tag: {"mean": mean, "std": mean and HALF} for tag, mean in means.items()}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)

    return say


def test_by_name_pixels_are_normalised_as_the_weights_that_open_clip_lists(weights, tiles, listed):
    plain = make(weights)
    assert "mean" not in plain.params()
    listed(webli=HALF, other=HALF)
    encoder = make(weights)
    params = encoder.params()
    assert (params["mean"], params["std"]) == (HALF, HALF)
    asked = make(weights, mean=0.5, std=0.5)
    np.testing.assert_array_equal(encoder.encode(tiles, "cpu"), asked.encode(tiles, "cpu"))
    assert np.abs(encoder.encode(tiles, "cpu") - plain.encode(tiles, "cpu")).max() > 1e-4
    listed()
    assert hx.encoders.create(**params).params() == params  # whatever open_clip lists later
    with pytest.raises(DataValueError, match="raw_pixels"):
        make(weights, mean=0.5, raw_pixels=True)


def test_where_the_listed_weights_differ_a_warning_says_how(weights, listed):
    listed(laion2b=HALF, openai=None)
    with pytest.warns(HespotexWarning, match=r"mean=\(0\.481.* for openai; mean=\(0\.5, .* for laion2b.*pass mean="):
        encoder = make(weights)
    assert encoder.params()["mean"] == list(MEAN)
    with warnings.catch_warnings(action="error"):
        assert make(weights, mean=0.5, std=0.5).params()["mean"] == HALF
        hx.encoders.create(**encoder.params())


def test_open_clip_says_how_its_siglip_is_normalised():
    from hespotex.encoders._clip_pixels import by_name

    assert by_name("x", "ViT-B-16-SigLIP", "", None) == ((tuple(HALF), tuple(HALF)), False)
    assert by_name("x", "ViT-B-32", "", None) == ((MEAN, STD), True)
    with pytest.warns(HespotexWarning, match="laion2b_s32b_b82k"):
        by_name("x", "ViT-L-14", "", None)


def test_the_configuration_beside_weights_of_the_hub_is_followed(weights, tmp_path, monkeypatch, listed):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(_licence, "_SHOWN", {"open_clip:tiny-vit with hf-hub:me/clip"})
    snapshot = tmp_path / "hub" / "models--me--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / weights.name).symlink_to(weights)
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": pixels}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    listed(laion2b=HALF, openai=None)
    with warnings.catch_warnings(action="error"):
        params = make("hf-hub:me/clip").params()
    assert {key: params[key] for key in pixels} == pixels
    (snapshot / "open_clip_config.json").write_text("[]")
    assert hx.encoders.create(**params).params() == params
    with pytest.raises(CheckpointError, match="no configuration of an open_clip model"):
        make("hf-hub:me/clip")
