"""Gene–gene correlations of a prediction against those of the measurement."""

from __future__ import annotations

import numpy as np
import pytest

from hespotex import metrics as m
from hespotex.errors import DataValueError


@pytest.fixture
def measured():
    rng = np.random.default_rng(0)
    return rng.gamma(2.0, size=(80, 3)) @ rng.gamma(1.0, size=(3, 12)) + rng.gamma(1.0, size=(80, 12))


def test_correlations_are_those_of_numpy(measured):
    np.testing.assert_allclose(m.coexpression(measured), np.corrcoef(measured, rowvar=False))


def test_a_constant_gene_has_no_correlation(measured):
    measured[:, 2] = 0.1
    found = m.coexpression(measured)
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()
    assert np.isfinite(np.delete(np.delete(found, 2, 0), 2, 1)).all()


def test_scale_and_order_of_observations_do_not_matter(measured):
    rng = np.random.default_rng(1)
    predicted = measured + rng.normal(size=measured.shape)
    score = m.coexpression_score(measured, predicted)
    order = rng.permutation(len(measured))
    other = m.coexpression_score(measured[order], 3 * predicted[order] + 1)
    assert other.pearson == pytest.approx(score.pearson)
    assert other.mae == pytest.approx(score.mae)
    upper = np.triu_indices(12, 1)
    pairs = [np.corrcoef(each, rowvar=False)[upper] for each in (measured, predicted)]
    assert score.pearson == pytest.approx(np.corrcoef(*pairs)[0, 1])
    assert score.bias == pytest.approx((pairs[1] - pairs[0]).mean())


def test_a_mean_correlates_too_much(measured):
    u, s, v = np.linalg.svd(measured - measured.mean(axis=0), full_matrices=False)
    smooth = (u[:, :1] * s[:1]) @ v[:1]
    score = m.coexpression_score(measured, smooth)
    assert score.mae > 0.3
    assert score.bias > 0


def test_the_permutation_test_tells_agreement_from_chance(measured):
    rng = np.random.default_rng(2)
    good = m.coexpression_score(measured, measured + rng.normal(size=measured.shape), n_permutations=199)
    chance = m.coexpression_score(measured, rng.normal(size=measured.shape), n_permutations=199)
    assert good.p_value == pytest.approx(1 / 200)
    assert chance.p_value > 0.02


def test_rarely_detected_and_constant_genes_stay_out(measured):
    measured[:, 0] = 0
    measured[0, 0] = 5
    measured[:, 1] = 2
    assert m.coexpression_score(measured, measured).n_genes == 10
    assert m.coexpression_score(measured, measured, detected=np.r_[np.ones(6), np.zeros(6)]).n_genes == 5


def test_input_that_cannot_be_scored(measured):
    with pytest.raises(DataValueError, match="at least 3 are needed"):
        m.coexpression_score(measured[:, :2], measured[:, :2])
    with pytest.raises(DataValueError, match="one share for each of 12 genes"):
        m.coexpression_score(measured, measured, detected=np.ones(3))
    with pytest.raises(DataValueError, match="1 dimensions"):
        m.coexpression(measured[0])


def test_a_prediction_without_any_pair_is_not_significant():
    measured = np.random.default_rng(0).gamma(2.0, size=(30, 6))
    score = m.coexpression_score(measured, np.ones_like(measured), n_permutations=19)
    assert np.isnan(score.pearson)
    assert np.isnan(score.p_value)
