"""The named encoders at a depth of one block, from random weights in the layout of the published files."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _licence, _registry
from hespotex.encoders._published import PUBLISHED
from hespotex.encoders.pretrained import PretrainedEncoder
from hespotex.errors import CheckpointError, DataValueError, HespotexWarning, MissingWeightsError, ModelMismatchError

from .conftest import tensors

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("open_clip")
safetensors = pytest.importorskip("safetensors.torch")

DEEPER = re.compile(r"(blocks|encoder\.layer|resblocks|cross_attn)\.[1-9]|layer\d\.[1-9]")
TEXT = ("text.token_embedding", "text_decoder.text_projection")  # 0.1 GB that nothing reads
SCALES = (
    *("norm.weight", "norm1.weight", "norm2.weight", "gamma", "lambda1", "running_var"),
    *("ln_q.weight", "ln_k.weight", "ln_contrast.weight"),
)
VITS = sorted(set(PUBLISHED) - {"resnet50"})


def shallow(name: str) -> type[PretrainedEncoder]:
    record = PUBLISHED[name]
    one_block = {"layers": (1, 1, 1, 1)} if name == "resnet50" else {"depth": 1}
    record = replace(record, arguments={**record.arguments, **one_block})
    return type("Shallow", (PretrainedEncoder,), {"record": record, "info": record.info, "name": name})


@pytest.fixture
def one_block(monkeypatch):
    """All published encoders have one block, and no licence was shown yet."""
    monkeypatch.setattr(_registry, "_REGISTERED", _registry._REGISTERED | {name: shallow(name) for name in PUBLISHED})
    monkeypatch.setattr(_licence, "_SHOWN", set())


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """``make(name)``: a file with the names and shapes of the published one, random, of the first block."""
    made = {}

    def make(name):
        if name not in made:
            pool, state = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)), {}
            for number, (key, shape) in enumerate(tensors(name).items()):
                if DEEPER.search(key) or key.startswith(TEXT):
                    continue
                if key.endswith("num_batches_tracked"):
                    state[key] = torch.zeros((), dtype=torch.int64)
                    continue
                size = max(int(np.prod(shape)), 1)
                value = pool.roll(17 * number).repeat(-(-size // len(pool)))[:size].reshape(shape)
                value = value * (0.5 / shape[-1] ** 0.5 if shape else 0.1)
                if key.endswith(SCALES):
                    value = value.abs() + 0.5
                state[key] = value.half()
            made[name] = tmp_path_factory.mktemp("published") / "model.safetensors"
            safetensors.save_file(state, made[name])
        return made[name]

    yield make
    for path in made.values():
        shutil.rmtree(path.parent)


@pytest.fixture
def tiles():
    """Two tiles of the size asked for, smooth."""

    def make(side):
        coarse = np.random.default_rng(0).integers(0, 255, (2, 7, 7, 3), dtype=np.uint8)
        return coarse.repeat(side // 7, 1).repeat(side // 7, 2)

    return make


def quietly(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HespotexWarning)  # of the licence
        return hx.encoders.create(name, **options)


def tokens_of(name, path, images):
    """Tokens of the transformer by the library that the file was written for, (b, n, d)."""
    record = PUBLISHED[name]
    state = {key: value.float() for key, value in safetensors.load_file(path).items()}
    if record.layout == "dinov2":
        transformers = pytest.importorskip("transformers")
        width = state["layernorm.weight"].shape[0]
        config = transformers.Dinov2Config(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            image_size=record.positions_px or record.tile_px,
            patch_size=state["embeddings.patch_embeddings.projection.weight"].shape[-1],
            use_swiglu_ffn=name == "midnight-12k",
        )
        config.save_pretrained(path.parent)  # beside the weights, as published
        model = transformers.Dinov2Model.from_pretrained(path.parent, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(images).last_hidden_state, 1
    prefix = "visual.trunk." if record.layout == "conch" else ""
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    arguments = {**record.arguments, **(layers if "mlp_layer" in record.arguments else {})}
    arguments |= {"depth": 1, "img_size": record.tile_px}
    with torch.device("meta"):
        model = timm.create_model(record.architecture, pretrained=False, num_classes=0, **arguments)
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    model.load_state_dict(own, assign=True)
    with torch.no_grad():
        return model.eval().forward_features(images), model.num_prefix_tokens


def normalised(name, tiles):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PUBLISHED[name].pixels)
    return (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std


def attention_of(path, tokens):
    """CONCH's pooling, written out: one query attends to all tokens."""
    state = {key: value.float() for key, value in safetensors.load_file(path).items()}
    part = "visual.attn_pool_contrast."
    own = {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
    norm, bias = torch.nn.functional.layer_norm, own["attn.in_proj_bias"].chunk(3)
    keys = norm(tokens, tokens.shape[-1:], own["ln_k.weight"], own["ln_k.bias"])
    query = norm(own["query"], (512,), own["ln_q.weight"], own["ln_q.bias"])
    q, k, v = (
        (x @ own[f"attn.{letter}_proj_weight"].T + b).unflatten(-1, (8, 64)).transpose(-2, -3)
        for letter, x, b in zip("qkv", (query, keys, keys), bias, strict=True)
    )
    seen = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v  # (b, heads, 1, 64)
    pooled = seen.transpose(1, 2).flatten(2)[:, 0] @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]
    return norm(pooled, (512,), state["visual.ln_contrast.weight"], state["visual.ln_contrast.bias"])


