import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.data.bridge import regions_of
from hespotex.data.provenance import record
from hespotex.data.stored import write_prediction
from hespotex.data.units import normalize
from hespotex.errors import (
    AmbiguousKeyError,
    CountsError,
    DataValueError,
    HespotexWarning,
    LeakageError,
    MissingKeyError,
)

GENES = [f"G{number}" for number in range(12)]


def section(name: str, patient: str, seed: int, side: int = 8) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    n = side * side
    counts = rng.poisson(rng.gamma(2, 2, size=(n, 12)) * rng.gamma(5, 0.2, size=(n, 1)))
    row, col = np.divmod(np.arange(n), side)
    obs = pd.DataFrame({"array_row": row, "array_col": col}, index=pd.Index([f"{name}{k}" for k in range(n)]))
    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.int32), obs, pd.DataFrame(index=GENES))
    adata.obsm["spatial"] = np.column_stack([col, row]) * 100.0
    adata.uns["hespotex"] = {"name": name, "patient": patient}
    return adata


def measured(adata: ad.AnnData, genes: list[str], unit: str = "log1p_cp10k") -> np.ndarray:
    counts = adata.X.toarray()
    return normalize(counts[:, [GENES.index(gene) for gene in genes]], counts.sum(axis=1), unit)


def predict(
    adata: ad.AnnData,
    key: str = "toy",
    genes: list[str] = GENES[:6],
    unit: str = "log1p_cp10k",
    noise: float = 0.5,
    values: np.ndarray | None = None,
) -> np.ndarray:
    if values is None:
        values = measured(adata, genes, unit)
        values = (values + noise * np.random.default_rng(1).normal(size=values.shape)).astype(np.float32)
    form = write_prediction(adata, key, values, tuple(genes), {}, own_table=False)
    record(adata, key, created_by="test", kind="prediction", form=form, unit=unit, genes=list(genes))
    return values


@pytest.mark.parametrize("unit", ["log1p_cp10k", "log1p_cpm_panel", "counts"])
@pytest.mark.parametrize("genes", [GENES[:6], GENES[::-1]])
def test_counts_are_compared_in_the_predictions_own_unit(unit, genes):
    adata = section("A", "P", 0)
    values = predict(adata, genes=genes, unit=unit)
    assert hx.tl.evaluate(adata) is None
    expected = hx.metrics.pearson(measured(adata, genes, unit), values)
    stored = adata.var["toy_pearson"]
    np.testing.assert_allclose(stored[genes], expected, rtol=1e-6)
    assert stored.drop(genes).isna().all()
    assert {"toy_rmse", "toy_ceiling", "toy_variance_ratio"} <= set(adata.var)
    assert adata.uns["hespotex"]["toy_evaluation"]["means"]["pearson"] == pytest.approx(expected.mean())


def test_copy_returns_the_table_and_writes_nothing():
    adata = section("A", "P", 0)
    predict(adata)
    uns = set(adata.uns["hespotex"])
    table = hx.tl.evaluate(adata, "toy", copy=True)
    assert {"model", "patient", "section", "gene", "pearson", "split_half", "ceiling", "n_spots"} <= set(table)
    assert set(table["patient"]) == {"P"}
    assert not list(adata.var)
    assert set(adata.uns["hespotex"]) == uns
    assert set(table["model"]) == {"toy", "null_shuffle:toy", "null_random_gene:toy"}


def test_summary_has_skill_ceiling_nulls_patients_and_excluded_genes():
    sections = [section(f"S{k}", f"P{k}", k) for k in range(3)]
    for adata in sections:
        counts = adata.X.toarray()
        counts[:, 5] = 0
        adata.X = sparse.csr_matrix(counts)
        predict(adata)
    train = [section("T", "P9", 9), section("U", "P0", 8)]
    table = hx.tl.evaluate(sections, "toy", reference=train, copy=True)
    with pytest.warns(HespotexWarning, match="mean of null_sibling_mean, null_coordinate rests on 1 patient"):
        summary = hx.metrics.aggregate(table).set_index("model")
    assert {"toy", "null_train_mean", "null_depth", "null_coordinate", "null_sibling_mean"} <= set(summary.index)
    assert {"pearson", "ceiling", "ceiling_pessimistic", "pearson_of_ceiling", "n_patients", "n_undefined"} <= set(
        summary
    )
    assert summary.loc["toy", "n_patients"] == 3
    assert summary.loc["toy", "n_undefined"] == 3
    assert summary.loc["null_coordinate", "n_patients"] == 1  # the one patient with another section in training
    assert summary.loc["null_train_mean", "pearson"] == 0
    assert summary.loc["null_train_mean", "r2"] == pytest.approx(0, abs=1e-6)
    assert summary.loc["toy", "r2"] > 0
    with pytest.warns(HespotexWarning, match="patient"):
        hx.metrics.aggregate(hx.tl.evaluate(sections[:2], "toy", copy=True))


