"""Embedding in runs: apart, resumed or on a cluster, the features are those of one undisturbed call."""

from __future__ import annotations

import pickle

import dask.array as da
import numpy as np
import pytest

import hespotex as hx
from hespotex.data import partial
from hespotex.data.geometry import resolve_slide
from hespotex.encoders import EncoderInfo, TileEncoder, _base, create, dense, from_module, morphology, pyramid
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning, MissingWeightsError
from hespotex.pp import _embed, _embed_rows


class Means(TileEncoder):
    """Mean of each channel of each quarter, and how many tiles the batch held: any change of batches shows."""

    info = EncoderInfo(name="means", n_features=13)
    name, tile_px, n_features = "means", 16, 13

    def __init__(self, *, tile_um: float | None = None, mpp: float | None = None) -> None:
        self.set_size(tile_um, mpp, default_um=64.0)

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um}

    def encode(self, tiles, device):
        quarters = tiles.reshape(len(tiles), 2, 8, 2, 8, 3).mean((2, 4)).reshape(len(tiles), 12)
        return np.column_stack([quarters, np.full(len(tiles), len(tiles))]).astype(np.float32)


class Patches(_base.PatchEncoder):
    """Mean colour of 4 x 4 patches."""

    info = EncoderInfo(name="patches", n_features=3)
    name, tile_px, n_features = "patches", 16, 3

    def __init__(self, *, tile_um: float | None = None, mpp: float | None = None) -> None:
        self.set_size(tile_um, mpp, default_um=64.0)

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um}

    def encode(self, tiles, device):
        return tiles.mean((1, 2)).astype(np.float32)

    def encode_patches(self, tiles, device):
        return tiles.reshape(len(tiles), 4, 4, 4, 4, 3).mean((2, 4)).astype(np.float32)


hx.encoders.register(Means)
hx.encoders.register(Patches)


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    monkeypatch.setattr(_base, "_TILES_PER_RUN", 8)
    monkeypatch.setattr(dense, "_TILES_PER_RUN", 2)
    monkeypatch.setattr(morphology, "_PART_PX", 300)
    monkeypatch.setattr(pyramid, "_BYTES_AT_ONCE", 4_000)


