import numpy as np
import pytest

from hespotex import metrics as m
from hespotex.errors import DataValueError


def smooth_section(seed, side=20, signal=0.5):
    """Maps whose noise is shared by 5 x 5 blocks, as tissue is."""
    rng = np.random.default_rng(seed)
    row, col = np.divmod(np.arange(side * side), side)
    block = row // 5 * (side // 5) + col // 5
    truth = rng.normal(size=(block.max() + 1, 8))[block] + 0.3 * rng.normal(size=(side * side, 8))
    noise = rng.normal(size=(block.max() + 1, 8))[block]
    return truth, signal * truth + noise, block


def test_draws_are_correlations_of_resampled_blocks():
    truth, guess, block = smooth_section(0)
    truth[:, 3] = 1  # undefined, left out
    draws = m.block_draws(truth, guess, block, n_draws=6, seed=5)
    rng = np.random.default_rng(5)
    times = rng.multinomial(16, np.full(16, 1 / 16), size=6)
    for draw, number in zip(draws, times, strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(block == k), number[k]) for k in range(16)])
        assert draw == pytest.approx(np.nanmean(m.pearson(truth[rows], guess[rows])))


def test_interval_holds_its_estimate_and_widens_with_blocks():
    truth, guess, block = smooth_section(1)
    interval = m.block_interval(truth, guess, block)
    assert interval.lower < interval.estimate < interval.upper
    assert interval.estimate == pytest.approx(np.mean(m.pearson(truth, guess)))
    naive = m.block_interval(truth, guess, np.arange(len(truth)))
    assert interval.upper - interval.lower > 1.5 * (naive.upper - naive.lower)


def test_paired_draws_share_their_blocks():
    truth, guess, block = smooth_section(2)
    better = guess + 0.2 * truth
    difference = m.block_draws(truth, better, block, seed=1) - m.block_draws(truth, guess, block, seed=1)
    interval = m.resample_interval(float(difference.mean()), difference)
    assert interval.lower > 0


def test_constant_prediction_and_one_block():
    truth, guess, block = smooth_section(3)
    interval = m.block_interval(truth, np.full_like(guess, 0.1), block, n_draws=50)
    assert (interval.estimate, interval.lower, interval.upper) == (0, 0, 0)
    with pytest.raises(DataValueError, match="single block"):
        m.block_interval(truth, guess, np.zeros(len(truth)))
    with pytest.raises(DataValueError, match="entries"):
        m.block_draws(truth, guess, block[:-1])
    with pytest.raises(DataValueError, match="level"):
        m.resample_interval(0.1, np.ones(3), level=95)
    assert np.isnan(m.resample_interval(np.nan, np.array([np.nan])).lower)


def test_sign_flip_p_values_are_exact():
    result = m.paired_difference(np.arange(1, 9) / 10, np.zeros(8))
    assert result.p_value == 2 / 2**8
    assert m.paired_difference([0.1, -0.1], [0, 0]).p_value == 1
    by_hand = [abs(s1 * 3 + s2 * 1 + s3 * 2) >= 4 for s1 in (1, -1) for s2 in (1, -1) for s3 in (1, -1)]
    assert m.paired_difference([3, -1, 2], [0, 0, 0]).p_value == np.mean(by_hand)


def test_many_patients_use_random_flips_and_the_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.05, 0.02, size=30)
    result = m.paired_difference(difference, np.zeros(30))
    assert result.p_value < 0.001
    assert result.interval.lower < 0.05 < result.interval.upper
    with pytest.raises(DataValueError, match="finite"):
        m.paired_difference([np.nan], [0.0])
