"""What the tests of STAGE share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from hespotex.data.section import Parts, Section, Targets


@pytest.fixture(scope="session")
def golden(data_dir: Path) -> Callable[[str], Any]:
    """Reader of the numbers recorded from the published package: ``golden("losses")["X2_z"]``."""
    folder = data_dir / "golden" / "stage"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/stage")
    return lambda name: np.load(folder / f"{name}.npz")


def waves(
    name: str = "s0",
    *,
    n: int = 60,
    n_genes: int = 5,
    between: int = 40,
    noise: float = 0.3,
    seed: int = 0,
    unit: str = "log1p_cp10k",
) -> tuple[Section, np.ndarray]:
    """Spots at random places, whose expression is a smooth function of position plus noise; and what it is between them."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 5000, size=(n + between, 2))
    frequency, phase = rng.normal(size=(n_genes, 2)) * 2 * np.pi / 5000, rng.uniform(0, 2 * np.pi, n_genes)
    truth = 1.5 + np.sin(xy @ frequency.T + phase)
    measured = np.maximum(truth + noise * rng.normal(size=truth.shape), 0)
    section = Section(
        name=name,
        ids=np.array([f"{name}-{i}" for i in range(n)]),
        features=np.zeros((n, 0), dtype=np.float32),
        coordinates=xy[:n],
        targets=Targets(np.expm1(measured[:n]), np.full(n, 1e4), tuple(f"g{i}" for i in range(n_genes)), unit),
        parts=Parts(np.arange(between), xy[n:], sparse.csr_array((n, between)), level="spot"),
    )
    return section, truth[n:]


@pytest.fixture(scope="session")
def make_waves() -> Callable[..., tuple[Section, np.ndarray]]:
    """Maker of sections that are smooth in space, and of the truth at their parts."""
    return waves
