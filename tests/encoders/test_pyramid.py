from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.encoders import Encoder, EncoderInfo, TileEncoder, _registry, check_resolution, pyramid
from hespotex.encoders.pyramid import Pyramid
from hespotex.errors import DataValueError, HespotexWarning, ScaleError


class Mean(TileEncoder):
    """Mean and spread of a tile; counts the tiles that it saw."""

    info = EncoderInfo(name="test_tiles")
    name, tile_px, n_features = "test_tiles", 4, 4
    seen: list[float] = []  # shared by copies, as a network is

    def __init__(self, *, tile_um: float | None = None, mpp: float | None = None) -> None:
        self.set_size(tile_um, mpp, default_um=8.0)

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um}

    def encode(self, tiles, device):
        self.seen.extend([self.tile_um] * len(tiles))
        values = tiles / np.float32(255)
        return np.column_stack([values.mean((1, 2)), values.std((1, 2, 3))]).astype(np.float32)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(_registry, "_REGISTERED", dict(_registry._REGISTERED))
    Mean.seen.clear()
    return hx.encoders.register(Mean)


@pytest.fixture(scope="module")
def smooth():
    y, x = np.mgrid[:300, :400]
    rgb = [127 + 100 * np.sin(x / 30), 127 + 100 * np.cos(y / 25), (x + y) / 3]
    return np.stack(rgb, axis=-1).astype(np.uint8)


def test_scales_are_the_encoder_at_each_size(slide_of, features_of, noise):
    encoder = Pyramid("test_tiles", factors=(1, 2, 5), interpolate=False, tile_um=16)
    centres = np.random.default_rng(0).uniform(0, [402, 301], (30, 2))
    found = features_of(encoder, slide_of(noise), centres)
    for position, size in enumerate((16, 32, 80)):
        single = features_of(Mean(tile_um=size), slide_of(noise), centres)
        np.testing.assert_allclose(found[:, 4 * position : 4 * position + 4], single, atol=1e-6)


def test_interpolated_is_about_exact_where_features_are_smooth(slide_of, features_of, smooth):
    slide, centres = slide_of(smooth, mpp=2.0), np.random.default_rng(0).uniform([40, 40], [360, 260], (200, 2))
    found, exact = (
        features_of(Pyramid("test_tiles", interpolate=interpolate), slide, centres) for interpolate in (True, False)
    )
    np.testing.assert_array_equal(found[:, :8], exact[:, :8])  # a lattice as fine as the tiles would save nothing
    assert np.abs(found - exact).max() > 0
    np.testing.assert_allclose(found[:, 8:], exact[:, 8:], atol=0.025)


def test_linear_features_are_interpolated_exactly(slide_of, features_of):
    ramp = np.broadcast_to(np.linspace(20, 220, 401).round()[None, :, None], (300, 401, 3)).astype(np.uint8)
    centres = np.random.default_rng(0).uniform([100, 100], [300, 200], (50, 2))
    found, exact = (
        features_of(Pyramid("test_tiles", factors=(1, 8), interpolate=interpolate), slide_of(ramp), centres)
        for interpolate in (True, False)
    )
    np.testing.assert_allclose(found[:, 4:7], exact[:, 4:7], atol=3e-3)


def test_points_of_the_lattice_are_exact(slide_of, features_of, noise):
    """Also at the border, which ends the lattice."""
    spacing = 0.25 * 16 * 8 / 0.5
    centres = np.array([[0.0, 0.0], [spacing, 2 * spacing], [402, 301], [spacing, 301]])
    found, exact = (
        features_of(Pyramid("test_tiles", factors=(1, 16), interpolate=interpolate), slide_of(noise), centres)
        for interpolate in (True, False)
    )
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_a_regional_scale_costs_no_more_on_a_finer_grid(slide_of, features_of, noise):
    seen = []
    for step in (8.0, 4.0):
        Mean.seen.clear()
        grid = np.stack(np.meshgrid(np.arange(2, 100, step), np.arange(2, 100, step)), axis=-1).reshape(-1, 2)
        features_of(Pyramid("test_tiles", spacing=0.5), slide_of(noise[:100, :100], mpp=2.0), grid)
        seen.append([Mean.seen.count(size) for size in (8.0, 32.0, 128.0)])
    (coarse, *others), finer = seen
    assert finer == [25**2, *others]
    assert coarse == 13**2
    assert others == [14**2, 5**2]


