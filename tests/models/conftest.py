"""Small sections as plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import shapely

from hespotex.data.section import Parts, Section, Targets
from hespotex.data.shares import disc_shares, inside_shares
from hespotex.models.nn.graphs import nearest


def lattice_section(
    name: str = "s0",
    *,
    side: int = 8,
    n_features: int = 12,
    n_genes: int = 6,
    seed: int = 0,
    group: str | None = None,
    unit: str = "log1p_cp10k",
    noise: float = 0.3,
) -> Section:
    """A square lattice whose expression follows its image features, each section with its own stain shift."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(n_features, n_genes))
    row, column = np.divmod(np.arange(side * side), side)
    xy = np.column_stack([column, row]) * 200.0
    edges = nearest(xy, 4, symmetric=False, include_self=False)
    edges = edges.multiply(edges.T).tocsr()  # at the border, the neighbours beyond the next row do not reciprocate
    field = rng.normal(size=(side * side, n_features))
    field = field + edges @ field / 4
    rate = np.exp(1.5 + 0.4 * np.tanh(field @ mixing) + noise * rng.normal(size=(side * side, n_genes)))
    counts = rng.poisson(rate * 5)
    return Section(
        name=name,
        ids=np.array([f"{name}-{i}" for i in range(side * side)]),
        features=(field + rng.normal(size=n_features)).astype(np.float32),
        coordinates=xy,
        edges=edges,
        targets=Targets(counts, 3.0 * counts.sum(axis=1) + 20, tuple(f"gene{i}" for i in range(n_genes)), unit),
        group=group,
        extras={
            "pixel": xy / 0.5 + rng.uniform(0, 20, size=xy.shape),
            "n_nuclei": rng.poisson(9, side * side).astype(float),
            "n_nuclei_window": rng.poisson(9, side * side) + 1.0,
        },
    )


@pytest.fixture(scope="session")
def make_section() -> Callable[..., Section]:
    """Maker of lattice sections."""
    return lattice_section


def planted(
    name: str = "s0",
    n: int = 80,
    d: int = 6,
    n_genes: int = 4,
    *,
    seed: int = 0,
    noise: float = 0.05,
    **fields: Any,
) -> Section:
    """A section whose expression is one linear function of its features, plus noise, without a graph."""
    weights = np.random.default_rng(99).normal(size=(d, n_genes))
    rng = np.random.default_rng([seed, 1])
    features = rng.normal(size=(n, d)).astype(np.float32)
    counts = features @ weights + noise * rng.normal(size=(n, n_genes)) + 3.0
    values = {
        "ids": np.array([f"{name}-{i}" for i in range(n)]),
        "features": features,
        "coordinates": rng.uniform(0, 1000, size=(n, 2)),
        "targets": Targets(counts, np.full(n, 1e4), tuple(f"g{i}" for i in range(n_genes)), unit="counts"),
    }
    return Section(name=name, **{**values, **fields})


@pytest.fixture(scope="session")
def make_planted() -> Callable[..., Section]:
    """Maker of sections with a planted linear signal."""
    return planted


@pytest.fixture
def trio() -> list[Section]:
    """Three sections of three groups."""
    return [planted(f"s{i}", 40 + 5 * i, seed=i, group=f"p{i}") for i in range(3)]


@pytest.fixture(scope="session")
def reordered() -> Callable[[Section], Section]:
    """The same section with its observations in another order."""

    def reorder(section: Section) -> Section:
        order = np.random.default_rng(5).permutation(section.n_obs)
        targets = section.require_targets()
        return replace(
            section,
            ids=section.ids[order],
            features=section.features[order],
            coordinates=section.coordinates[order],
            region=section.region[order],
            targets=replace(targets, counts=targets.counts[order], library_size=targets.library_size[order]),
        )

    return reorder


def parts_section(
    name: str = "s0",
    *,
    side: int = 40,
    size_um: float = 8.0,
    pitch_um: float = 40.0,
    radius_um: float = 14.0,
    n_features: int = 5,
    n_genes: int = 4,
    depth: float = 30.0,
    level: str = "superpixel",
    seed: int = 0,
    group: str | None = None,
    unit: str = "counts",
) -> tuple[Section, np.ndarray]:
    """Round spots over a square grid of superpixels (or over as many scattered nuclei), and the truth of each part.

    The truth (m, G) is the expected count of a whole part; a spot's counts are Poisson of ``share @ truth``. It follows
    smooth features, the same way in every section.
    """
    rng = np.random.default_rng([seed, 7])
    extent = side * size_um
    row, column = np.divmod(np.arange(side * side), side)
    if level == "superpixel":
        xy = (np.column_stack([column, row]) + 0.5) * size_um
    else:
        xy = rng.uniform(0, extent, size=(side * side // 4, 2))
    waves = np.random.default_rng(98).normal(size=(n_features, 2)) * 2 * np.pi / extent
    phase = rng.uniform(0, 2 * np.pi, size=n_features)
    features = np.sin(xy @ waves.T * 1.5 + phase) + 0.1 * rng.normal(size=(len(xy), n_features))
    mixing = np.random.default_rng(97).normal(size=(n_features, n_genes))
    truth = depth * np.exp(0.7 * features @ mixing) / (np.pi * (radius_um / size_um) ** 2)
    ticks = np.arange(pitch_um / 2, extent, pitch_um)
    spots = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    if level == "superpixel":
        half = size_um / 2
        squares = shapely.box(*(xy - half).T, *(xy + half).T)
        share = disc_shares(spots, radius_um, squares, size_um**2)
    else:
        share = inside_shares(shapely.buffer(shapely.points(spots), radius_um), xy)
    counts = rng.poisson(share @ truth)
    parts = Parts(
        ids=np.arange(len(xy)).astype(str),
        coordinates=xy,
        share=share,
        features=features.astype(np.float32),
        colour=(0.5 + 0.4 * np.tanh(features[:, :3])).astype(np.float32),
        grid=np.column_stack([row, column]) if level == "superpixel" else None,
        size_um=size_um if level == "superpixel" else None,
        level=level,
    )
    section = Section(
        name=name,
        ids=np.array([f"{name}-{i}" for i in range(len(spots))]),
        features=np.zeros((len(spots), 0), dtype=np.float32),
        coordinates=spots,
        targets=Targets(counts, counts.sum(axis=1) + 1.0, tuple(f"g{i}" for i in range(n_genes)), unit),
        group=group,
        parts=parts,
    )
    return section, truth


@pytest.fixture(scope="session")
def make_parts() -> Callable[..., tuple[Section, np.ndarray]]:
    """Maker of sections with parts below their spots, and of the truth."""
    return parts_section
