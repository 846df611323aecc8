"""Tests on a ViT of two narrow layers with random weights, saved as timm and open_clip save theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import dense
from hespotex.errors import DataValueError, MissingWeightsError, ScaleError

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

PATCH, SIDE, WIDTH = 16, 64, 24  # 4 x 4 tokens


@pytest.fixture(scope="module", autouse=True)
def architectures():
    """A tiny ViT and one with registers under names that timm knows."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}

    def build(options, **more):
        model = VisionTransformer(**size, **more, num_classes=options.get("num_classes", 1000))
        model.pretrained_cfg = {
            "input_size": (3, SIDE, SIDE),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "classifier": "head",
        }
        return model

    def hespotex_tiny(pretrained=False, **options):
        return build(options)

    def hespotex_registers(pretrained=False, **options):
        return build(options, reg_tokens=3)

    for function in (hespotex_tiny, hespotex_registers):
        function.__module__ = __name__
        register_model(function)


def save(folder, name):
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    safetensors.save_file(timm.create_model(name, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory, architectures):
    folder = tmp_path_factory.mktemp("dense")
    return {name: save(folder, name) for name in ("hespotex_tiny", "hespotex_registers", "resnet10t")}


def make(weights, name="hespotex_tiny", **options):
    options = {"mean": 0.5, "std": 0.5, **options}
    return hx.encoders.create(f"dense:timm:{name}", weights=weights[name], **options)


def tokens_of_timm(path, name, tile):
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(safetensors.load_file(path))
    x = torch.from_numpy(np.ascontiguousarray(tile)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return model.forward_features((x - 0.5) / 0.5).numpy()[0]


@pytest.mark.parametrize(("name", "prefix"), [("hespotex_tiny", 1), ("hespotex_registers", 4)])
def test_a_place_gets_the_token_of_the_patch_that_holds_it(weights, slide_of, features_of, noise, name, prefix):
    encoder = make(weights, name)
    assert (encoder.tile_um, encoder.mpp, encoder.n_features) == (8.0, 0.5, WIDTH)
    tile = noise[:SIDE, :SIDE]
    expected = tokens_of_timm(weights[name], name, tile)[prefix:].reshape(4, 4, WIDTH)
    y, x = (axis.ravel() for axis in np.mgrid[:4, :4])
    centres = np.column_stack([x, y]) * PATCH + np.random.default_rng(0).uniform(0, PATCH, (16, 2))
    found = features_of(encoder, slide_of(tile), centres)
    np.testing.assert_allclose(found.reshape(4, 4, WIDTH), expected, atol=1e-4)


def test_tokens_come_from_the_tile_in_which_they_are_most_central(weights, slide_of, features_of, noise):
    """301 x 402 px: 19 x 26 cells, tiles of 4 that begin every 2 cells and end with the image."""
    encoder = make(weights)
    padded = np.full((19 * PATCH, 26 * PATCH, 3), 255, np.uint8)
    padded[:301, :402] = noise
    for cell, first in (
        ((0, 0), (0, 0)),
        ((5, 9), (4, 8)),
        ((6, 10), (4, 8)),
        ((7, 11), (6, 10)),
        ((18, 25), (15, 22)),
    ):
        y, x = (start * PATCH for start in first)
        tile = padded[y : y + SIDE, x : x + SIDE]
        tokens = tokens_of_timm(weights["hespotex_tiny"], "hespotex_tiny", tile)[1:].reshape(4, 4, WIDTH)
        centre = (np.array(cell[::-1]) + 0.4) * PATCH
        found = features_of(encoder, slide_of(noise), centre[None])[0]
        np.testing.assert_allclose(found, tokens[cell[0] - first[0], cell[1] - first[1]], atol=1e-4)


def test_first_cells_are_those_of_the_nearest_tile():
    for width, stride, count in ((4, 2, 19), (14, 7, 100), (7, 7, 30), (5, 1, 9), (4, 2, 3)):
        cells = np.arange(count)
        starts = dense._first_cells(cells, width, stride, count)
        distance = np.abs(starts + width / 2 - cells - 0.5)
        every = np.unique(np.minimum(np.arange(0, count, stride), max(count - width, 0)))
        nearest = np.abs(every[None] + width / 2 - cells[:, None] - 0.5).min(axis=1)
        np.testing.assert_array_equal(distance, nearest)
        assert (starts <= cells).all()
        assert (cells < starts + width).all()


def test_nothing_depends_on_batches_chunks_order_or_company(weights, slide_of, features_of, noise):
    encoder = make(weights)
    centres = np.random.default_rng(1).uniform(0, [402, 301], (200, 2))
    expected = features_of(encoder, slide_of(noise), centres)
    order = np.random.default_rng(2).permutation(200)
    found = features_of(encoder, slide_of(noise, chunk=41), centres[order], batch_size=3)
    np.testing.assert_allclose(found, expected[order], atol=1e-5)
    np.testing.assert_allclose(features_of(encoder, slide_of(noise), centres[:4]), expected[:4], atol=1e-5)
    assert list(encoder.embed(slide_of(noise), np.empty((0, 2)), batch_size=8, device="cpu", progress_bar=False)) == []


def test_only_tiles_that_hold_centres_are_encoded(weights, slide_of, features_of, noise, monkeypatch):
    encoder = make(weights)
    seen = []
    encode = encoder._network.encode_patches
    monkeypatch.setattr(
        encoder._network, "encode_patches", lambda tiles, device: (seen.append(len(tiles)), encode(tiles, device))[1]
    )
    features_of(encoder, slide_of(noise), [[100, 100], [101, 101], [300, 200]])
    assert sum(seen) == 2


def test_sizes_and_parameters(weights, slide_of, features_of, noise):
    encoder = make(weights, tile_um=16, overlap=0.25)
    assert encoder.mpp == 1.0
    params = encoder.params()
    assert json.loads(json.dumps(params)) == params
    assert hx.encoders.create(**params).params() == params
    assert make(weights, mpp=1.0, overlap=0.25).params() == params
    coarse = encoder.resized(2)
    assert (coarse.tile_um, coarse.mpp, encoder.tile_um) == (32, 2.0, 16)
    assert features_of(coarse, slide_of(noise), [[200, 150]]).shape == (1, WIDTH)
    with pytest.raises(ScaleError, match="enlarge"):
        features_of(make(weights, mpp=0.1), slide_of(noise), [[200, 150]])


def test_what_cannot_be(weights, tmp_path):
    with pytest.raises(DataValueError, match="overlap=1"):
        make(weights, overlap=1)
    with pytest.raises(DataValueError, match="contradict"):
        make(weights, tile_um=8, mpp=1)
    with pytest.raises(DataValueError, match="tile_um=-1"):
        make(weights, tile_um=-1)
    with pytest.raises(DataValueError, match="no features by patch"):
        hx.encoders.create("dense:morphology")
    with pytest.raises(DataValueError, match="tile_px=90 .*not whole patches"):
        make(weights, tile_px=90)
    with pytest.raises(DataValueError, match="1 × 1 patches"):
        make(weights, "resnet10t", tile_px=32)
    with pytest.raises(DataValueError, match="dense:<encoder>"):
        hx.encoders.create("dense")
    with pytest.raises(MissingWeightsError):
        hx.encoders.create("dense:timm:hespotex_tiny")


def test_a_convolutional_network_gives_its_last_map(weights, slide_of, features_of, noise):
    encoder = make(weights, "resnet10t", tile_px=96)
    assert (encoder.n_features, encoder.tile_um) == (512, 16.0)
    tile = noise[:96, :96]
    expected = tokens_of_timm(weights["resnet10t"], "resnet10t", tile)  # (channels, y, x)
    found = features_of(encoder, slide_of(tile), [[70, 40]])[0]
    np.testing.assert_allclose(found, expected[:, 1, 2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_patch_tokens_of_open_clip(tmp_path, slide_of, features_of, noise, normalize):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "dense-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "dense-vit.json")
    torch.manual_seed(0)
    model = open_clip.create_model("dense-vit").eval()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = hx.encoders.create(
        "dense:open_clip:dense-vit", weights=tmp_path / "model.safetensors", raw_pixels=True, normalize=normalize
    )
    assert (encoder.n_features, encoder.tile_um) == (64, 16.0)
    model.visual.output_tokens = True
    tile = noise[:64, :64]
    with torch.no_grad():
        expected = model.visual(torch.from_numpy(tile.copy()).permute(2, 0, 1)[None].float())[1].numpy()[0]
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = features_of(encoder, slide_of(tile), [[16, 16], [48, 16], [16, 48], [48, 48]])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # the features of whole tiles are what they were
    pooled = encoder._network.encode(tile[None], "cpu")
    assert pooled.shape == (1, 16)


def test_through_pp_on_a_fine_grid(weights, section):
    hx.pp.embed(section, "dense:timm:hespotex_tiny", weights=weights["hespotex_tiny"], batch_size=16)
    assert section["table"].obsm["X_dense_timm_hespotex_tiny"].shape == (section["table"].n_obs, WIDTH)


@pytest.mark.data
def test_the_last_map_of_a_real_network(data_dir, slide_of, features_of):
    """Averaged over a tile it is the feature of the tile."""
    options = {"mean": 128 / 255, "std": 128 / 255, "pad_type": "same"}
    weights = data_dir / "encoders_timm" / "mobilenetv1_100_padsame.safetensors"
    encoder = hx.encoders.create("dense:timm:mobilenetv1_100", weights=weights, **options)
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    grid = np.stack(np.meshgrid(np.arange(7), np.arange(7)), axis=-1).reshape(-1, 2) * 32 + 16
    tokens = features_of(encoder, slide_of(pixels), grid)
    whole = hx.encoders.create("timm:mobilenetv1_100", weights=weights, **options).encode(pixels[None], "cpu")[0]
    np.testing.assert_allclose(tokens.mean(axis=0), whole, rtol=1e-3, atol=1e-3)
