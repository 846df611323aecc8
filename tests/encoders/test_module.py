from __future__ import annotations

import os
import subprocess
import sys
import warnings

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


@pytest.fixture
def written(tmp_path, monkeypatch):
    """``make(source, name)``: what `source` calls `name`, in a module of the user's own as of its latest edit."""

    def make(source, name="made"):
        names = {"__name__": "mine", "torch": torch, "np": np}
        exec(compile(source, str(tmp_path / "mine.py"), "exec"), names)
        return names[name]

    return make


NET = """
class Net(torch.nn.Module):
    def __init__(self, factor=1):
        super().__init__()
        self.factor = factor
        self.layer = torch.nn.Conv2d(3, 4, 3, bias=False)
        torch.nn.init.ones_(self.layer.weight)
    def forward(self, x):
        return self.pooled(self.layer(x)) * self.factor
    def pooled(self, x):
        return x.mean((2, 3))
made = Net
"""


def identity(thing, name="mine"):
    encoder = hx.encoders.from_module(thing, name=name, tile_px=8)
    return encoder.params(), encoder.code_hash()


def test_a_module_whose_code_or_attributes_change_counts_as_another(written):
    first = identity(written(NET)())
    assert identity(written("\n\n" + NET)()) == first  # further down in the file
    edited = NET.replace("mean(", "amax(")
    hooked = written(NET)()
    hooked.layer.register_forward_hook(lambda module, given, made: made + 1)
    plain = written(NET)()
    plain.layer.register_buffer("bias_of_mine", torch.ones(1), persistent=False)
    for other in (written(edited)(), written(NET)(factor=2), hooked, plain):
        assert identity(other) != first
    with torch.random.fork_rng(devices=[]):
        layers = []
        for norm_first in (False, True):
            torch.manual_seed(0)
            layers.append(torch.nn.TransformerEncoderLayer(8, 2, 8, norm_first=norm_first))
    assert repr(layers[0]) == repr(layers[1])  # which does not show it
    hashes = [hx.encoders.from_module(x, name="t", n_features=8, tile_px=8).code_hash() for x in layers]
    assert hashes[0] != hashes[1]


FUNCTIONS = {
    "closure": "def make(k):\n    return lambda t: t.mean((1, 2)) * k\nmade = make(KEPT)",
    "array": "def make(k):\n    return lambda t: t.mean((1, 2)) * k\nmade = make(np.full(3, KEPT))",
    "default": "def made(t, k=KEPT): return t.mean((1, 2)) * k",
    "keyword": "def made(t, *, k=KEPT): return t.mean((1, 2)) * k",
    "global": "K = KEPT\ndef helper(t): return t.mean((1, 2)) * K\ndef made(t): return helper(t)",
    "partial": "import functools\ndef f(t, k): return t.mean((1, 2)) * k\nmade = functools.partial(f, k=KEPT)",
    "object": (
        "class C:\n    def __init__(self, k): self.k = k\n    def __call__(self, t): return t.mean((1, 2)) * self.k\n"
        "made = C(KEPT)"
    ),
    "method": (
        "class C:\n    __slots__ = ('k',)\n    def run(self, t): return t.mean((1, 2)) * self.k\n"
        "c = C()\nc.k = KEPT\nmade = c.run"
    ),
    "class": "class C:\n    k = KEPT\n    def __call__(self, t): return t.mean((1, 2)) * self.k\nmade = C()",
    "network": (
        "def make(k):\n    m = torch.nn.Linear(3, 2)\n    torch.nn.init.constant_(m.weight, k)\n    m.bias.data.zero_()\n"
        "    return lambda t: m(torch.from_numpy(t).float().mean((1, 2)))\nmade = make(KEPT)"
    ),
    "decorated": ("@torch.no_grad()\ndef made(t):\n    return torch.from_numpy(t).float().mean((1, 2)) * KEPT"),
    "wrapped": "import functools\n@functools.wraps(np.mean)\ndef made(t):\n    return t.mean((1, 2)) * KEPT",
    "code": "def made(t): return t.mean((1, 2)) * KEPT",
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_is_told_from_one_with_other_values(written, kind):
    one, again, two = (identity(written(FUNCTIONS[kind].replace("KEPT", value))) for value in "112")
    assert one == again
    assert one != two


def test_what_cannot_be_compared_counts_as_changed(caplog):
    rng = np.random.default_rng(0)

    def noisy(t):
        return rng.normal(size=(len(t), 3))

    with caplog.at_level("WARNING", logger="hespotex"):
        assert identity(noisy) != identity(noisy)
    assert "not reused: its code depends on a Generator" in caplog.text


def test_an_edited_encoder_is_embedded_anew(written):
    sdata = hx.datasets.synthetic(size_px=200)
    features = []
    for source in (NET, NET.replace("mean(", "amax(")):
        encoder = hx.encoders.from_module(written(source)(), name="net", tile_px=8)
        hx.pp.embed(sdata, encoder, progress_bar=False)
        features.append(sdata["table"].obsm["X_net"].copy())
    assert np.abs(features[0] - features[1]).max() > 0


def test_code_has_one_hash_in_all_sessions():
    script = (
        "import re\nfrom hespotex.encoders._code import hash_code\nkept = {'x', 'y', 'z'}, re.compile('a')\n"
        "print(hash_code(lambda t: t if 'a' in {'aa', 'bb', 'cc'} else kept))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(hashes) == 1


def test_networks_of_packages_and_compiled_ones_can_be_compared(caplog):
    timm = pytest.importorskip("timm")
    from hespotex.encoders._code import hash_code

    def made(script):
        torch.manual_seed(0)
        network = timm.create_model("resnet10t").eval()
        return torch.jit.trace(network, torch.zeros(1, 3, 32, 32)) if script else network

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for script in (False, True):
            assert hash_code(made(script)) == hash_code(made(script))
    assert "not reused" not in caplog.text
