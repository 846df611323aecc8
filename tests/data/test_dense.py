"""Positions between measured ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from hespotex.data.dense import between_sections, lattice_offsets, random_points, shifted_points
from hespotex.errors import DataValueError


def hexagonal(side: int = 12, pitch: float = 100.0, angle: float = 0.0) -> np.ndarray:
    row, column = np.divmod(np.arange(side * side), side)
    xy = pitch * np.column_stack([column + row % 2 / 2, row * np.sqrt(3) / 2])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return xy @ turn.T


def inner(positions: np.ndarray, margin: float) -> np.ndarray:
    low, high = positions.min(axis=0) + margin, positions.max(axis=0) - margin
    return positions[((positions > low) & (positions < high)).all(axis=1)]


@pytest.mark.parametrize(("layout", "factor"), [("midpoints", 4), ("triangles", 3)])
def test_hexagonal_lattices_become_denser_by_whole_factors(layout, factor):
    measured = hexagonal(side=60)
    dense, amid = shifted_points(measured, lattice_offsets(layout, 100.0, np.pi / 3), 1e-6)
    np.testing.assert_array_equal(dense[: len(measured)], measured)
    assert amid.sum() / len(measured) == pytest.approx(factor, rel=0.03)
    pitch = 50.0 if layout == "midpoints" else 100 / np.sqrt(3)
    np.testing.assert_allclose(cKDTree(dense).query(inner(dense, 300), k=4)[0][:, 1:], pitch)


def test_square_lattice_halves_its_spacing():
    measured = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), axis=-1).reshape(-1, 2)
    dense, amid = shifted_points(measured, lattice_offsets("square", 1.0, 0.0), 1e-6)
    assert len(dense) == 19 * 19
    assert amid.sum() == 17 * 17
    assert (dense[amid].min(), dense[amid].max()) == pytest.approx((0, 8))
    np.testing.assert_allclose(dense * 2, np.round(dense * 2), atol=1e-9)


def test_a_jittered_lattice_has_each_place_once():
    rng = np.random.default_rng(0)
    measured = hexagonal(angle=0.3) + rng.normal(0, 2, size=(144, 2))
    dense, amid = shifted_points(measured, lattice_offsets("midpoints", 100.0, 0.3), 20.0)
    assert len(dense) == len(shifted_points(hexagonal(), lattice_offsets("midpoints", 100.0, 0.0), 1e-6)[0])
    assert cKDTree(dense).query(dense, k=2)[0][:, 1].min() > 35
    middle = (measured[0] + measured[1]) / 2
    place = int(np.hypot(*(dense - middle).T).argmin())
    assert amid[place]
    assert np.hypot(*(dense[place] - middle)) < 2


def test_integers_are_not_truncated_nor_changed():
    measured = np.array([[0, 0], [2, 0]], dtype=np.int16)
    dense, _ = shifted_points(measured, np.array([[0.0, 2 / 3]]), 1e-6)
    np.testing.assert_allclose(dense[2:], [[0, 2 / 3], [2, 2 / 3]])
    assert measured.tolist() == [[0, 0], [2, 0]]
    np.testing.assert_array_equal(dense, shifted_points(measured.astype(float), np.array([[0.0, 2 / 3]]), 1e-6)[0])


def test_random_points_are_near_the_measured_and_follow_the_generator():
    measured = hexagonal()
    points = random_points(measured, 5, 60.0, np.random.default_rng(3))
    np.testing.assert_array_equal(points[:144], measured)
    assert cKDTree(measured).query(points)[0].max() <= 60
    assert 4 * 144 < len(points) < 7 * 144
    np.testing.assert_array_equal(points, random_points(measured, 5, 60.0, np.random.default_rng(3)))
    for options in ((1.0, 60.0), (5, 0.0)):
        with pytest.raises(DataValueError):
            random_points(measured, *options, np.random.default_rng(0))


def test_sections_between_sections():
    stack = np.array([[0, 0, 0], [1, 2, 1], [3, 4, 2]])
    assert between_sections(stack, 0.5).tolist() == [[1, 2, 0.5], [3, 4, 1.5]]