@pytest.mark.parametrize("name", VITS)
def test_features_and_patches_are_those_of_the_library_the_file_was_written_for(name, one_block, file_of, tiles):
    path, record = file_of(name), PUBLISHED[name]
    encoder = quietly(name, weights=path)
    images = tiles(record.tile_px)
    features, patches = encoder.encode(images, "cpu"), encoder.encode_patches(images, "cpu")
    tokens, n_prefix = tokens_of(name, path, normalised(name, images))
    side = record.tile_px // (16 if name in ("uni", "gigapath", "phikon-v2", "conch") else 14)
    mean = tokens[:, n_prefix:].mean(1)
    expected = {
        "class": tokens[:, 0],
        "class+mean": torch.cat([tokens[:, 0], mean], 1),
        "attention": attention_of(path, tokens) if name == "conch" else None,
    }[record.pooling]
    assert features.shape == (2, record.n_features)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-3, atol=1e-3)
    assert np.abs(features[0] - features[1]).max() > 0.01
    assert patches.shape == (2, side, side, tokens.shape[-1])
    np.testing.assert_allclose(patches.reshape(2, side**2, -1), tokens[:, n_prefix:].numpy(), rtol=1e-3, atol=1e-3)


def test_resnet50_leaves_its_classifier_out(one_block, file_of, tiles):
    encoder = quietly("resnet50", weights=file_of("resnet50"))
    features, maps = encoder.encode(tiles(224), "cpu"), encoder.encode_patches(tiles(224), "cpu")
    assert features.shape == (2, 2048)
    assert maps.shape == (2, 7, 7, 2048)
    np.testing.assert_allclose(features, maps.mean((1, 2)), rtol=1e-3, atol=1e-4)
    with pytest.raises(DataValueError, match="no vision transformer with a class token"):
        quietly("resnet50", weights=file_of("resnet50"), pooling="class")


