"""Every formula against an independent slow implementation, and every row of the edge-case policy."""

import math

import numpy as np
import pytest

from hespotex import metrics as m
from hespotex.errors import DataValueError


def slow_pearson(y, p):
    y, p = list(map(float, y)), list(map(float, p))
    my, mp = math.fsum(y) / len(y), math.fsum(p) / len(p)
    syp = math.fsum((a - my) * (b - mp) for a, b in zip(y, p, strict=True))
    syy = math.fsum((a - my) ** 2 for a in y)
    spp = math.fsum((b - mp) ** 2 for b in p)
    return syp / math.sqrt(syy * spp)


def slow_ranks(values):
    values = list(values)
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def slow_variance(y):
    mean = math.fsum(y) / len(y)
    return math.fsum((a - mean) ** 2 for a in y) / len(y)


SLOW = {
    "pearson": slow_pearson,
    "spearman": lambda y, p: slow_pearson(slow_ranks(y), slow_ranks(p)),
    "mse": lambda y, p: math.fsum((a - b) ** 2 for a, b in zip(y, p, strict=True)) / len(y),
    "rmse": lambda y, p: math.sqrt(SLOW["mse"](y, p)),
    "mae": lambda y, p: math.fsum(abs(a - b) for a, b in zip(y, p, strict=True)) / len(y),
    "nrmse": lambda y, p: SLOW["rmse"](y, p) / math.sqrt(slow_variance(y)),
    "variance_ratio": lambda y, p: slow_variance(p) / slow_variance(y),
}
CORRELATIONS = [m.pearson, m.spearman]
ALL = [m.pearson, m.spearman, m.mse, m.rmse, m.mae, m.nrmse, m.variance_ratio]


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = np.log1p(rng.poisson(1.5, size=(37, 6)).astype(float))  # with ties
    return truth, 0.4 * truth + rng.normal(size=truth.shape)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_formula(pair, name, dtype):
    truth, guess = (values.astype(dtype) for values in pair)
    expected = [SLOW[name](y, p) for y, p in zip(truth.T.tolist(), guess.T.tolist(), strict=True)]
    np.testing.assert_allclose(getattr(m, name)(truth, guess), expected, rtol=1e-10)


def test_r2_against_training_mean_and_own_mean(pair):
    truth, guess = pair
    for reference in (np.full(6, 0.3), None):
        means = truth.mean(axis=0) if reference is None else reference
        expected = [1 - sum((y - p) ** 2) / sum((y - c) ** 2) for y, p, c in zip(truth.T, guess.T, means, strict=True)]
        np.testing.assert_allclose(m.r2(truth, guess, reference), expected)
    np.testing.assert_allclose(m.r2(truth, np.tile(means, (37, 1)), means), 0, atol=1e-12)
    assert np.isnan(m.r2(truth, guess, np.array([np.nan, 0, 0, 0, 0, 0]))[0])
    with pytest.raises(DataValueError, match="training_mean"):
        m.r2(truth, guess, np.zeros(5))


def test_relative_variance_distance(pair):
    truth, guess = pair
    expected = np.mean([(p.var() - y.var()) ** 2 / y.var() ** 2 for y, p in zip(truth.T, guess.T, strict=True)])
    ratio = m.variance_ratio(truth, guess)
    assert m.relative_variance_distance(ratio) == pytest.approx(expected)
    assert m.relative_variance_distance(np.append(ratio, np.nan)) == pytest.approx(expected)
    assert math.isnan(m.relative_variance_distance([np.nan]))


def test_oversmoothed_prediction_is_flagged(pair):
    truth, _ = pair
    guess = 0.2 * truth
    assert m.is_oversmoothed(m.pearson(truth, guess), m.variance_ratio(truth, guess)).all()
    assert not m.is_oversmoothed(m.pearson(truth, truth), m.variance_ratio(truth, truth)).any()


# Section 2, row by row.


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("level", [0.0, 3.7])
def test_constant_measurement_is_undefined(pair, metric, level):
    truth, guess = pair
    truth[:, 2] = level
    result = metric(truth, guess)
    assert np.isnan(result[2])
    assert np.isfinite(np.delete(result, 2)).all()
    truth[0, 2] += 1e-6  # variance below 1e-12
    assert np.isnan(metric(truth, guess)[2])


