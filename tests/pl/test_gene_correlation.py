from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

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


def _dots(ax):
    return [artist for artist in ax.collections if isinstance(artist, PathCollection)]


def _mean_bars(ax):
    return [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1 and line.get_linewidth() == 1.6]


def test_models_by_falling_mean_then_nulls(scores):
    assert _labels(hx.pl.gene_correlation(scores)) == ["hespotex", "ridge", "null_density", "null_train_mean"]
    assert _labels(hx.pl.gene_correlation(scores, models=["ridge"])) == ["ridge"]
    assert _labels(hx.pl.gene_correlation(scores, models="ridge")) == ["ridge"]


def test_the_least_error_is_on_top_and_colours_stay(scores):
    def colours(ax):
        return dict(zip(_labels(ax), [tuple(dots.get_facecolor()[0, :3]) for dots in _dots(ax)], strict=True))

    scores["rmse"] = scores["pearson"] + 1  # the best in one is the worst in the other
    scores.attrs["unit"] = "log1p_cp10k"
    ax = hx.pl.gene_correlation(scores, metric="rmse")
    assert _labels(ax) == ["ridge", "hespotex", "null_train_mean", "null_density"]
    assert ax.get_xlabel() == "root mean squared error per gene, within sections (log1p CP10k)"
    assert colours(ax) == colours(hx.pl.gene_correlation(scores))


def test_nulls_of_a_constant_prediction_are_drawn_on_request_only(scores):
    mean = scores[scores["model"] == "null_train_mean"].assign(flat=True)
    shuffled = mean.assign(model="null_shuffle:mean")
    scores = pd.concat([scores.assign(flat=False), mean.assign(model="mean"), shuffled], ignore_index=True)
    assert _labels(hx.pl.gene_correlation(scores)) == ["hespotex", "ridge", "mean", "null_density", "null_train_mean"]
    assert _labels(hx.pl.gene_correlation(scores, models="null_shuffle:mean")) == ["null_shuffle:mean"]


def test_small_sections_are_left_out_or_kept_on_request(scores):
    scores["n_spots"] = scores["section"].map({"A1": 100, "A2": 100, "B1": 15})
    scores.loc[scores["section"] == "B1", "pearson"] = 0.9
    assert max(_mean_bars(hx.pl.gene_correlation(scores))) < 0.5
    assert max(_mean_bars(hx.pl.gene_correlation(scores, min_spots=1))) > 0.6
    with pytest.raises(DataValueError, match="min_spots=20 spots, the largest has 15"):
        hx.pl.gene_correlation(scores[scores["section"] == "B1"])


def test_negative_means_have_a_minus_sign(scores):
    scores["pearson"] -= 1
    assert any(text.get_text().startswith("−0.") for text in hx.pl.gene_correlation(scores).texts)


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
    with pytest.raises(DataValueError, match=r"metric='n_spots' is no score; possible: 'pearson'"):
        hx.pl.gene_correlation(scores.assign(n_spots=100), metric="n_spots")
    with pytest.raises(DataValueError, match="models is empty"):
        hx.pl.gene_correlation(scores, models=[])
    with pytest.raises(DataValueError, match="no gene has a defined"):
        hx.pl.gene_correlation(scores.assign(pearson=np.nan))


def test_seeds_are_averaged(scores):
    both = pd.concat([scores.assign(seed=0), scores.assign(seed=1, pearson=scores["pearson"] + 0.1)])
    one, several = hx.pl.gene_correlation(scores), hx.pl.gene_correlation(both)
    assert _mean_bars(several) == pytest.approx([value + 0.05 for value in _mean_bars(one)])
