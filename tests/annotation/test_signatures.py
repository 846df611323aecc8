"""Signature scores and cell types; statement 19 of the iStar checklist."""

from __future__ import annotations

import numpy as np
import pytest

from hespotex.annotation.signatures import UNCLASSIFIED, cell_types, enrichment, signature_score
from hespotex.errors import DataValueError

GENES = ("A", "B", "C", "D")


def test_score_is_the_mean_of_scaled_genes():
    values = np.array([[0, 2, 5, 0], [2, 4, 5, 0], [4, 2, 5, 0], [np.nan] * 4])
    score = signature_score(values, GENES, ["A", "B", "missing"], quantiles=None)
    np.testing.assert_allclose(score[:3], [0, 0.75, 0.5])
    assert np.isnan(score[3])
    scaled = signature_score(values * [10, 100, 1, 1], GENES, ["A", "B"], quantiles=None)
    np.testing.assert_allclose(scaled, score)


def test_genes_that_are_hardly_there_do_not_count():
    values = np.array([[0, 1e-4], [1, 0], [2, 5e-4]])
    np.testing.assert_allclose(signature_score(values, "AB", "AB", quantiles=None), [0, 0.5, 1])
    with pytest.raises(DataValueError, match="no gene of the signature reaches"):
        signature_score(values, "AB", "B")


def test_outliers_are_cut():
    values = np.concatenate([np.linspace(0, 1, 5000), [1000]])[:, None]
    score = signature_score(values, "A", "A")
    assert score.max() < 0.01
    assert signature_score(values, "A", "A", quantiles=None).max() == 1


def test_checklist_19_type_is_the_highest_score_unless_it_is_low():
    rng = np.random.default_rng(0)
    values = np.zeros((2000, 4))
    values[:900, :2] = rng.uniform(0.5, 1, (900, 2))
    values[900:1990, 2:] = rng.uniform(0.5, 1, (1090, 2))
    values[-1] = np.nan
    types, confidence = cell_types(values, GENES, {"first": ["A", "B"], "second": ["C", "D"]})
    assert (types[:900] == "first").all()
    assert (types[900:1990] == "second").all()
    assert (types[1990:] == UNCLASSIFIED).all()
    assert np.isnan(confidence[-1])
    expected = signature_score(values, GENES, ["A", "B"])
    np.testing.assert_array_equal(confidence[:900], expected[:900])
    types, _ = cell_types(values, GENES, {"first": ["A", "B"], "second": ["C", "D"]}, threshold=1.1)
    assert (types == UNCLASSIFIED).all()
    assert cell_types(np.array([[0.0], [0.009], [1.0]]), "A", {"t": "A"})[0].tolist() == [UNCLASSIFIED] * 2 + ["t"]


def test_enrichment_counts_and_odds():
    clusters = np.repeat([0, 0, 1, 1, -1], [30, 10, 5, 15, 7])
    types = np.repeat(["a", "b", "a", "b", "a"], [30, 10, 5, 15, 7])
    table = enrichment(clusters, types, pseudocount=0).set_index(["cluster", "type"])
    assert table.loc[(0, "a"), "count"] == 30
    assert table.loc[(0, "a"), "odds_ratio"] == pytest.approx(30 * 15 / (10 * 5))
    assert table.loc[(0, "a"), "log2_odds_ratio"] == pytest.approx(np.log2(9))
    assert np.isnan(table.loc[(0, "b"), "log2_odds_ratio"])
    np.testing.assert_allclose(table.groupby("cluster")["proportion"].sum(), 1)
    alone = enrichment(np.array([0, 0, 1, 1]), np.array(list("aabb")))
    assert np.isfinite(alone["odds_ratio"]).all()


def test_bad_input():
    with pytest.raises(DataValueError, match="none of the genes"):
        signature_score(np.ones((2, 4)), GENES, ["X"])
    with pytest.raises(DataValueError, match="no row"):
        signature_score(np.full((2, 4), np.nan), GENES, ["A"])
    with pytest.raises(DataValueError, match="markers is empty"):
        cell_types(np.ones((2, 4)), GENES, {})
    with pytest.raises(DataValueError, match="cell type 't'"):
        cell_types(np.ones((2, 4)), GENES, {"t": ["X"]})
    with pytest.raises(DataValueError, match="2 cells"):
        enrichment(np.zeros(2), np.zeros(3))
    with pytest.raises(DataValueError, match="negative"):
        enrichment(np.full(2, -1), np.zeros(2))
    with pytest.raises(DataValueError, match="pseudocount"):
        enrichment(np.zeros(2), np.zeros(2), pseudocount=-1)