@pytest.mark.parametrize("metric", CORRELATIONS)
@pytest.mark.parametrize("level", [0.0, 0.1, 1e8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_prediction_is_wrong_not_missing(pair, metric, level, dtype):
    truth, guess = (values.astype(dtype) for values in pair)
    guess[:, 1] = level
    assert metric(truth, guess)[1] == 0
    guess[::2, 1] *= 1 + np.finfo(dtype).eps  # rounding noise of a network that outputs a constant
    assert metric(truth, guess)[1] == 0


def test_checklist_25_flat_predictions_and_undefined_genes_are_counted(pair):
    truth, guess = pair
    truth[:, 0], guess[:, 0], guess[:, 1] = 1, 1, 1
    table = m.score(truth, guess, list("ABCDEF"))
    assert table["undefined"].tolist() == [True] + [False] * 5
    assert table["flat"].tolist() == [False, True] + [False] * 4


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_prediction_that_is_not_finite_is_an_error_or_zero(pair, metric, value):
    truth, guess = pair
    guess[3, 4] = value
    with pytest.raises(
        DataValueError, match=r"predicted has 1 values that are not finite, in 1 genes.*nan_policy='zero'"
    ):
        metric(truth, guess)
    filled = guess.copy()
    filled[3, 4] = 0
    np.testing.assert_array_equal(metric(truth, guess, nan_policy="zero"), metric(truth, filled))
    assert guess[3, 4] == value or np.isnan(guess[3, 4])
    with pytest.raises(DataValueError, match="nan_policy='drop'"):
        metric(truth, guess, nan_policy="drop")


@pytest.mark.parametrize("metric", ALL)
def test_unmeasured_gene_is_masked_not_zero(pair, metric):
    truth, guess = pair
    expected = metric(truth, guess)
    truth[:, 5] = np.nan
    result = metric(truth, guess)
    assert np.isnan(result[5])
    np.testing.assert_array_equal(result[:5], expected[:5])
    truth[0, 0] = np.nan
    with pytest.raises(DataValueError, match="whole column"):
        metric(truth, guess)


@pytest.mark.parametrize("metric", ALL)
def test_single_spot_all_zero_and_wrong_shapes(pair, metric):
    truth, guess = pair
    assert np.isnan(metric(truth[:1], guess[:1])).all()
    assert np.isnan(metric(np.zeros((5, 2)), np.zeros((5, 2)))).all()
    assert metric(truth[:, :0], guess[:, :0]).shape == (0,)
    assert metric(truth[:, 0], guess[:, 0]).shape == (1,)
    with pytest.raises(DataValueError, match="no observations"):
        metric(truth[:0], guess[:0])
    with pytest.raises(DataValueError, match="must be equal"):
        metric(truth, guess[:, :3])


def test_negative_predictions_are_allowed_and_their_share_is_told(pair):
    truth, guess = pair
    assert np.isfinite(m.pearson(truth, guess - 5)).all()
    assert m.clipped_fraction(np.array([[-1.0, 0.0], [2.0, -3.0]])) == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_offset_does_not_cancel(dtype):
    rng = np.random.default_rng(1)
    truth = (rng.normal(size=(200, 1)) + 1e4).astype(dtype)
    guess = (truth + rng.normal(size=truth.shape).astype(dtype)).astype(dtype)
    expected = slow_pearson(truth[:, 0].tolist(), guess[:, 0].tolist())
    np.testing.assert_allclose(m.pearson(truth, guess), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_pearson_is_affine_invariant(pair, scale):
    truth, guess = pair
    expected = m.pearson(truth, guess)
    np.testing.assert_allclose(m.pearson(truth, guess * scale), expected, rtol=1e-9)
    np.testing.assert_allclose(m.pearson(truth, -guess * scale), -expected, rtol=1e-9)
    np.testing.assert_allclose(m.pearson(3 * truth + 2, 5 * guess - 1), expected, rtol=1e-9)


def test_spearman_is_invariant_to_monotone_maps(pair):
    truth, guess = pair
    np.testing.assert_allclose(m.spearman(truth, np.exp(guess)), m.spearman(truth, guess))


@pytest.mark.parametrize("metric", ALL)
def test_order_of_spots_and_genes_does_not_matter(pair, metric):
    truth, guess = pair
    rng = np.random.default_rng(2)
    spots, genes = rng.permutation(37), rng.permutation(6)
    np.testing.assert_allclose(
        metric(truth[spots][:, genes], guess[spots][:, genes]), metric(truth, guess)[genes], rtol=1e-12
    )


def test_blocks_of_genes_change_nothing(pair, monkeypatch):
    from hespotex.metrics import _inputs

    expected = {metric: metric(*pair) for metric in ALL}
    monkeypatch.setattr(_inputs, "_BLOCK_VALUES", 80)
    for metric, values in expected.items():
        np.testing.assert_array_equal(metric(*pair), values)


def test_inputs_are_left_alone(pair):
    truth, guess = pair
    copies = truth.copy(), guess.copy()
    for metric in ALL:
        metric(truth, guess)
    np.testing.assert_array_equal(truth, copies[0])
    np.testing.assert_array_equal(guess, copies[1])


@pytest.mark.parametrize("family", ["poisson", "nb"])
def test_deviance_explained(family):
    rng = np.random.default_rng(3)
    library = rng.integers(500, 2000, 30).astype(float)
    share = np.array([0.01, 0.002])
    truth = rng.poisson(library[:, None] * share * rng.gamma(2, 0.5, size=(30, 2))).astype(float)
    guess = library[:, None] * share * 1.3
    size = 2.0  # 1 / dispersion

    def log_likelihood(y, mean):
        if family == "poisson":
            return y * math.log(mean) - mean - math.lgamma(y + 1) if mean > 0 else 0.0
        base = math.lgamma(y + size) - math.lgamma(size) - math.lgamma(y + 1)
        return base + size * math.log(size / (size + mean)) + (y * math.log(mean / (size + mean)) if y else 0.0)

    def deviance(y, mean):
        return 2 * sum(
            (log_likelihood(a, a) if a else 0.0) - log_likelihood(a, b) for a, b in zip(y, mean, strict=True)
        )

    result = m.deviance_explained(truth, guess, library, share, family=family, dispersion=1 / size)
    for gene in range(2):
        expected = 1 - deviance(truth[:, gene], guess[:, gene]) / deviance(truth[:, gene], library * share[gene])
        assert result[gene] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(
        m.deviance_explained(truth, library[:, None] * share, library, share, family=family), 0, atol=1e-12
    )
    with pytest.raises(DataValueError, match="family"):
        m.deviance_explained(truth, guess, library, share, family="normal")
    with pytest.raises(DataValueError, match="negative"):
        m.deviance_explained(-truth, guess, library, share)


def test_score_refuses_what_it_does_not_know(pair):
    with pytest.raises(DataValueError, match=r"metrics=\['r'\]"):
        m.score(*pair, list("ABCDEF"), metrics=["r"])
    with pytest.raises(DataValueError, match="windows="):
        m.score(*pair, list("ABCDEF"), metrics=["ssim"])
    with pytest.raises(DataValueError, match="2 genes for 6 columns"):
        m.score(*pair, ["A", "B"])
