from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hespotex.data.lattice import array_lattice, detect_lattice


def square(n: int = 8, pitch: float = 200.0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(n), np.arange(n))
    return np.column_stack([x.ravel(), y.ravel()]) * pitch


def hexagonal(n: int = 8, pitch: float = 100.0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(n, dtype=float), np.arange(n))
    x[1::2] += 0.5
    return np.column_stack([x.ravel() * pitch, y.ravel() * pitch * np.sqrt(3) / 2])


def turned(xy: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return xy @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


@pytest.mark.parametrize("degrees", [0, 17, 45, 90])
@pytest.mark.parametrize(("points", "kind", "pitch"), [(square(), "square", 200), (hexagonal(), "hex", 100)])
def test_kind_and_pitch_whatever_the_rotation(points, kind, pitch, degrees):
    lattice = detect_lattice(turned(points, degrees))
    assert lattice.kind == kind
    assert lattice.pitch == pytest.approx(pitch)


@pytest.mark.parametrize(("points", "kind", "pitch"), [(square(), "square", 200), (hexagonal(), "hex", 100)])
def test_scatter_and_holes_do_not_matter(points, kind, pitch):
    rng = np.random.default_rng(0)
    kept = rng.random(len(points)) < 0.7
    lattice = detect_lattice(points[kept] + rng.normal(0, 0.03 * pitch, (kept.sum(), 2)))
    assert lattice.kind == kind
    assert lattice.pitch == pytest.approx(pitch, rel=0.03)


def test_regions_may_be_turned_against_each_other():
    xy = np.vstack([square(), turned(square(), 30)])
    assert detect_lattice(xy) is None
    assert detect_lattice(xy, np.repeat([0, 1], 64)).kind == "square"


def test_no_lattice():
    rng = np.random.default_rng(0)
    assert detect_lattice(rng.random((300, 2))) is None
    assert detect_lattice(np.zeros((10, 2))) is None
    assert detect_lattice(square()[:3]) is None


def test_a_hexagonal_array_has_visiums_proportions():
    row, column = np.meshgrid(np.arange(8), np.arange(16), indexing="ij")
    used = (row + column) % 2 == 0
    row, column = row[used].astype(float), column[used].astype(float)
    xy = np.column_stack([column / 2, row * np.sqrt(3) / 2]) * 80
    kind, pitch = array_lattice(turned(xy, 20), row, column)
    assert kind == "hex"
    assert pitch == pytest.approx(80)
    assert array_lattice(xy * (1, 1.1), row, column) is None
    assert array_lattice(xy, row, row) is None
    staggered = np.column_stack([column * 21.6, row * 24.1])  # ST "2k" arrays: every second position, another ratio
    assert array_lattice(staggered, row, column) is None


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_a_square_array_is_known_by_few_of_its_places(share):
    rng = np.random.default_rng(0)
    places = np.argwhere(rng.random((60, 60)) < share).astype(float)
    xy = turned(places[:, ::-1] * 8 + rng.normal(0, 0.1, places.shape), 30)
    kind, pitch = array_lattice(xy, *places.T)
    assert kind == "square"
    assert pitch == pytest.approx(8, rel=1e-2)
    assert array_lattice(rng.permutation(xy), *places.T) is None


@pytest.mark.data
@pytest.mark.parametrize("section", ["C2", "C3", "C4", "C5"])
def test_legacy_arrays_are_square(her2st_dir, section):
    spots = pd.read_csv(her2st_dir / "spots" / f"{section}_selection.tsv", sep="\t")
    lattice = detect_lattice(spots[["pixel_x", "pixel_y"]].to_numpy() * 0.688)
    assert lattice.kind == "square"
    assert lattice.pitch == pytest.approx(200, rel=0.02)
