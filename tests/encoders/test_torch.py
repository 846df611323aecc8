"""Forward passes of networks: memory that runs out, compilation, batch sizes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import hespotex as hx
from hespotex.encoders import EncoderInfo, TileEncoder, _base, create
from hespotex.encoders._torch import TileNetwork
from hespotex.errors import DataValueError, DeviceMemoryError, HespotexWarning

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Small(torch.nn.Module):
    """A network with a memory for `room` tiles."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 5, 3)
        self.room, self.seen = room, []

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.seen.append(len(x))
        return self.convolution(x).mean((2, 3))


def tiles(n: int = 11) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)


def compiled_by(call):
    """A ``torch.nn.Module.compile`` that puts `call` in the place of what would be compiled."""
    return lambda module, **options: setattr(module, "_compiled_call_impl", call)


def test_pixels_are_normalised():
    network = TileNetwork(torch.nn.Identity(), MEAN, STD, "float32")
    expected = (tiles() / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(network(tiles(), "cpu"), np.moveaxis(expected, -1, 1), rtol=1e-5, atol=2e-6)
    raw = TileNetwork(torch.nn.Identity(), None, None, "float32")
    np.testing.assert_array_equal(raw(tiles(), "cpu"), np.moveaxis(tiles(), -1, 1).astype(np.float32))


def test_a_batch_beyond_memory_is_taken_in_halves():
    module = Small(room=3)
    network, whole = TileNetwork(module, MEAN, STD, "float32"), TileNetwork(Small(), MEAN, STD, "float32")
    with pytest.warns(HespotexWarning) as warned:
        features = network(tiles(), "cpu")
    assert [str(entry.message).partition("batches of ")[2][:2].strip() for entry in warned] == ["6", "3"]
    assert module.seen == [3, 3, 3, 2]
    np.testing.assert_allclose(features, whole(tiles(), "cpu"), rtol=1e-6, atol=1e-6)
    network(tiles(), "cpu")  # it is remembered: no warning, which would be an error here


def test_one_tile_beyond_memory_is_an_error():
    network = TileNetwork(Small(room=0), MEAN, STD, "float32")
    with (
        pytest.warns(HespotexWarning, match="out of memory; going on with batches of 1 tiles"),
        pytest.raises(DeviceMemoryError, match="one tile of 16 × 16 px does not fit into the memory of 'cpu'"),
    ):
        network(tiles(2), "cpu")


def test_other_errors_are_not_taken_for_it():
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        TileNetwork(Broken(), MEAN, STD, "float32")(tiles(), "cpu")


def test_no_tiles_give_no_rows():
    assert TileNetwork(Small(), MEAN, STD, "float32")(tiles(0), "cpu").shape == (0, 5)


def test_a_network_travels_to_another_process():
    network = TileNetwork(Small(), MEAN, STD, "float32")
    network.compile()
    other = pickle.loads(pickle.dumps(network))
    assert other.is_compiled
    other._compiled.stop()
    network._compiled.stop()
    np.testing.assert_array_equal(other(tiles(), "cpu"), network(tiles(), "cpu"))


@pytest.mark.slow
def test_compiled_it_gives_the_same():
    module = Small()
    network, plain = TileNetwork(module, MEAN, STD, "float32"), TileNetwork(Small(), MEAN, STD, "float32")
    network.compile()
    for n in (8, 8, 3):
        np.testing.assert_allclose(network(tiles(n), "cpu"), plain(tiles(n), "cpu"), rtol=1e-5, atol=1e-6)
    assert network.is_compiled


def test_halves_of_a_compiled_batch_are_not_filled_up_to_what_did_not_fit(monkeypatch):
    module = Small(room=3)
    network, whole = TileNetwork(module, MEAN, STD, "float32"), TileNetwork(Small(), MEAN, STD, "float32")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # it sees what is filled up
    network.compile()
    with pytest.warns(HespotexWarning, match="out of memory"):
        features = network(tiles(), "cpu")
    assert module.seen == [3, 3, 3, 3]
    np.testing.assert_allclose(features, whole(tiles(), "cpu"), rtol=1e-6, atol=1e-6)


def test_a_batch_size_is_found_without_compiling_for_each(monkeypatch):
    encoder = hx.encoders.from_module(Small(), name="small_compiled", tile_px=16)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by(compiled.append))
    encoder.compile()
    assert encoder.fitting_batch_size("cpu") >= 8
    assert not compiled
    assert encoder._network.is_compiled


