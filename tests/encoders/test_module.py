from __future__ import annotations

import sys

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import _registry
from hespotex.errors import DataTypeError, DataValueError, ModelMismatchError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(_registry, "_OWN", {})


class Narrow(torch.nn.Module):
    def __init__(self, seed: int = 0, act: type = torch.nn.ReLU) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, stride=4), torch.nn.BatchNorm2d(5), act())

    def forward(self, x):
        return self.layers(x).mean((2, 3))


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)


def test_a_module_is_fed_normalised_images_in_evaluation_mode(tiles):
    module = Narrow().train()
    encoder = hx.encoders.from_module(module, tile_px=16, mpp=0.25, mean=0.5, std=(0.2, 0.3, 0.4))
    assert module.training  # it was copied
    assert all(parameter.requires_grad for parameter in module.parameters())
    x = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - 0.5) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = module.eval()(x).numpy()
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), expected, atol=1e-5)
    assert (encoder.name, encoder.n_features, encoder.tile_um, encoder.mpp) == ("narrow", 5, 4.0, 0.25)
    half = hx.encoders.from_module(module, name="half", tile_px=16, mean=0.5, std=0.3, dtype="bfloat16")
    assert half.encode(tiles, "cpu").dtype == np.float32


def test_weights_and_structure_are_its_identity():
    def made(module, **options):
        return hx.encoders.from_module(module, name="mine", tile_px=16, **options).params()

    first = made(Narrow(0))
    assert made(Narrow(0)) == first
    trained = Narrow(0)
    with torch.no_grad():
        trained.layers[0].bias[0] += 1e-3
    others = [
        made(trained),
        made(Narrow(0, torch.nn.GELU)),
        made(Narrow(0), mean=0.5),
        made(Narrow(0), dtype="bfloat16"),
    ]
    assert all(other != first for other in others)


def test_a_function_gets_pixels_and_needs_a_name(tiles):
    encoder = hx.encoders.from_module(lambda given: given.mean((1, 2)), name="colour", tile_px=16, tile_um=10)
    np.testing.assert_allclose(encoder.encode(tiles, "cpu"), tiles.mean((1, 2)), rtol=1e-6)
    assert encoder.params() == {"name": "colour", "tile_px": 16, "tile_um": 10.0}
    torchy = hx.encoders.from_module(lambda given: torch.tensor(given[:, 0, 0]).half(), name="corner", tile_px=16)
    np.testing.assert_array_equal(torchy.encode(tiles, "cpu"), tiles[:, 0, 0])
    with pytest.raises(DataTypeError, match="name="):
        hx.encoders.from_module(lambda given: given)
    with pytest.raises(DataValueError, match="are for modules"):
        hx.encoders.from_module(lambda given: given.mean((1, 2)), name="colour", mean=0.5)


def test_what_comes_out_must_be_one_row_each():
    with pytest.raises(DataValueError, match=r"shape \(1, 16, 16, 3\).*one row"):
        hx.encoders.from_module(lambda given: given, name="pixels", tile_px=16)
    widths = iter([3, 4])
    encoder = hx.encoders.from_module(lambda given: np.ones((len(given), next(widths))), name="moody", tile_px=16)
    with pytest.raises(DataValueError, match=r"shape \(2, 4\).*\(2, 3\)"):
        encoder.encode(np.zeros((2, 16, 16, 3), np.uint8), "cpu")
    assert hx.encoders.from_module(lambda given: given, name="lazy", tile_px=16, n_features=7).n_features == 7


def test_its_name_is_known_in_this_session():
    encoder = hx.encoders.from_module(Narrow(), name="mine", tile_px=16)
    assert hx.encoders.create("mine") is encoder
    assert hx.encoders.create(**encoder.params()) is encoder
    wide = hx.encoders.create(**encoder.params() | {"tile_um": 16.0})
    assert (wide.tile_um, encoder.tile_um) == (16.0, 8.0)
    assert hx.encoders.create("mine", mpp=1.0).tile_um == 16.0
    assert hx.encoders.create("pyramid:mine", factors=(1, 2)).n_features == 10
    row = hx.encoders.available().loc["mine"]
    assert (row["n_features"], row["tile_um"], row["cached"]) == (5, 8.0, True)
    with pytest.raises(ModelMismatchError, match="weights_sha256"):
        hx.encoders.create(**encoder.params() | {"weights_sha256": "0" * 64})
    with pytest.raises(DataTypeError, match="colour"):
        hx.encoders.create("mine", colour=1)
    with pytest.raises(DataValueError, match="belongs to another"):
        hx.encoders.from_module(Narrow(), name="morphology", tile_px=16)
    with pytest.raises(DataValueError, match=r"from_module\(module, name='yours'\)"):
        hx.encoders.create("yours")


def test_names_modules_functions_and_encoders_are_taken_alike():
    made = hx.encoders.as_encoder("crops", tile_px=16)
    assert hx.encoders.as_encoder(made) is made
    assert hx.encoders.as_encoder(Narrow(), tile_px=16).name == "narrow"
    with pytest.raises(DataValueError, match=r"\['tile_px'\] are options"):
        hx.encoders.as_encoder(made, tile_px=8)
    for wrong in (Narrow, 3, None):
        with pytest.raises(DataTypeError, match=r"torch\.nn\.Module"):
            hx.encoders.as_encoder(wrong)
    with pytest.raises(DataTypeError, match="Module or a function"):
        hx.encoders.from_module(Narrow)


def test_a_function_needs_no_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    encoder = hx.encoders.from_module(lambda given: given.mean((1, 2)), name="colour", tile_px=16)
    assert "torch" not in sys.modules
    assert encoder.n_features == 3


def test_a_module_can_be_compiled_and_a_function_not(monkeypatch):
    asked = []
    monkeypatch.setattr("hespotex.encoders._torch.TileNetwork.compile", lambda self: asked.append(self))
    hx.encoders.from_module(Narrow(), tile_px=16).compile()
    assert len(asked) == 1
    with pytest.raises(DataValueError, match="networks of torch"):
        hx.encoders.from_module(lambda given: given.mean((1, 2)), name="colour", tile_px=16).compile()


def test_on_a_slide(slide_of, features_of, noise):
    encoder = hx.encoders.from_module(lambda given: given.mean((1, 2)), name="colour", tile_px=16)
    features = features_of(encoder, slide_of(noise), [[60.0, 50.0], [200.0, 120.0]])
    np.testing.assert_allclose(features[0], noise[42:58, 52:68].mean((0, 1)), atol=0.5)