def test_full_library_not_the_panel_normalises():
    adata = section("A", "P", 0)
    predict(adata, values=measured(adata, GENES[:6]))
    table = hx.tl.evaluate(adata, nulls=False, copy=True)
    np.testing.assert_allclose(table["rmse"], 0, atol=1e-6)


def test_several_predictions_share_genes_and_unit():
    adata = section("A", "P", 0)
    predict(adata, "one", GENES[:6])
    predict(adata, "two", GENES[3:9], noise=2)
    table = hx.tl.evaluate(adata, ["one", "two"], nulls=False, copy=True)
    assert set(table["gene"]) == set(GENES[3:6])
    assert table.groupby("model")["pearson"].mean()["one"] > table.groupby("model")["pearson"].mean()["two"]
    with pytest.raises(AmbiguousKeyError, match="'one', 'two'"):
        hx.tl.evaluate(adata)
    predict(adata, "three", GENES[:6], unit="counts")
    with pytest.raises(DataValueError, match="differ in unit"):
        hx.tl.evaluate(adata, ["one", "three"])
    predict(adata, "four", GENES[9:])
    with pytest.raises(DataValueError, match="share no gene"):
        hx.tl.evaluate(adata, ["one", "four"])
    predict(adata, "five", GENES[:6], unit="log1p_cpm_panel")
    predict(adata, "six", GENES[:8], unit="log1p_cpm_panel")
    with pytest.raises(DataValueError, match="different panels"):
        hx.tl.evaluate(adata, ["five", "six"])
    assert not list(adata.var)


def test_unmeasured_genes_are_masked():
    adata = section("A", "P", 0)
    values = predict(adata, genes=GENES[:6])
    poorer = adata[:, GENES[2:]].copy()
    table = hx.tl.evaluate(poorer, "toy", nulls=True, copy=True).query("model == 'toy'").set_index("gene")
    assert table.loc[["G0", "G1"], "pearson"].isna().all()
    assert table.loc[["G0", "G1"], "undefined"].all()
    assert table.loc[GENES[2:6], "pearson"].notna().all()
    predict(poorer, "cpm", GENES[:6], unit="log1p_cpm_panel", values=values)
    with pytest.raises(DataValueError, match="does not measure 2"):
        hx.tl.evaluate(poorer, "cpm")
    predict(poorer, "none", GENES[:2], values=values[:, :2])
    with pytest.raises(MissingKeyError, match="none of the 2"):
        hx.tl.evaluate(poorer, "none")


def test_nulls_learn_only_from_genes_that_training_measured():
    adata = section("A", "P", 0)
    predict(adata)
    train = section("T", "Q", 4)[:, GENES[1:]].copy()
    table = hx.tl.evaluate(adata, "toy", reference=train, copy=True)
    assert set(table.query("model == 'null_train_mean'")["gene"]) == set(GENES[1:6])
    r2 = table.query("model == 'toy'").set_index("gene")["r2"]
    assert np.isnan(r2["G0"])
    assert r2[GENES[1:6]].notna().all()


def test_empty_spots_are_not_scored():
    adata = section("A", "P", 0)
    counts = adata.X.toarray()
    counts[:4] = 0
    adata.X = sparse.csr_matrix(counts)
    predict(adata)
    assert set(hx.tl.evaluate(adata, copy=True)["n_spots"]) == {60}


def test_prediction_that_is_not_finite():
    adata = section("A", "P", 0)
    values = predict(adata)
    values[0, 0] = np.nan
    predict(adata, values=values)
    with pytest.raises(DataValueError, match="not finite"):
        hx.tl.evaluate(adata)
    assert not list(adata.var)
    hx.tl.evaluate(adata, nan_policy="zero")
    assert adata.var["toy_pearson"][GENES[:6]].notna().all()


def test_corrupted_counts_and_missing_predictions():
    adata = section("A", "P", 0)
    with pytest.raises(MissingKeyError, match=r"hx\.tl\.predict"):
        hx.tl.evaluate(adata)
    predict(adata)
    with pytest.raises(MissingKeyError, match="key='ridge'"):
        hx.tl.evaluate(adata, "ridge")
    with pytest.raises(DataValueError, match="metrics"):
        hx.tl.evaluate(adata, metrics=["r"])
    with pytest.raises(DataValueError, match="min|counts"):
        hx.tl.evaluate(adata, min_counts=10**6)
    with pytest.raises(LeakageError, match="reference"):
        hx.tl.evaluate(adata, reference=[adata])
    adata.X = adata.X.astype(float) * 0.5
    with pytest.raises(CountsError, match="already normalised"):
        hx.tl.evaluate(adata)


