import numpy as np
import pandas as pd
import pytest

from hespotex import metrics as m
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning, MissingKeyError


def scores(n_patients=4, n_sections=2, n_genes=30, models=("a", "b"), seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "model": model,
            "patient": f"P{patient}",
            "section": f"P{patient}S{section}",
            "gene": f"G{gene}",
            "n_spots": 100,
            "pearson": rng.normal(0.3, 0.2),
            "rmse": rng.uniform(),
            "variance_ratio": rng.uniform(),
            "split_half": rng.uniform(-0.1, 0.8),
            "undefined": False,
            "flat": False,
        }
        for model in models
        for patient in range(n_patients)
        for section in range(n_sections + patient % 2)
        for gene in range(n_genes)
    ]
    return pd.DataFrame(rows)


def test_genes_then_section_then_patient_then_cohort():
    table = scores()
    table.loc[(table["section"] == "P1S0") & (table["gene"] == "G3"), ["pearson", "undefined"]] = [np.nan, True]
    result = m.aggregate(table).set_index("model")
    for model, own in table.groupby("model"):
        patients = []
        for _, patient in own.groupby("patient"):
            patients.append(np.mean([section["pearson"].dropna().mean() for _, section in patient.groupby("section")]))
        assert result.loc[model, "pearson"] == pytest.approx(np.mean(patients))
        assert result.loc[model, "pearson_sd"] == pytest.approx(np.std(patients, ddof=1))
    assert (result["n_patients"] == 4).all()
    assert (result["n_sections"] == 10).all()
    assert (result["n_undefined"] == 1).all()
    assert (result["n_genes"] == 30).all()
    assert result.loc["a", "pearson"] != pytest.approx(table.query("model == 'a'")["pearson"].mean(), abs=1e-9)


def test_distribution_over_genes():
    table = scores(n_sections=1)
    section = m.aggregate(table, level="section").query("model == 'a' and section == 'P0S0'").iloc[0]
    values = table.query("model == 'a' and section == 'P0S0'")["pearson"]
    assert section["pearson_median"] == pytest.approx(np.median(values))
    assert section["pearson_q05"] == pytest.approx(np.quantile(values, 0.05))
    assert section["pearson_q95"] == pytest.approx(np.quantile(values, 0.95))
    assert section["pearson_positive"] == pytest.approx((values > 0).mean())
    assert section["rvd"] == pytest.approx(
        m.relative_variance_distance(table.query("model == 'a' and section == 'P0S0'")["variance_ratio"])
    )


def test_both_ceilings_and_their_share():
    table = scores(n_patients=3, n_sections=2, models=("a",))
    result = m.aggregate(table).iloc[0]
    half = table.groupby(["patient", "gene"])["split_half"].mean().groupby("gene").mean().clip(0, 1)
    assert result["ceiling"] == pytest.approx(np.sqrt(2 * half / (1 + half)).mean())
    clipped = table["split_half"].clip(0, 1)
    root = np.sqrt(2 * clipped / (1 + clipped))
    expected = root.groupby(table["section"]).mean().groupby(lambda name: name[:2]).mean().mean()
    assert result["ceiling_pessimistic"] == pytest.approx(expected)
    assert result["pearson_of_ceiling"] == pytest.approx(result["pearson"] / result["ceiling"])
    assert m.gene_ceiling(table)[0] == pytest.approx(np.sqrt(2 * half["G0"] / (1 + half["G0"])))


def test_small_sections_are_reported_and_left_out():
    table = scores(models=("a",))
    table.loc[table["section"] == "P0S0", "n_spots"] = 19
    with pytest.warns(HespotexWarning, match="P0S0"):
        result = m.aggregate(table).iloc[0]
    assert result["n_small"] == 1
    expected = m.aggregate(table[table["section"] != "P0S0"]).iloc[0]
    assert result["pearson"] == pytest.approx(expected["pearson"])
    assert result["ceiling"] == pytest.approx(expected["ceiling"])
    assert "P0S0" in set(m.aggregate(table, level="section")["section"])


