from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import CheckpointError, DataValueError, MissingWeightsError, ModelMismatchError

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


@pytest.mark.data
@pytest.mark.parametrize(("name", "width"), [("mobilenetv1_100", 1024), ("mobilenetv2_100", 1280)])
def test_the_two_variants_of_a_real_network_agree(data_dir, name, width):
    """The file with turned kernels gives the features of the original on the tile turned by 180°."""
    folder = data_dir / "encoders_timm"
    options = {"mean": 128 / 255, "std": 128 / 255}
    same = hx.encoders.create(
        f"timm:{name}", weights=folder / f"{name}_padsame.safetensors", pad_type="same", **options
    )
    turned = hx.encoders.create(f"timm:{name}", weights=folder / f"{name}_rot180.safetensors", **options)
    tiles = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    a, b = same.encode(tiles, "cpu"), turned.encode(tiles[:, ::-1, ::-1], "cpu")
    assert a.shape == (2, width)
    assert a.min() >= 0
    assert a.max() <= 6
    np.testing.assert_allclose(a, b, atol=1e-3)
