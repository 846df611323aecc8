from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import hespotex as hx
from hespotex.errors import DataTypeError, DataValueError, MissingKeyError


@pytest.fixture
def scores() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    means = {"null_density": 0.45, "ridge": 0.3, "hespotex": 0.4, "null_train_mean": 0.0}
    rows = [
        {"model": model, "patient": patient, "section": section, "gene": f"G{gene}", "split_half": 0.5}
        | {"pearson": mean and mean + rng.normal(0, 0.05)}
        for model, mean in means.items()
        for patient, section in (("A", "A1"), ("A", "A2"), ("B", "B1"))
        for gene in range(30)
    ]
    return pd.DataFrame(rows)


def _labels(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def _mean_bars(ax):
    return [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1 and line.get_linewidth() == 1.6]


def test_models_by_falling_mean_then_nulls(scores):
    assert _labels(hx.pl.gene_correlation(scores)) == ["hespotex", "ridge", "null_density", "null_train_mean"]
    assert _labels(hx.pl.gene_correlation(scores, models=["ridge"])) == ["ridge"]


def test_patients_weigh_equally():
    scores = pd.DataFrame({"model": "ridge", "patient": ["A", "A", "B"], "gene": "G", "pearson": [0.0, 0.2, 0.5]})
    assert _mean_bars(hx.pl.gene_correlation(scores)) == pytest.approx([0.3])


def test_the_ceiling_is_that_of_the_metrics(scores):
    ax = hx.pl.gene_correlation(scores)
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(np.sqrt(2 / 3))  # halves that correlate 0.5
    assert "noise ceiling 0.82" in [text.get_text() for text in ax.texts]
    assert not [line for line in hx.pl.gene_correlation(scores, ceiling=False).lines if line.get_linestyle() == "--"]


def test_undefined_genes_are_left_out_and_the_protocol_is_shown(scores):
    scores.loc[scores["gene"] == "G0", "pearson"] = np.nan
    scores.attrs["protocol"] = "leave one patient out"
    assert hx.pl.gene_correlation(scores).get_title(loc="left") == "29 genes, leave one patient out"


def test_bad_tables_are_named(scores):
    with pytest.raises(DataTypeError, match="DataFrame"):
        hx.pl.gene_correlation({"model": []})
    with pytest.raises(MissingKeyError, match="'ssim'"):
        hx.pl.gene_correlation(scores, metric="ssim")
    with pytest.raises(MissingKeyError, match="bleep"):
        hx.pl.gene_correlation(scores, models=["bleep"])
    with pytest.raises(DataValueError, match="no gene has a defined"):
        hx.pl.gene_correlation(scores.assign(pearson=np.nan))
