from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import Encoder, EncoderInfo, TileEncoder, _registry
from hespotex.errors import DataTypeError, DataValueError


class Mean(TileEncoder):
    info = EncoderInfo(name="test_mean", n_features=3)
    name = "test_mean"
    tile_px, n_features = 8, 3

    def __init__(self, *, tile_um: float | None = None, mpp: float | None = None) -> None:
        self.set_size(tile_um, mpp, default_um=16.0)

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um}

    def encode(self, tiles, device):
        return tiles.mean((1, 2)).astype(np.float32)


@pytest.fixture
def mean(monkeypatch):
    monkeypatch.setattr(_registry, "_REGISTERED", dict(_registry._REGISTERED))
    return hx.encoders.register(Mean)


def test_registered_encoders_are_made_by_name(mean):
    encoder = hx.encoders.create("test_mean", mpp=0.5)
    assert isinstance(encoder, mean)
    assert isinstance(encoder, Encoder)
    assert (encoder.tile_um, encoder.mpp) == (4.0, 0.5)
    assert hx.encoders.create(**encoder.params()).params() == encoder.params()
    assert "test_mean" in hx.encoders.available().index


def test_available_describes_the_built_in_ones():
    table = hx.encoders.available()
    assert {"morphology", "quiltnet", "timm:<architecture>", "open_clip:<architecture>"} <= set(table.index)
    assert {"rgb", "crops", "dense:<encoder>", "pyramid:<encoder>"} <= set(table.index)
    assert "lazyslide:<model>" in table.index
    assert table.loc["quiltnet", "n_features"] == 512
    assert {"mpp", "tile_um", "licence", "gated", "extra", "cached"} <= set(table.columns)
    assert table.loc["virchow2", "gated"]
    assert table.loc["virchow2", "extra"] == "encoders"


def test_available_says_what_runs_without_the_network(tmp_path):
    with hx.settings.override(cache_dir=tmp_path):
        cached = hx.encoders.available()["cached"]
    assert cached[["morphology", "rgb", "crops"]].all()
    assert not cached[["hipt", "h-optimus-1"]].any()
    assert cached[["timm:<architecture>", "pyramid:<encoder>"]].isna().all()


def test_unknown_names_are_answered_by_near_ones():
    with pytest.raises(DataValueError, match="did you mean 'morphology'"):
        hx.encoders.create("morfology")
    with pytest.raises(DataValueError, match="did you mean 'virchow2' or 'virchow'"):
        hx.encoders.create("Virchow-2")
    with pytest.raises(DataValueError, match="there are"):
        hx.encoders.create("xyzzy")
    with pytest.raises(DataValueError, match="timm:<architecture>"):
        hx.encoders.create("timm")
    with pytest.raises(DataValueError, match="'morphology'"):
        hx.encoders.create("morphology:large")


def test_unknown_options(mean):
    with pytest.raises(DataTypeError, match="colour"):
        hx.encoders.create("test_mean", colour=True)


def test_size_is_given_once(mean):
    assert mean(tile_um=4.0, mpp=0.5).tile_um == 4.0
    with pytest.raises(DataValueError, match="contradict"):
        mean(tile_um=5.0, mpp=0.5)
    with pytest.raises(DataValueError, match="positive"):
        mean(tile_um=-1.0)


def test_the_registry_needs_no_torch():
    code = "import sys, hespotex.encoders as e; e.available(); print({'torch', 'timm', 'open_clip', 'transformers', 'lazyslide_models'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
