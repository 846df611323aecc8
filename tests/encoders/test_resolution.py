from __future__ import annotations

import warnings

import numpy as np
import pytest

from hespotex.encoders import EncoderInfo, check_resolution, create
from hespotex.encoders.crops import Crops
from hespotex.errors import HespotexWarning, ScaleError


class Trained(Crops):
    info = EncoderInfo(name="trained", trained_mpp=(0.5, 1.0))
    name = "trained"


@pytest.fixture
def at(slide_of):
    return lambda mpp: slide_of(np.zeros((64, 64, 3), np.uint8), mpp=mpp)


@pytest.mark.parametrize(("mpp", "slide_mpp"), [(0.5, 0.25), (0.5, 0.64), (0.35, 0.35), (1.4, 0.5), (0.75, 0.75)])
def test_near_what_it_was_trained_at_all_is_quiet(at, mpp, slide_mpp):
    with warnings.catch_warnings(action="error"):
        check_resolution(Trained(mpp=mpp), at(slide_mpp))


@pytest.mark.parametrize(("mpp", "says"), [(0.25, "works at 0.25"), (2.0, "works at 2 .*trained at 0.5 to 1")])
def test_far_from_it_a_warning(at, mpp, says):
    with pytest.warns(HespotexWarning, match=says):
        check_resolution(Trained(mpp=mpp), at(0.25))


def test_a_coarse_slide_is_enlarged_with_a_warning_and_not_beyond_twofold(at):
    with pytest.warns(HespotexWarning, match="0.9 µm/px and is enlarged 1.8-fold"):
        check_resolution(Trained(mpp=0.5), at(0.9))
    with pytest.raises(ScaleError, match="enlarge it 2.4-fold"):
        check_resolution(Trained(mpp=0.5), at(1.2))


class Network(Crops):
    info = EncoderInfo(name="network", is_network=True)
    name = "network"


@pytest.mark.parametrize("kind", [Network, Trained])
def test_networks_warn_when_the_slide_is_clearly_enlarged(at, kind):
    with pytest.warns(HespotexWarning) as caught:
        check_resolution(kind(mpp=0.5), at(0.9504))
    (warning,) = caught
    for number in (
        "0.95 µm/px",
        "1.9-fold",
        "works at 0.5 µm/px (a tile of 14 µm)",
        "mpp=0.951), with a tile of 26.61 µm",
    ):
        assert number in str(warning.message)
    with warnings.catch_warnings(action="error"):
        check_resolution(kind(mpp=0.5), at(0.649))
        if kind is Network:
            check_resolution(kind(mpp=0.951), at(0.9504))


def test_which_encoders_are_networks():
    pytest.importorskip("torch")
    import torch

    from hespotex.encoders import from_module
    from hespotex.encoders._registry import get

    names = ("quiltnet", "resnet50", "uni", "timm:any", "open_clip:any", "lazyslide:any")
    assert all(get(name).info.is_network for name in names)
    assert not any(create(name).is_network for name in ("morphology", "rgb", "crops", "pyramid:rgb"))
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert from_module(pool, name="resolution_module", tile_px=16).is_network
    assert create("pyramid:resolution_module").is_network
    assert not from_module(lambda tiles: tiles.mean((1, 2)), name="resolution_function", tile_px=16).is_network


def test_encoders_without_a_training_are_only_held_to_the_limit(at):
    with warnings.catch_warnings(action="error"):
        check_resolution(Crops(mpp=4.0), at(0.25))
        check_resolution(create("morphology"), at(0.9))
    with pytest.raises(ScaleError):
        check_resolution(Crops(mpp=0.25), at(0.6))
