import math

import numpy as np
import pytest

from hespotex.errors import DataValueError
from hespotex.metrics import lattice_windows, ssim

C1, C2, SD = 0.01**2, 0.03**2, 1.5


def blob(n_row=14, n_col=12, seed=0):
    """A tissue with a ragged edge and a hole, and two maps on it."""
    rng = np.random.default_rng(seed)
    row, col = np.divmod(np.arange(n_row * n_col), n_col)
    inside = (row - 6) ** 2 + (col - 6) ** 2 < 36
    inside &= ~((row == 5) & (col == 5))
    row, col = row[inside], col[inside]
    truth = np.sin(row / 2)[:, None] + 0.3 * rng.normal(size=(len(row), 3))
    return row, col, truth, 0.6 * truth + 0.3 * rng.normal(size=truth.shape) + 0.2


def slow_ssim(y, p, points, centres, full):
    """Plain loops over windows of radius 5, weights from distances."""
    low, high = min(y), max(y)
    y = [(v - low) / (high - low) for v in y]
    p = [min(max((v - low) / (high - low), 0), 1) for v in p]
    values = []
    for cx, cy in centres:
        near = [
            (k, math.exp(-((x - cx) ** 2 + (z - cy) ** 2) / (2 * SD**2)))
            for k, (x, z) in enumerate(points)
            if abs(x - cx) <= 5 + 1e-9 and abs(z - cy) <= 5 + 1e-9
        ]
        total = sum(w for _, w in near)
        if total < full / 2:
            continue
        my = sum(w * y[k] for k, w in near) / total
        mp = sum(w * p[k] for k, w in near) / total
        vy = sum(w * (y[k] - my) ** 2 for k, w in near) / total
        vp = sum(w * (p[k] - mp) ** 2 for k, w in near) / total
        c = sum(w * (y[k] - my) * (p[k] - mp) for k, w in near) / total
        values.append((2 * my * mp + C1) * (2 * c + C2) / ((my**2 + mp**2 + C1) * (vy + vp + C2)))
    return sum(values) / len(values)


def test_square_lattice_against_loops_over_a_masked_raster():
    row, col, truth, guess = blob()
    points = list(zip(row.tolist(), col.tolist(), strict=True))
    centres = [(r, c) for r in range(row.min(), row.max() + 1) for c in range(col.min(), col.max() + 1)]
    full = sum(math.exp(-(a * a + b * b) / (2 * SD**2)) for a in range(-5, 6) for b in range(-5, 6))
    expected = [slow_ssim(truth[:, g].tolist(), guess[:, g].tolist(), points, centres, full) for g in range(3)]
    np.testing.assert_allclose(ssim(truth, guess, lattice_windows(row, col)), expected, rtol=1e-9)


def test_full_raster_agrees_with_scikit_image_away_from_the_border():
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(1)
    truth = rng.uniform(size=(40, 40))
    truth[0, 0], truth[0, 1] = 0, 1
    guess = np.clip(truth + 0.2 * rng.normal(size=truth.shape), 0, 1)
    _, image = structural_similarity(
        truth, guess, gaussian_weights=True, sigma=SD, use_sample_covariance=False, data_range=1, full=True
    )
    row, col = np.divmod(np.arange(1600), 40)
    windows = lattice_windows(row, col)
    per_window = []
    for weight in windows.weights.toarray():
        my, mp = weight @ truth.ravel(), weight @ guess.ravel()
        vy, vp = weight @ (truth.ravel() - my) ** 2, weight @ (guess.ravel() - mp) ** 2
        c = weight @ ((truth.ravel() - my) * (guess.ravel() - mp))
        per_window.append((2 * my * mp + C1) * (2 * c + C2) / ((my**2 + mp**2 + C1) * (vy + vp + C2)))
    np.testing.assert_allclose(ssim(truth.ravel(), guess.ravel(), windows), np.mean(per_window), rtol=1e-9)
    inner = image[10:-10, 10:-10].ravel()
    for value in inner[::37]:
        assert np.min(np.abs(np.array(per_window) - value)) < 1e-6