def test_where_torch_cannot_compile_it_goes_on(caplog, monkeypatch):
    network, plain = TileNetwork(Small(), MEAN, STD, "float32"), TileNetwork(Small(), MEAN, STD, "float32")

    def broken(x):
        raise ValueError("no C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by(broken))
    network.compile()
    np.testing.assert_array_equal(network(tiles(), "cpu"), plain(tiles(), "cpu"))
    assert "no C++ compiler" in caplog.text
    assert not network.is_compiled


class Timed(TileEncoder):
    """Takes a second a batch and a hundredth a tile, and has room for `room` tiles."""

    info = EncoderInfo(name="timed", n_features=1)
    name, tile_px, n_features = "timed", 4, 1

    def __init__(self, clock: list[float], room: int = 10_000) -> None:
        self.set_size(None, None, default_um=4.0)
        self.clock, self.room, self.batches = clock, room, []

    def params(self):
        return {"name": self.name}

    def encode(self, tiles, device):
        self.batches.append(len(tiles))
        passes = max(-(-len(tiles) // self.room), 1)
        self.clock[0] += passes + 0.01 * len(tiles)
        return np.zeros((len(tiles), 1), np.float32)


@pytest.mark.parametrize(("room", "best"), [(10_000, 512), (64, 64), (5, 8)])
def test_the_batch_is_as_large_as_it_pays(monkeypatch, room, best):
    clock = [0.0]
    monkeypatch.setattr(_base, "perf_counter", lambda: clock[0])
    assert Timed(clock, room).fitting_batch_size("cpu") == best


def test_embed_with_the_batch_that_fits(section, monkeypatch):
    monkeypatch.setattr(Timed, "fitting_batch_size", lambda self, device: 16)
    encoder = Timed([0.0])
    hx.pp.embed(section, encoder, batch_size="auto")
    assert encoder.batches == [16, 16, 16, 16, 9]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "large"])
def test_batch_sizes_that_are_none(section, batch_size):
    with pytest.raises(DataValueError, match="batch_size=.* whole number of at least 1, or 'auto'"):
        hx.pp.embed(section, "rgb", batch_size=batch_size)


def test_what_stops_earlier_is_not_compiled(monkeypatch):
    module = Small()
    network, plain = TileNetwork(module, MEAN, STD, "float32"), TileNetwork(Small(), MEAN, STD, "float32")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by(pytest.fail))
    network.compile()
    found = network(tiles(), "cpu", forward=module)
    np.testing.assert_array_equal(found, plain(tiles(), "cpu"))
    assert network.is_compiled


def test_only_networks_are_compiled(section):
    with pytest.raises(DataValueError, match="compile=True .* 'morphology' is not"):
        hx.pp.embed(section, "morphology", compile=True)
    with pytest.raises(DataValueError, match="compile=True"):
        create("crops").compile()


def test_a_pyramid_is_compiled_and_sized_as_its_network():
    encoder = hx.encoders.from_module(Small(), name="small_pyramid", tile_px=16)
    pyramid = create("pyramid:small_pyramid")
    pyramid.compile()
    assert encoder._network.is_compiled
    assert all(scale._network is encoder._network for scale in pyramid.scales)
    assert pyramid.fitting_batch_size("cpu") >= 8
    with pytest.raises(DataValueError, match="compile=True .* 'pyramid:morphology'|compile=True .* 'morphology'"):
        create("pyramid:morphology").compile()
    assert create("pyramid:morphology").fitting_batch_size("cpu") is None
