"""Recorded numbers, and made-up tissue of two types of nuclei."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts, Section, Targets
from hespotex.models.stand.decoder import PublishedDecoder
from hespotex.models.stand.vqvae import VQVAE


@pytest.fixture(scope="session")
def recorded(data_dir) -> Callable[[str], Any]:
    """Reader of the numbers recorded from the released modules: ``recorded("pooling")["p"]``."""
    folder = data_dir / "golden" / "stand"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/stand")
    return lambda name: np.load(folder / f"{name}.npz")


@pytest.fixture
def recorded_vqvae(recorded) -> tuple[VQVAE, Any]:
    """The VQ-VAE with the recorded weights: Keras' kernels are (height, width, in, out), transposed ones (…, out, in)."""
    values = recorded("vqvae")
    network = VQVAE()
    layers = {"enc1": "encoder.0", "enc2": "encoder.2", "enc3": "encoder.4"}
    layers |= {"dec1": "decoder.0", "dec2": "decoder.2", "dec3": "decoder.4"}
    state = {"codebook": torch.tensor(values["E"].T.copy())}
    for ours, theirs in ((layers[name], name) for name in layers):
        state[f"{ours}.weight"] = torch.tensor(values[f"{theirs}_W"]).permute(3, 2, 0, 1).contiguous()
        state[f"{ours}.bias"] = torch.tensor(values[f"{theirs}_b"])
    network.load_state_dict(state)
    return network, values


@pytest.fixture(params=["decoder", "decoder_coexpr"])
def recorded_decoder(request, recorded) -> tuple[PublishedDecoder, Any]:
    """The published decoder with the recorded weights, without and with its layer of co-expression."""
    values = recorded(request.param)
    coexpression = request.param == "decoder_coexpr"
    decoder = PublishedDecoder(784, 9, coexpression=coexpression)
    state = {"threshold": values["b"], "scale": values["w"]}
    names = {"hidden": "f1", "last": "f2"} | ({"coexpression": "coexpr"} if coexpression else {})
    for ours, theirs in names.items():
        state |= {f"{ours}.weight": values[f"{theirs}_W"].T, f"{ours}.bias": values[f"{theirs}_b"]}
    decoder.load_state_dict({name: torch.tensor(array.copy()) for name, array in state.items()})
    return decoder, values


def tissue(
    name: str = "s0",
    *,
    n_spots: int = 40,
    n_genes: int = 5,
    n_features: int = 6,
    per_spot: float = 5.0,
    crops: bool = False,
    unit: str = "counts",
    group: str | None = None,
    seed: int = 0,
) -> tuple[Section, np.ndarray, np.ndarray]:
    """A section of nuclei of two types, the type of each nucleus and the expected counts of each type (2, G).

    The first 10 nuclei lie under no spot, the first spot holds none.
    """
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(96)
    profiles = fixed.gamma(0.7, 3.0, size=(2, n_genes)) + 0.1
    held = 1 + rng.poisson(per_spot, size=n_spots)
    held[0] = 0
    bag = np.repeat(np.arange(n_spots), held)
    m = 10 + len(bag)
    share = sparse.csr_array((np.ones(len(bag)), (bag, 10 + np.arange(len(bag)))), shape=(n_spots, m))
    mix = rng.beta(0.7, 0.7, size=n_spots)
    kind = np.concatenate([np.arange(10) % 2, rng.random(len(bag)) < mix[bag]]).astype(int)
    if crops:
        level = np.array([[200, 150, 180], [110, 60, 140]])[kind][:, None, None, :]
        features = np.clip(level + rng.normal(0, 15, size=(m, 28, 28, 3)), 0, 255).astype(np.uint8).reshape(m, -1)
    else:
        features = fixed.normal(size=(2, n_features))[kind] + 0.5 * rng.normal(size=(m, n_features))
    counts = rng.poisson(share @ profiles[kind])
    side = int(np.ceil(np.sqrt(n_spots)))
    section = Section(
        name=name,
        ids=np.array([f"{name}-{i}" for i in range(n_spots)]),
        features=np.zeros((n_spots, 0), dtype=np.float32),
        coordinates=np.column_stack(np.divmod(np.arange(n_spots), side)) * 100.0,
        targets=Targets(counts, counts.sum(axis=1) + 1.0, tuple(f"g{i}" for i in range(n_genes)), unit),
        group=group,
        parts=Parts(np.arange(m).astype(str), rng.uniform(size=(m, 2)), share, features),
    )
    return section, kind, profiles


@pytest.fixture(scope="session")
def make_tissue() -> Callable[..., tuple[Section, np.ndarray, np.ndarray]]:
    """Maker of such sections."""
    return tissue
