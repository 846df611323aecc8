from __future__ import annotations

import numpy as np
import pytest

from hespotex.image.features import Octaves, block_mean, halve, level_names, smooth, window_means


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def climb(dyes: np.ndarray, levels: int) -> dict[str, np.ndarray]:
    octaves = Octaves(dyes)
    maps = {}
    for level in range(levels):
        values = octaves.step()
        assert len(values) == len(level_names(level))
        maps.update(zip(level_names(level), values, strict=True))
    return maps


def test_smooth_is_the_binomial_filter():
    from scipy.ndimage import correlate1d

    image = noise(20, 13)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    expected = correlate1d(correlate1d(image, kernel, 0, mode="nearest"), kernel, 1, mode="nearest")
    np.testing.assert_allclose(smooth(image), expected, atol=1e-6)


def test_smooth_keeps_its_input():
    image = noise(2, 8, 8)
    before = image.copy()
    smooth(image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_block_mean(side):
    image = noise(3, 8, 12)
    expected = image.reshape(3, 8 // side, side, 12 // side, side).mean(axis=(2, 4))
    np.testing.assert_allclose(block_mean(image, side), expected, rtol=1e-5)
    if side == 2:
        np.testing.assert_array_equal(halve(image), block_mean(image, 2))


def test_a_flat_image_has_no_texture():
    maps = climb(np.full((2, 64, 64), 0.3, np.float32), 4)
    assert max(np.abs(values).max() for values in maps.values()) < 1e-4


def test_state_survives_its_stack():
    octaves = Octaves(noise(2, 64, 64))
    for level in range(1, 6):
        octaves.step()
        state = octaves.state()
        assert state.shape[0] == Octaves.width(level)
        again = Octaves.restore(level, state.copy())
        np.testing.assert_array_equal(again.state(), state)
    for first, second in zip(octaves.step(), again.step(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_stripes_have_a_direction_and_noise_has_less():
    stripes = np.broadcast_to(0.2 + 0.2 * np.sin(np.arange(64) * np.pi / 4), (2, 64, 64)).astype(np.float32)
    striped, rough = climb(stripes, 3), climb(noise(2, 64, 64), 3)
    inner = np.s_[4:-4, 4:-4]
    assert striped["h_coherence0_2"][inner].min() > 0.95
    assert rough["h_coherence0_2"][inner].mean() < 0.6
    np.testing.assert_allclose(striped["h_coherence0_2"].T, climb(stripes.transpose(0, 2, 1), 3)["h_coherence0_2"])


def test_blobs_are_counted_once_at_their_size():
    y, x = np.mgrid[:128, :128]
    places = [(30, 30), (31, 91), (90, 33), (88, 90), (60, 62)]

    def discs(radius: float) -> np.ndarray:
        image = sum(np.exp(-((y - a) ** 2 + (x - b) ** 2) / radius**2) for a, b in places) * 0.4
        return np.stack([image, np.zeros_like(image)]).astype(np.float32)

    small, large = climb(discs(3.5), 4), climb(discs(8.0), 4)
    assert small["blobs1_1"].sum() == len(places)
    assert large["blobs2_1"].sum() == len(places)
    assert small["blob1_contrast"].sum() > large["blob1_contrast"].sum()
    assert large["blob3_contrast"].sum() > small["blob3_contrast"].sum()
    assert climb(0.5 - discs(3.5), 2)["gaps1"].sum() == len(places)


def slow_mean(values: np.ndarray, x: float, y: float, side: float) -> float:
    """Mean over a window by the share of each cell that lies inside."""

    def shares(centre: float, cells: int) -> np.ndarray:
        index = np.arange(cells)
        return np.clip(np.minimum(index + 1, centre + side / 2) - np.maximum(index, centre - side / 2), 0, None)

    weights = shares(y, values.shape[0])[:, None] * shares(x, values.shape[1])
    return float((weights * values).sum() / weights.sum())


def test_window_means_weigh_cut_cells_by_their_share():
    maps = noise(40, 9, 11)  # more than are tabulated at once
    centres = np.random.default_rng(1).uniform([0, 0], [11, 9], (25, 2))
    sides = [0.3, 1.0, 3.7, 30.0]
    found = window_means(maps, centres, sides)
    for column, side in enumerate(sides):
        for index in (0, 31, 39):
            if side < 1:
                inside = (centres > side / 2).all(1) & (centres < np.array([11, 9]) - side / 2).all(1)
            else:
                inside = np.ones(len(centres), bool)
            expected = [slow_mean(maps[index], *centre, side) for centre in centres[inside]]
            np.testing.assert_allclose(found[inside, column, index], expected, rtol=1e-5)


def test_windows_beyond_the_map_take_the_nearest_cells():
    maps = np.arange(12.0).reshape(1, 3, 4)
    found = window_means(maps, np.array([[-50.0, 1.5], [99.0, 99.0]]), [2.0])
    np.testing.assert_allclose(found.ravel(), [4.0, 11.0])


def test_cells_beyond_the_size_do_not_count():
    maps = np.ones((1, 4, 4))
    maps[..., 3:] = 100
    found = window_means(maps, np.array([[3.0, 2.0]]), [2.0], size=(3.0, 4.0))
    np.testing.assert_allclose(found.ravel(), [1.0])