def test_ssim_by_name():
    adata = section("A", "P", 0)
    predict(adata, noise=0)
    hx.tl.evaluate(adata, metrics=["pearson", "ssim"])
    np.testing.assert_allclose(adata.var["toy_ssim"][GENES[:6]], 1, atol=1e-5)


def test_scores_survive_writing(tmp_path):
    adata = section("A", "P", 0)
    predict(adata)
    hx.tl.evaluate(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.var["toy_pearson"], adata.var["toy_pearson"])
    assert back.uns["hespotex"]["toy_evaluation"]["unit"] == "log1p_cp10k"


def predicted_by(adata: ad.AnnData, sections: list[str], patients: list[str]) -> ad.AnnData:
    predict(adata)
    adata.uns["hespotex"]["toy"] |= {"training_sections": sections, "training_patients": patients}
    return adata


@pytest.mark.parametrize(
    ("sections", "patients", "words"),
    [
        (["B", "C"], ["Q", "R"], "a patient not in training"),
        (["B", "C"], ["Q", "P"], "another section of a training patient"),
        (["section0"], ["section0"], ""),  # trained on sections whose patients nobody noted
    ],
)
def test_how_the_section_stands_to_the_training_is_said(sections, patients, words):
    adata = predicted_by(section("A", "P", 0), sections, patients)
    assert hx.tl.evaluate(adata, copy=True).attrs["protocol"] == words
    hx.tl.evaluate(adata)
    assert adata.uns["hespotex"]["toy"]["protocol"] == words


def test_scores_on_a_training_section_are_warned_about():
    adata = predicted_by(section("A", "P", 0), ["A", "B"], ["P", "Q"])
    with pytest.warns(HespotexWarning, match="how well it fits"):
        table = hx.tl.evaluate(adata, copy=True)
    assert table.attrs["protocol"] == "a training section"


def test_a_second_copy_of_the_evaluated_section_is_no_reference():
    adata = section("A", "P", 0)
    predict(adata)
    with pytest.raises(LeakageError, match="among the training"):
        hx.tl.evaluate(adata, reference=[section("A", "P", 0), section("B", "P", 1)])


def test_no_positions_no_null_of_position():
    test, train = section("A", "P", 0), section("B", "P", 1)
    predict(test)
    for adata in (test, train):
        del adata.obsm["spatial"], adata.obs["array_row"], adata.obs["array_col"]
    models = set(hx.tl.evaluate(test, reference=train, copy=True)["model"])
    assert "null_sibling_mean" in models
    assert "null_coordinate" not in models


def test_the_error_of_the_mean_is_that_of_spatial_blocks():
    adata = section("A", "P", 0, side=16)
    predict(adata, noise=2.0)
    near = hx.tl.evaluate(adata, nulls=False, copy=True)["pearson_se"].unique()
    assert near.shape == (1,)
    assert 0.005 < near[0] < 0.1
    alone = section("A", "P", 0, side=2)
    predict(alone)
    alone.obsm["spatial"] = np.zeros((4, 2))
    assert hx.tl.evaluate(alone, nulls=False, copy=True)["pearson_se"].isna().all()


def test_counts_in_a_layer_tell_sections_apart():
    sections = [section("A", "P", 0), section("A", "P", 1)]
    for adata in sections:
        adata.layers["counts"] = adata.X.copy()
        adata.X = None
    predict_from = section("A", "P", 0)
    values = measured(predict_from, GENES[:6]).astype(np.float32)
    predict(sections[0], values=values)
    hx.tl.evaluate(sections[0], reference=sections[1], counts_layer="counts")
    with pytest.raises(LeakageError):
        hx.tl.evaluate(sections[0], reference=sections[0].copy(), counts_layer="counts")


def test_a_region_of_a_table_is_known_from_its_training():
    adata = section("A", "P", 0)
    adata.obs["region"] = np.repeat(["left", "right"], 32)
    adata.obs["region"] = adata.obs["region"].astype("category")
    adata.obs["id"] = np.arange(64)
    adata.uns["spatialdata_attrs"] = {"region": ["left", "right"], "region_key": "region", "instance_key": "id"}
    predict(adata)
    names = [region.name for region in regions_of(adata)]
    assert len(names) == 2
    adata.uns["hespotex"]["toy"] |= {"training_sections": names, "training_patients": ["P", "P"]}
    with pytest.warns(HespotexWarning, match="were in the training of a model evaluated here"):
        hx.tl.evaluate(adata, "toy", nulls=False)