def test_pooling_is_an_option(one_block, file_of, tiles):
    images, path = tiles(224), file_of("uni")
    by = {
        how: quietly("uni", weights=path, pooling=how).encode(images, "cpu")
        for how in ("class", "mean", "class+centre")
    }
    patches = quietly("uni", weights=path).encode_patches(images, "cpu")
    np.testing.assert_allclose(by["mean"], patches.mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(by["class+centre"][:, :1024], by["class"], atol=1e-5)
    np.testing.assert_allclose(by["class+centre"][:, 1024:], patches[:, 6:8, 6:8].mean((1, 2)), atol=1e-4)
    with pytest.raises(DataValueError, match=r"'class\+mean'"):
        quietly("uni", weights=path, pooling="max")
    conch = quietly("conch", weights=file_of("conch"), pooling="class+mean")
    assert conch.encode(tiles(448), "cpu").shape == (2, conch.n_features) == (2, 1536)


def test_tiles_of_another_size(one_block, file_of, tiles):
    path = file_of("uni")
    encoder = quietly("uni", weights=path, tile_px=112)
    assert (encoder.tile_um, encoder.mpp) == (56.0, 0.5)
    assert encoder.encode_patches(tiles(112), "cpu").shape == (2, 7, 7, 1024)
    assert quietly("uni", weights=path, mpp=0.25).tile_um == 56.0
    with pytest.raises(DataValueError, match="multiple of 16"):
        quietly("uni", weights=path, tile_px=100)
    with pytest.raises(DataValueError, match="tile_px=0"):
        quietly("uni", weights=path, tile_px=0)


def test_parameters_identify_and_rebuild(one_block, file_of, tiles):
    path = file_of("phikon-v2")
    encoder = quietly("phikon-v2", weights=path, pooling="mean", dtype="bfloat16")
    params = encoder.params()
    assert params["weights_name"] == "model.safetensors"
    assert str(path.parent) not in str(params)
    again = hx.encoders.create(**params)
    assert again.params() == params
    np.testing.assert_array_equal(again.encode(tiles(224), "cpu"), encoder.encode(tiles(224), "cpu"))
    with pytest.raises(ModelMismatchError, match="other weights"):
        hx.encoders.create(**params | {"weights_sha256": "0" * 64}, weights=path)


def test_an_encoder_goes_to_another_process(file_of, tiles, monkeypatch):
    record = shallow("resnet50").record
    monkeypatch.setattr("hespotex.encoders.pretrained.PUBLISHED", {"resnet50": record})
    monkeypatch.setattr(_registry, "_REGISTERED", {})
    from hespotex.encoders.pretrained import encoder_class

    encoder_class.cache_clear()
    encoder = quietly("resnet50", weights=file_of("resnet50"))
    again = pickle.loads(pickle.dumps(encoder))
    encoder_class.cache_clear()
    assert again.params() == encoder.params()
    np.testing.assert_array_equal(again.encode(tiles(224), "cpu"), encoder.encode(tiles(224), "cpu"))


def test_patch_tokens_of_a_slide(one_block, file_of, slide_of, features_of, noise):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HespotexWarning)
        dense = hx.encoders.create("dense:phikon-v2", weights=file_of("phikon-v2"))
    assert (dense.tile_um, dense.n_features, dense.trained_mpp) == (8.0, 1024, (0.5,))
    assert features_of(dense, slide_of(noise), [[40.0, 50.0], [200.0, 120.0]]).shape == (2, 1024)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``put(hub_id, file, name)``: a hub's cache in a folder of its own, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(hub_id, file, name, commit="0123456789abcdef0123456789abcdef01234567", ref="main"):
        model = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (model / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (model / "blobs").mkdir(exist_ok=True)
        blob = model / "blobs" / f"{len(list(model.glob('blobs/*'))):064x}"  # the hub's files bear hashes as names
        blob.hardlink_to(file)
        (model / "snapshots" / commit / name).symlink_to(blob)
        if ref:
            (model / "refs").mkdir(exist_ok=True)
            (model / "refs" / ref).write_text(commit)

    with hx.settings.override(cache_dir=tmp_path / "own"):
        yield put


def test_weights_are_taken_from_the_hub_s_cache(one_block, hub, file_of):
    assert not hx.encoders.available().loc["uni", "cached"]
    hub("MahmoodLab/uni", file_of("uni"), "model.safetensors")
    assert hx.encoders.available().loc["uni", "cached"]
    encoder = quietly("uni")
    assert encoder.params()["weights_name"] == "hf-hub:MahmoodLab/uni"
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()
    commit = "f" * 40
    hub("owkin/phikon-v2", file_of("phikon-v2"), "model.safetensors", commit=commit, ref=None)
    assert quietly("phikon-v2", revision=commit).params()["weights_name"] == "hf-hub:owkin/phikon-v2"
    with pytest.raises(MissingWeightsError):
        quietly("phikon-v2")


def test_checkpoints_of_pytorch_are_read_too(one_block, hub, file_of, tiles):
    path = file_of("phikon-v2").with_name("pytorch_model.bin")
    torch.save(safetensors.load_file(file_of("phikon-v2")), path)
    hub("owkin/phikon-v2", path, "pytorch_model.bin")
    images = tiles(224)
    both = [quietly("phikon-v2", **given).encode(images, "cpu") for given in ({}, {"weights": file_of("phikon-v2")})]
    np.testing.assert_array_equal(*both)
    path.unlink()


def test_a_file_given_once_is_found_again_by_name(one_block, hub, file_of):
    with pytest.raises(MissingWeightsError):
        quietly("gigapath")
    first = quietly("gigapath", weights=file_of("gigapath").parent)  # the folder it lies in
    assert hx.encoders.available().loc["gigapath", "cached"]
    assert quietly("gigapath").params() == first.params()
    hub("prov-gigapath/prov-gigapath", file_of("gigapath"), "model.safetensors")  # what is published comes first
    assert quietly("gigapath").params()["weights_name"] == "hf-hub:prov-gigapath/prov-gigapath"


@pytest.mark.parametrize("name", ["uni2-h", "conch"])
def test_without_weights_the_error_says_what_to_accept_where_to_log_in_and_how_to_pass_a_file(name, one_block, hub):
    with pytest.raises(MissingWeightsError) as caught:
        quietly(name)
    message = str(caught.value)
    for part in (f"https://huggingface.co/{PUBLISHED[name].hub_id}", "accept", "hf auth login", "weights='<file>'"):
        assert part in message


def test_gated_access_is_told(one_block, hub, monkeypatch):
    hugging = pytest.importorskip("huggingface_hub")

    def refuse(*args, **options):
        response = SimpleNamespace(headers={}, request=None)
        raise hugging.errors.GatedRepoError("403 Client Error.\nAccess to model is restricted", response=response)

    monkeypatch.setattr(hugging, "hf_hub_download", refuse)
    with pytest.raises(
        MissingWeightsError, match=r"403 Client Error.*accept the terms at https://huggingface.co/paige-ai/V"
    ):
        quietly("virchow2")


def test_the_licence_is_shown_once_before_first_use(one_block, file_of):
    with pytest.warns(HespotexWarning, match="phikon-v2: .*Owkin non-commercial"):
        hx.encoders.create("phikon-v2", weights=file_of("phikon-v2"))
    with warnings.catch_warnings(action="error"):
        hx.encoders.create("phikon-v2", weights=file_of("phikon-v2"))
    with pytest.warns(HespotexWarning, match="uni: .*CC-BY-NC-ND"):
        hx.encoders.create("uni", weights=file_of("uni"))


def test_a_file_of_another_encoder_is_refused(one_block, file_of):
    with pytest.raises(CheckpointError, match=r"'uni': Missing key.* …"):
        quietly("uni", weights=file_of("phikon-v2"))
    with pytest.raises(CheckpointError, match="size mismatch"):
        quietly("gigapath", weights=file_of("h-optimus-0"))


def test_a_file_that_does_not_fit_is_not_taken_again(one_block, file_of, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    safetensors.save_file({"weight": torch.zeros(3)}, wrong)
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        with pytest.raises(CheckpointError):
            quietly("phikon-v2", weights=wrong)
        assert not hx.encoders.available().loc["phikon-v2", "cached"]
        quietly("phikon-v2", weights=file_of("phikon-v2"))
        with pytest.raises(CheckpointError):
            quietly("phikon-v2", weights=wrong)
        assert quietly("phikon-v2").params()["weights_name"] == "model.safetensors"