def test_nothing_depends_on_parts_order_or_company(slide_of, features_of, noise, monkeypatch):
    encoder = Pyramid("test_tiles")
    centres = np.random.default_rng(1).uniform(0, [402, 301], (60, 2))
    expected = features_of(encoder, slide_of(noise), centres)
    monkeypatch.setattr(pyramid, "_BYTES_AT_ONCE", 4 * encoder.n_features * 20)
    order = np.random.default_rng(2).permutation(60)
    np.testing.assert_allclose(
        features_of(encoder, slide_of(noise, chunk=170), centres[order]), expected[order], atol=1e-6
    )
    np.testing.assert_allclose(features_of(encoder, slide_of(noise), centres[:3]), expected[:3], atol=1e-6)
    assert list(encoder.embed(slide_of(noise), np.empty((0, 2)), batch_size=8, device="cpu", progress_bar=False)) == []


def test_parameters_rebuild_the_encoder():
    for name, options in (
        ("pyramid:morphology", {"tile_um": 16, "factors": (1, 3)}),
        ("pyramid:rgb", {"interpolate": False}),
        ("pyramid:crops", {"spacing": 0.5, "tile_px": 14}),
    ):
        encoder = hx.encoders.create(name, **options)
        params = encoder.params()
        assert json.loads(json.dumps(params)) == params
        again = hx.encoders.create(**params)
        assert again.params() == params
        assert [scale.params() for scale in again.scales] == [scale.params() for scale in encoder.scales]


def test_an_encoder_that_knows_no_better_is_made_anew_for_each_size(slide_of, features_of, noise):
    class Size(Encoder):
        info = EncoderInfo(name="test_size")
        name, mpp, n_features = "test_size", 0.5, 1

        def __init__(self, tile_um: float = 10.0) -> None:
            self.tile_um = tile_um

        def params(self):
            return {"name": self.name, "tile_um": self.tile_um}

        def embed(self, slide, centres, *, batch_size, device, progress_bar):
            yield np.arange(len(centres)), np.full((len(centres), 1), self.tile_um, np.float32)

    hx.encoders.register(Size)
    assert features_of(Pyramid("test_size", factors=(0.5, 3)), slide_of(noise), [[9, 9]]).tolist() == [[5, 30]]


def test_sizes_grow_with_the_factor():
    assert [s.context_um for s in Pyramid("morphology", tile_um=16).scales] == [48, 192, 768]
    assert [s.mpp for s in Pyramid("rgb").scales] == [0.5, 2.0, 8.0]
    encoder = Pyramid("crops")
    assert [s.mpp for s in encoder.scales] == [0.5, 2.0, 8.0]
    assert encoder.n_features == 3 * 2352
    assert encoder.tile_um == 14.0


def test_the_finest_scale_is_held_to_the_resolution_of_the_slide(slide_of, noise, monkeypatch):
    monkeypatch.setattr(Mean, "info", EncoderInfo(name="test_tiles", is_network=True))
    slide, size = slide_of(noise, mpp=0.5), {"mpp": 0.5}
    with pytest.warns(HespotexWarning, match="enlarged 1.7-fold .*works at 0.3 µm/px"):
        check_resolution(Pyramid("test_tiles", factors=(0.6, 1), **size), slide)
    with pytest.raises(ScaleError, match="enlarge it 3.3-fold"):
        check_resolution(Pyramid("test_tiles", factors=(0.3, 1), **size), slide)
    with warnings.catch_warnings(action="error"):
        check_resolution(Pyramid("test_tiles", factors=(1, 4), **size), slide)
        check_resolution(Pyramid("test_tiles", factors=(4, 16), **size), slide_of(noise, mpp=2.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factors": ()}, "factors"),
        ({"factors": (1, -2)}, "factors"),
        ({"factors": (1, 1)}, "differ"),
        ({"factors": (1, float("nan"))}, "factors"),
        ({"spacing": 0}, "spacing"),
        ({"spacing": 1.5}, "spacing"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(DataValueError, match=match):
        Pyramid("rgb", **options)


def test_through_pp(section):
    hx.pp.embed(section, "pyramid:morphology", tile_um=16, context_um=0)
    features = section["table"].obsm["X_pyramid_morphology"]
    hx.pp.embed(section, "morphology", tile_um=64, context_um=0)
    single = section["table"].obsm["X_morphology"]
    np.testing.assert_allclose(features[:, single.shape[1] : 2 * single.shape[1]], single, atol=1e-5)