@pytest.mark.parametrize("shift", [(0, 0), (3, 4), (5, 0)])
def test_hexagonal_array_against_loops_over_true_distances(shift):
    rng = np.random.default_rng(2)
    positions = [
        (r, c) for r in range(12) for c in range(24) if (r + c) % 2 == 0 and (r - 6) ** 2 + (c - 12) ** 2 / 4 < 30
    ]
    row, col = (np.array(values) for values in zip(*positions, strict=True))
    truth = np.cos(col / 4)[:, None] + 0.2 * rng.normal(size=(len(row), 2))
    guess = truth + 0.3 * rng.normal(size=truth.shape)
    step = math.sqrt(3) / 2
    points = [(r * step, c / 2) for r, c in positions]
    lattice = [
        (r * step, c / 2)
        for r in range(row.min(), row.max() + 1)
        for c in range(col.min(), col.max() + 1)
        if (r + c) % 2 == 0
    ]
    full = sum(
        math.exp(-((a * step) ** 2 + (b / 2) ** 2) / (2 * SD**2))
        for a in range(-5, 6)
        for b in range(-10, 11)
        if (a + b) % 2 == 0
    )
    expected = [slow_ssim(truth[:, g].tolist(), guess[:, g].tolist(), points, lattice, full) for g in range(2)]
    windows = lattice_windows(row + shift[0], col + shift[1] + sum(shift) % 2, lattice="hex")
    assert windows.lattice == "hex"
    np.testing.assert_allclose(ssim(truth, guess, windows), expected, rtol=1e-9)


def test_identity_amplitude_and_constants():
    row, col, truth, _ = blob()
    windows = lattice_windows(row, col)
    np.testing.assert_allclose(ssim(truth, truth, windows), 1)
    assert (ssim(truth, 0.2 * truth, windows) < 0.8).all()  # a scale of its own would give 1
    flat = truth.copy()
    flat[:, 0] = 0.3
    result = ssim(truth, flat, windows)
    assert result[0] == 0
    constant = truth.copy()
    constant[:, 1] = 2
    assert np.isnan(ssim(constant, truth, windows)[1])
    assert np.isnan(ssim(constant, constant, windows)[1])


def test_scale_comes_from_the_measurement_so_that_a_common_affine_map_changes_nothing():
    row, col, truth, guess = blob()
    windows = lattice_windows(row, col)
    np.testing.assert_allclose(ssim(5 * truth + 3, 5 * guess + 3, windows), ssim(truth, guess, windows), rtol=1e-9)


def test_spot_order_does_not_matter():
    row, col, truth, guess = blob()
    order = np.random.default_rng(0).permutation(len(row))
    np.testing.assert_allclose(
        ssim(truth[order], guess[order], lattice_windows(row[order], col[order])),
        ssim(truth, guess, lattice_windows(row, col)),
        rtol=1e-12,
    )


def test_what_is_no_array_is_an_error():
    row, col, truth, guess = blob()
    with pytest.raises(DataValueError, match="whole numbers"):
        lattice_windows(row + 0.1, col)
    with pytest.raises(DataValueError, match="share a position"):
        lattice_windows(np.append(row, row[0]), np.append(col, col[0]))
    with pytest.raises(DataValueError, match="not a hexagonal array"):
        lattice_windows(row, col, lattice="hex")
    with pytest.raises(DataValueError, match="lattice='triangle'"):
        lattice_windows(row, col, lattice="triangle")
    with pytest.raises(DataValueError, match="too scattered"):
        lattice_windows([0, 50, 100], [0, 50, 100])
    with pytest.raises(DataValueError, match="windows are for"):
        ssim(truth[:-1], guess[:-1], lattice_windows(row, col))
