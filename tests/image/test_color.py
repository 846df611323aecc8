from __future__ import annotations

import numpy as np

from hespotex.image.color import (
    HE_VECTORS,
    haematoxylin,
    is_void,
    optical_density,
    stain_tables,
)


def paint(amounts: np.ndarray, vectors: np.ndarray = HE_VECTORS, white: float = 255.0) -> np.ndarray:
    """Colour of glass with these amounts of dye, (..., 2) -> (..., 3) uint8."""
    return np.clip(np.rint(white * 10 ** -(amounts @ vectors)), 0, 255).astype(np.uint8)


def deconvolve(rgb: np.ndarray, white: np.ndarray | float = 255.0) -> np.ndarray:
    """Amounts of haematoxylin, eosin and residual, (h, w, 3) -> (3, h, w)."""
    tables = stain_tables(white=white)
    return sum(tables[:, channel][:, rgb[..., channel]] for channel in range(3))


def test_density_of_a_tenth_of_the_light_is_one():
    rgb = np.array([[200, 20, 2]], np.uint8)
    np.testing.assert_allclose(optical_density(rgb, white=200), [[0, 1, 2]], atol=1e-6)


def test_density_of_black_is_finite_and_largest():
    density = optical_density(np.arange(256, dtype=np.uint8).repeat(3).reshape(-1, 3))
    assert np.isfinite(density).all()
    assert (np.diff(density, axis=0) < 0).all()


def test_white_may_differ_by_channel():
    rgb = np.array([[[240, 220, 238]]], np.uint8)
    assert np.abs(deconvolve(rgb, white=np.array([240, 220, 238]))).max() < 1e-6
    assert np.abs(deconvolve(rgb)).max() > 0.01


def test_amounts_of_dye_are_recovered():
    amounts = np.random.default_rng(0).uniform(0, 0.5, (40, 30, 2))
    found = deconvolve(paint(amounts))
    np.testing.assert_allclose(found[:2], amounts.transpose(2, 0, 1), atol=0.02)
    assert np.abs(found[2]).max() < 0.02  # what is painted by both dyes leaves no residual


def test_tables_equal_the_formula():
    rgb = np.random.default_rng(1).integers(1, 256, (20, 20, 3)).astype(np.uint8)
    residual = np.cross(*HE_VECTORS)
    matrix = np.vstack([HE_VECTORS, residual / np.linalg.norm(residual)])
    expected = -np.log10(rgb / 255.0) @ np.linalg.inv(matrix)
    np.testing.assert_allclose(deconvolve(rgb), expected.transpose(2, 0, 1), atol=1e-5)
    assert stain_tables().shape == (3, 3, 256)


def test_haematoxylin_is_the_first_dye():
    rgb = np.random.default_rng(2).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    np.testing.assert_allclose(haematoxylin(rgb), deconvolve(rgb)[0], atol=1e-6)
    assert haematoxylin(rgb).dtype == np.float32


def test_only_black_is_void():
    rgb = np.array([[0, 0, 0], [10, 12, 9], [40, 5, 70], [255, 255, 255]], np.uint8)
    assert is_void(rgb).tolist() == [True, True, False, False]
