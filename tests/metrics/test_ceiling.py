import numpy as np
import pytest
from scipy import sparse

from hespotex import metrics as m
from hespotex.errors import DataValueError


def poisson_section(seed, n=3000, depth=10_000):
    """Counts with known signal: the rate of each gene varies between spots."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(scale=[0.4, 0.6, 1.0], size=(n, 3))) * 4
    return rate, rng.poisson(rate), np.full(n, depth)


def test_ceiling_is_what_the_true_rate_reaches():
    rate, counts, library = poisson_section(0)
    best = m.pearson(counts, rate)
    result = m.ceiling(m.split_half(counts, library, "counts", n_draws=5))
    np.testing.assert_allclose(result.per_gene, best, atol=0.03)
    assert result.mean_first == pytest.approx(best.mean(), abs=0.02)


def test_halves_share_the_molecules_of_a_spot():
    seen = []

    def transform(counts, library):
        seen.append((counts, library))
        return counts

    _, counts, library = poisson_section(1, n=20)
    m.split_half(counts, library, transform, n_draws=1)
    (first, left), (second, right) = seen
    np.testing.assert_array_equal(first + second, counts)
    np.testing.assert_array_equal(left + right, library)
    assert (left >= first.sum(axis=1)).all()


def test_root_and_both_averages():
    halves = np.array([[0.5, -0.2, np.nan], [0.1, 0.4, np.nan]])
    result = m.ceiling(halves)
    np.testing.assert_allclose(result.per_gene[:2], np.sqrt([0.6 / 1.3, 0.2 / 1.1]))
    assert np.isnan(result.per_gene[2])
    first = np.mean([np.sqrt(1 / 1.5), 0])
    second = np.mean([np.sqrt(0.2 / 1.1), np.sqrt(0.8 / 1.4)])
    assert result.pessimistic == pytest.approx((first + second) / 2)
    assert result.mean_first == pytest.approx(np.nanmean(result.per_gene))
    assert np.isnan(m.ceiling([np.nan]).mean_first)


def test_sparse_counts_and_seed():
    _, counts, library = poisson_section(2, n=50)
    dense = m.split_half(counts, library, seed=3)
    np.testing.assert_array_equal(dense, m.split_half(sparse.csr_array(counts.astype(float)), library, seed=3))
    assert not np.array_equal(dense, m.split_half(counts, library, seed=4))


def test_gene_without_counts_has_no_ceiling_and_empty_spots_survive():
    _, counts, library = poisson_section(3, n=50)
    counts[:, 1] = 0
    counts[4] = library[4] = 0
    result = m.split_half(counts, library)
    assert np.isnan(result[1])
    assert np.isfinite(result[[0, 2]]).all()


def test_what_is_no_count_is_an_error():
    _, counts, library = poisson_section(4, n=10)
    with pytest.raises(DataValueError, match="library_size"):
        m.split_half(counts, counts.sum(axis=1) - 1)
    with pytest.raises(DataValueError, match="library_size"):
        m.split_half(-counts, library)
    with pytest.raises(DataValueError, match="n_draws"):
        m.split_half(counts, library, n_draws=0)
