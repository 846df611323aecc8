"""Numbers recorded from the published HISTEX modules, and networks that hold their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from hespotex.models.histex.network import OriginalNetwork

_LETTERS = {"query": "Q", "key": "K", "value": "V", "out": "O", "weight": "W", "bias": "b"}


@pytest.fixture(scope="session")
def histex_dir(data_dir: Path) -> Path:
    """Folder of the recorded numbers."""
    folder = data_dir / "golden" / "histex"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/histex")
    return folder


@pytest.fixture(scope="session")
def recorded(histex_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """Reader of a file: ``recorded("metrics")["rmse"]``."""
    return lambda name: dict(np.load(histex_dir / f"{name}.npz"))


@pytest.fixture(scope="session")
def published_network() -> Callable[..., OriginalNetwork]:
    """Maker of the network whose recorded weights start with `prefix`."""

    def make(weights: Mapping[str, np.ndarray], prefix: str = "") -> OriginalNetwork:
        layers = [weights[f"{prefix}dec{i}_W"] for i in range(1, 6)]
        width = weights[f"{prefix}L1_W"].shape[0]
        hidden = [layer.shape[1] for layer in layers[:-1]]
        network = OriginalNetwork(layers[0].shape[0] - width, layers[-1].shape[1], width, hidden)
        names = {name: prefix + recorded_name(name) for name in network.state_dict()}
        network.load_state_dict({name: torch.tensor(weights[theirs]) for name, theirs in names.items()})
        return network.eval()

    return make


@pytest.fixture(scope="session")
def name_of() -> Callable[[str], str]:
    """The recorded name of one of our parameters."""
    return recorded_name


def recorded_name(ours: str) -> str:
    """``block1.attn2.query.weight`` is ``block1_attn2_WQ``, ``link1.weight`` is ``L1_W``, ``layers.0.weight`` ``dec1_W``."""
    first, *rest = ours.split(".")
    if first.startswith("link"):
        return f"L{first[-1]}_W"
    if first == "last":
        return "dec5_W"
    if first == "layers":
        return f"dec{int(rest[0]) + 1}_W"
    attention, part, kind = rest
    return f"{first}_{attention}_{_LETTERS[kind]}{_LETTERS[part]}"