@pytest.fixture
def textured(plain_section):
    """A section of 60 spots on smooth noise, in small chunks."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (3, 120, 100), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    centres = rng.uniform([60, 60], [740, 900], (60, 2))
    return plain_section(pixels, centres=centres, chunks=256, mpp=2.0)


NAMES = ["means", "dense:patches", "morphology", "rgb", "pyramid:means"]
SPLIT = ["means", "dense:patches", "morphology", "pyramid:means"]
OPTIONS = {"dense:patches": {"tile_um": 16.0}, "morphology": {"tile_um": 64.0, "context_um": 0}}


def made(name):
    return create(name, **OPTIONS.get(name, {}))


def place(sdata):
    slide = resolve_slide(sdata)
    return slide, np.array([point.coords[0] for point in sdata["spots"].geometry])


def features(encoder, slide, centres, runs, batch_size=4):
    out = np.full((len(centres), encoder.n_features), np.nan, np.float32)
    how = {"batch_size": batch_size, "device": "cpu", "progress_bar": False}
    for number, values in encoder.embed_runs(slide, centres, runs, **how):
        out[runs[number]] = values
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_runs_are_all_rows_once(textured, name, batch_size):
    encoder = made(name)
    slide, centres = place(textured)
    runs = encoder.runs(slide, centres, batch_size=batch_size)
    assert sorted(np.concatenate(runs)) == list(range(60))
    assert (len(runs) > 1) == (name in SPLIT)


@pytest.mark.parametrize("name", NAMES)
def test_runs_apart_are_the_runs_together(textured, name):
    encoder = made(name)
    slide, centres = place(textured)
    runs = encoder.runs(slide, centres, batch_size=4)
    whole = features(encoder, slide, centres, runs)
    assert np.isfinite(whole).all()
    apart = np.full_like(whole, np.nan)
    for run in runs[::-1]:
        ((_, apart[run]),) = encoder.embed_runs(slide, centres, [run], batch_size=4, device="cpu", progress_bar=False)
    np.testing.assert_array_equal(apart, whole)
    # What one call of the encoder gives, but for sums of another part of the slide.
    once = np.empty_like(whole)
    for rows, values in encoder.embed(slide, centres, batch_size=4, device="cpu", progress_bar=False):
        once[rows] = values
    np.testing.assert_allclose(whole, once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [[0], [3], [1, 4, 5], [0, 2, 7]])
def test_runs_that_are_missing_are_computed_as_ever(textured, missing):
    encoder = create("means")
    slide, centres = place(textured)
    runs = encoder.runs(slide, centres, batch_size=4)
    whole = features(encoder, slide, centres, runs)
    some = features(encoder, slide, centres, [runs[number] for number in missing])
    rows = np.concatenate([runs[number] for number in missing])
    np.testing.assert_array_equal(some[rows], whole[rows])
    assert np.isnan(np.delete(some, rows, axis=0)).all()


def test_no_run_gives_nothing(textured):
    encoder = create("means")
    slide, centres = place(textured)
    assert list(encoder.embed_runs(slide, centres, [], batch_size=4, device="cpu", progress_bar=False)) == []


def test_a_chunk_is_read_once_for_all_runs(textured):
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"])
        return block

    slide, centres = place(textured)
    level = type(slide.levels[0])(da.map_blocks(read, slide.levels[0].array, dtype=np.uint8), 1.0)
    reads.clear()  # of dask's own probe
    slide = type(slide)(slide.key, (level,), slide.mpp, slide.to_microns)
    encoder = create("means")
    runs = encoder.runs(slide, centres, batch_size=4)
    features(encoder, slide, centres, runs)
    assert len(runs) > 4
    assert len(reads) == len(set(reads))


@pytest.mark.parametrize("name", ["morphology", "rgb", "timm:resnet10t"])
def test_a_cluster_gives_the_same(section, cluster, name, tmp_path):
    options = {}
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        save_file(timm.create_model(name[5:], pretrained=False, num_classes=0).state_dict(), tmp_path / "w.safetensors")
        options = {"weights": tmp_path / "w.safetensors", "tile_px": 32, "tile_um": 32.0}
    with hx.settings.override(batch_size=4):
        local = hx.pp.embed(section, name, copy=True, **options)
        remote = hx.pp.embed(section, name, copy=True, client=cluster, **options)
    if options:
        np.testing.assert_allclose(remote, local, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(remote, local)


def test_an_encoder_with_a_weights_file_travels_without_its_weights(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    network = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    encoder = create("timm:resnet10t", weights=tmp_path / "w.safetensors", tile_px=32)
    packed = pickle.dumps(_embed_rows._Travelling(encoder))
    assert len(packed) < 10_000
    other = pickle.loads(packed).encoder
    assert other.params() == encoder.params()
    tiles = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(other.encode(tiles, "cpu"), encoder.encode(tiles, "cpu"))
    assert pickle.loads(pickle.dumps(_embed_rows._Travelling(Means()))).encoder.params() == Means().params()
    for around in ("dense", "pyramid"):
        encoder = create(f"{around}:timm:resnet10t", weights=tmp_path / "w.safetensors", tile_px=64)
        packed = pickle.dumps(_embed_rows._Travelling(encoder))
        assert len(packed) < 10_000
        assert pickle.loads(packed).encoder.params() == encoder.params()


def test_interrupted_runs_are_not_embedded_twice(textured, monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    expected = hx.pp.embed(textured, made("morphology"), copy=True)
    sweep = morphology.Morphology._sweep
    seen = []

    def interrupting(self, slide, grid, xy, **how):
        seen.append(len(xy))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return sweep(self, slide, grid, xy, **how)

    with hx.settings.override(cache_dir=tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(morphology.Morphology, "_sweep", interrupting)
            with pytest.warns(HespotexWarning, match="interrupted after"), pytest.raises(KeyboardInterrupt):
                hx.pp.embed(textured, made("morphology"))
            done = sum(seen[:2])
            seen.extend([0, 0, 0])
            hx.pp.embed(textured, made("morphology"))
        assert sum(seen[6:]) == 60 - done
    np.testing.assert_array_equal(textured["table"].obsm["X_morphology"], expected)


def test_a_function_that_was_changed_does_not_go_on_with_what_it_was(textured, monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    batches = []

    def wrong(tiles):
        batches.append(len(tiles))
        if len(batches) == 5:
            raise KeyboardInterrupt
        return tiles.mean((1, 2)) + 1000

    def right(tiles):
        return tiles.mean((1, 2))

    options = {"name": "changing", "tile_px": 16, "tile_um": 64.0}
    with hx.settings.override(cache_dir=tmp_path, batch_size=4):
        encoder = from_module(wrong, **options, n_features=3)
        with pytest.warns(HespotexWarning, match="interrupted after"), pytest.raises(KeyboardInterrupt):
            hx.pp.embed(textured, encoder)
        hx.pp.embed(textured, from_module(right, **options))
        features = textured["table"].obsm["X_changing"]
        assert features.max() < 256
        before = len(batches)
        hx.pp.embed(textured, from_module(wrong, **options))  # nor is what is stored taken for its own
    assert len(batches) > before
    assert textured["table"].obsm["X_changing"].min() >= 1000


def test_features_that_are_none_are_not_kept(textured, monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    calls = []

    class Failing(Means):
        def encode(self, tiles, device):
            calls.append(len(tiles))
            return super().encode(tiles, device) * (np.nan if len(calls) == 6 else 1)

    with hx.settings.override(cache_dir=tmp_path, batch_size=4):
        with (
            pytest.warns(HespotexWarning, match="interrupted after 16 of 60 rows"),
            pytest.raises(DataValueError, match="gave NaN or infinite features for 4 of 8 tiles"),
        ):
            hx.pp.embed(textured, Failing())
        hx.pp.embed(textured, Failing())
    assert np.isfinite(textured["table"].obsm["X_means"]).all()


def test_a_worker_without_the_weights_says_so(section, cluster, tmp_path):
    pytest.importorskip("timm")
    encoder = create("timm:resnet10t", weights=network_file(tmp_path), tile_px=32)
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(
        MissingWeightsError, match=r"a worker of client= lacks the weights of encoder 'timm:resnet10t'.*path"
    ):
        hx.pp.embed(section, encoder, copy=True, client=cluster)


def network_file(folder):
    from safetensors.torch import save_file

    from hespotex._optional import ensure_torchvision

    ensure_torchvision()
    import timm

    save_file(timm.create_model("resnet10t", pretrained=False, num_classes=0).state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def test_the_name_of_a_weights_file_is_no_part_of_the_embedding(section, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    file = network_file(tmp_path)
    options = {"tile_px": 32, "tile_um": 32.0}
    hx.pp.embed(section, "timm:resnet10t", weights=file, **options)
    file = file.rename(tmp_path / "other.safetensors")
    monkeypatch.setattr(_embed, "compute_features", None)  # is not called
    hx.pp.embed(section, "timm:resnet10t", weights=file, **options)
    with pytest.raises(TypeError, match="NoneType"):
        hx.pp.embed(section, "timm:resnet10t", weights=file, tile_px=32, tile_um=40.0)


def test_a_client_must_be_one(section):
    with pytest.raises(DataTypeError, match=r"client must be a dask.distributed.Client"):
        hx.pp.embed(section, "rgb", client="tcp://scheduler:8786")