def test_fewer_than_three_patients_come_with_a_warning():
    table = scores(n_patients=2)
    with pytest.warns(HespotexWarning, match=r"2 patient\(s\)"):
        result = m.aggregate(table)
    assert result["pearson_above_zero"].isna().all()
    m.aggregate(table, level="patient")  # says nothing about a cohort


def test_share_of_genes_surely_above_zero():
    table = scores(n_patients=6, n_genes=10, models=("a",))
    good = table["gene"].isin([f"G{k}" for k in range(4)])
    rng = np.random.default_rng(1)
    sign = np.where(table["patient"].str[1:].astype(int) % 2, 1, -1)
    table["pearson"] = np.where(good, 0.5, 0.4 * sign) + 0.01 * rng.normal(size=len(table))
    assert m.aggregate(table).iloc[0]["pearson_above_zero"] == pytest.approx(0.4)


def test_seeds_are_kept_apart():
    table = pd.concat([scores(seed=seed).assign(seed=seed) for seed in (0, 1)])
    with pytest.raises(DataValueError, match="repeated rows"):
        m.aggregate(table)
    result = m.aggregate(table, by=("model", "seed"))
    assert len(result) == 4
    assert result["pearson_above_zero"].notna().all()


def test_patients_weigh_equally_whatever_their_sections():
    table = pd.DataFrame(
        {
            "model": "a",
            "patient": ["P", "P", "P", "Q", "R"],
            "section": list("stuvw"),
            "gene": "G",
            "pearson": [0, 0, 0, 0.3, 0.6],
        }
    )
    assert m.aggregate(table)["pearson"][0] == pytest.approx(0.3)


def test_bad_tables():
    table = scores()
    with pytest.raises(DataTypeError):
        m.aggregate(table.to_dict())
    with pytest.raises(MissingKeyError, match="'patient'"):
        m.aggregate(table.drop(columns="patient"))
    with pytest.raises(MissingKeyError, match="scores"):
        m.aggregate(table[["model", "patient", "section", "gene"]])
    with pytest.raises(DataValueError, match="level='gene'"):
        m.aggregate(table, level="gene")


def test_interval_of_the_mean_from_the_errors_of_sections():
    rows = [("A", "a", 0.2, 0.03), ("A", "b", 0.4, 0.04), ("B", "c", 0.6, 0.05)]
    table = pd.DataFrame(rows, columns=["patient", "section", "pearson", "pearson_se"]).assign(model="m", gene="G")
    patients = m.aggregate(table, metrics=["pearson"], level="patient").set_index("patient")
    half = 1.959964 * 0.05 / 2  # two sections: √(0.03² + 0.04²) / 2
    assert patients.loc["A", ["pearson_lower", "pearson_upper"]].tolist() == pytest.approx([0.3 - half, 0.3 + half])
    with pytest.warns(HespotexWarning):
        cohort = m.aggregate(table, metrics=["pearson"]).iloc[0]
    half = 1.959964 * np.hypot(0.025, 0.05) / 2
    assert [cohort["pearson_lower"], cohort["pearson_upper"]] == pytest.approx([0.45 - half, 0.45 + half])


def test_the_ceiling_is_that_of_the_genes_and_sections_that_were_scored():
    """Where every fold has a panel of its own, a gene of one fold must not count like one of all."""
    rows = [("A", "a", "G", 0.5), ("B", "b", "G", 0.5), ("B", "b", "H", 0.0)]
    table = pd.DataFrame(rows, columns=["patient", "section", "gene", "split_half"]).assign(model="m", pearson=0.1)
    with pytest.warns(HespotexWarning):
        result = m.aggregate(table, metrics=["pearson"]).iloc[0]
    assert result["ceiling"] == pytest.approx((np.sqrt(2 / 3) + (np.sqrt(2 / 3) + 0) / 2) / 2)
