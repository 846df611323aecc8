from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.data.section import Prediction, Section
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning, LeakageError, MissingKeyError
from hespotex.models import Model, ModelInfo, Run

GENES = [f"G{number:02d}" for number in range(30)]
MODELS = ["ridge", "mean"]


def section(name: str, patient: str | None, seed: int, side: int = 8) -> ad.AnnData:
    """A section whose first ten genes follow the features, the rest nothing."""
    rng = np.random.default_rng(seed)
    n = side * side
    features = rng.normal(size=(n, 4)).astype(np.float32)
    drive = np.zeros((n, len(GENES)))
    drive[:, :10] = 0.8 * features[:, [0]]
    counts = rng.poisson(np.exp(1.5 + drive + 0.4 * rng.normal(size=(n, 1))))
    row, col = np.divmod(np.arange(n), side)
    obs = pd.DataFrame({"array_row": row, "array_col": col, "n_nuclei": rng.poisson(5, n)})
    obs.index = pd.Index([f"{name}-{k}" for k in range(n)])
    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.int32), obs, pd.DataFrame(index=GENES))
    adata.obsm["X_toy"] = features
    adata.obsm["spatial"] = np.column_stack([col, row]) * 100.0
    note = {"name": name, "X_toy": {"slide_mpp": 1.0, "encoder": {"name": "toy"}}}
    adata.uns["hespotex"] = note if patient is None else {**note, "patient": patient}
    return adata


def cohort(n_patients: int = 3) -> list[ad.AnnData]:
    return [section(f"S{k}", f"P{k}", seed=k) for k in range(n_patients)]


def run(sections: Sequence[ad.AnnData], model: Any = MODELS, **options: Any) -> pd.DataFrame:
    options = {"n_top_genes": 12, "gene_selection": "high_mean", **options}
    return hx.tl.cross_validate(sections, model, **options)


@dataclass(frozen=True)
class SpyConfig:
    level: float = 0.0


class Spy(Model[SpyConfig]):
    """Predicts its level and remembers what it was shown."""

    Config: ClassVar[type] = SpyConfig
    info: ClassVar[ModelInfo] = ModelInfo(name="spy", summary="test model")
    trained_on: ClassVar[list[list[str]]] = []
    saw_targets: ClassVar[list[bool]] = []

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        self.trained_on.append([section.name for section in sections])

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        self.saw_targets.append(section.targets is not None)
        yield Prediction(
            section.ids, self.genes, self.unit, np.full((section.n_obs, len(self.genes)), self.config.level)
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        pass


def test_tidy_table_has_one_row_per_model_section_and_gene():
    table = run(cohort(), nulls=False)
    assert not table.duplicated(["model", "section", "gene"]).any()
    assert set(table["model"]) == set(MODELS)
    assert (table["fold"] == table["patient"]).all()
    assert (table.groupby(["model", "section"]).size() == 12).all()
    assert {"pearson", "spearman", "rmse", "r2", "variance_ratio", "n_spots", "undefined", "flat"} <= set(table)
    assert table.attrs["protocol"] == "leave one group out, 3 patients"
    mean = table.query("model == 'mean'")
    assert (mean["pearson"] == 0).all()
    np.testing.assert_allclose(mean["r2"], 0, atol=1e-5)


def test_what_can_be_learnt_is_found_on_unseen_patients():
    table = run(cohort(), "ridge", n_top_genes=30)
    gene = table["gene"].str[1:].astype(int)
    ridge = table["model"] == "ridge"
    driven, rest = (table["pearson"][ridge & chosen].mean() for chosen in (gene < 10, gene >= 10))
    assert driven > 0.4
    assert rest < driven - 0.15  # not 0: what is normalised for depth falls where the driven genes rise
    assert (table["ceiling"][ridge & (gene < 10)] > table["pearson"][ridge & (gene < 10)].mean()).all()


def test_nulls_are_there_and_behave():
    table = run(cohort())
    mean = table.groupby("model")["pearson"].mean()
    assert {"null_train_mean", "null_depth", "null_density", "null_encoder_ridge"} <= set(mean.index)
    assert {"null_shuffle:ridge", "null_random_gene:ridge"} <= set(mean.index)
    assert mean["null_train_mean"] == 0
    assert abs(mean["null_shuffle:ridge"]) < 0.1
    assert not {"null_coordinate", "null_sibling_mean", "null_handcrafted"} & set(mean.index)


def test_siblings_and_handcrafted_features_add_their_nulls():
    sections = [section(f"S{k}", f"P{k % 2}", seed=k) for k in range(4)]
    for number, adata in enumerate(sections):
        adata.obsm["X_morphology"] = np.random.default_rng(number).normal(size=(64, 3)).astype(np.float32)
    with pytest.warns(HespotexWarning, match="says nothing about an unseen patient"):
        table = run(sections, "ridge", groups=["a", "b", "c", "d"], force=True, embedding_key="X_toy")
    assert {"null_coordinate", "null_sibling_mean", "null_handcrafted"} <= set(table["model"])
    assert set(table["patient"]) == {"P0", "P1"}
    assert "same patient in training and test" in table.attrs["protocol"]


def test_a_patient_is_never_on_both_sides():
    sections = [section(f"S{k}", f"P{k // 2}", seed=k) for k in range(4)]
    Spy.trained_on.clear()
    run(sections, Spy(), nulls=False)
    assert Spy.trained_on == [["S2", "S3"], ["S0", "S1"]]
    with pytest.raises(LeakageError, match="patient 'P0', 'P1' is in training and test"):
        run(sections, Spy(), groups=["a", "b", "c", "d"])
    with pytest.raises(DataValueError, match="force=True"):
        run(sections[:2], Spy())


def test_a_model_never_sees_the_counts_of_the_section_it_predicts():
    Spy.saw_targets.clear()
    run(cohort(), Spy(), nulls=False)
    assert Spy.saw_targets == [False] * 3


@pytest.mark.parametrize("gene_selection", ["hvg", "most_variable", "high_mean"])
def test_corrupting_a_test_sections_counts_changes_no_fitted_bit(gene_selection):
    from hespotex.data.bridge import views_of
    from hespotex.data.splits import group_folds
    from hespotex.tl._cross_validate import _choose, _complete
    from hespotex.tl._protocol import cross_validate_sections

    rng = np.random.default_rng(9)
    clean, noisy = cohort(), cohort()
    counts = rng.poisson(rng.gamma(0.5, 20, size=len(GENES)), size=noisy[0].shape)
    counts[:, rng.choice(len(GENES), 8, replace=False)] = 0
    noisy[0].X = sparse.csr_matrix(counts, dtype=np.int32)

    def fold_without_first(sections: Sequence[ad.AnnData]) -> Any:
        whole = [_complete(view, view.section.group, None, "log1p_cp10k", "X_toy") for view in views_of(sections)]
        return cross_validate_sections(
            whole,
            {"ridge": lambda: hx.models.create("ridge"), "mean": lambda: hx.models.create("mean")},
            group_folds(["P0", "P1", "P2"])[:1],
            panel=lambda train: _choose(train, gene_selection, 10),
        )

    first, second = fold_without_first(clean), fold_without_first(noisy)
    assert first.folds[0].genes == second.folds[0].genes
    for label in ("ridge", "mean"):
        arrays, values = first.folds[0].models[label].state()
        others, other_values = second.folds[0].models[label].state()
        assert values == other_values
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name])
        np.testing.assert_array_equal(first.predictions[label, 0].mean, second.predictions[label, 0].mean)
    assert not first.table["pearson"].equals(second.table["pearson"])


def test_out_of_fold_predictions_are_stored():
    sections = cohort()
    before = [adata.X.copy() for adata in sections]
    run(sections, "ridge")
    for number, adata in enumerate(sections):
        assert adata.obsm["ridge_cv"].dtype == np.float32
        assert adata.obsm["ridge_cv"].shape == (64, 12)
        assert adata.obs["ridge_cv_fold"].dtype == "category"
        assert set(adata.obs["ridge_cv_fold"]) == {f"P{number}"}
        assert adata.uns["hespotex"]["ridge_cv"]["unit"] == "log1p_cp10k"
        assert (before[number] != adata.X).nnz == 0
        stored = hx.get.prediction(adata, "ridge_cv")
        assert list(stored.var_names) == list(adata.uns["hespotex"]["ridge_cv"]["genes"])


def test_scores_of_the_stored_predictions_are_those_of_the_table():
    sections = cohort()
    table = run(sections, "ridge", genes=GENES[:12], nulls=False)
    again = hx.tl.evaluate(sections, "ridge_cv", nulls=False, copy=True)
    merged = table.merge(again, on=["section", "gene"], validate="one_to_one")
    assert len(merged) == len(table) == len(again) == 3 * 12
    for metric in ("pearson", "spearman", "rmse"):
        assert merged[f"{metric}_x"].notna().all()
        np.testing.assert_allclose(merged[f"{metric}_x"], merged[f"{metric}_y"], atol=1e-6)


def test_copy_writes_nothing():
    sections = cohort()
    run(sections, "ridge", copy=True)
    for adata in sections:
        assert set(adata.obsm) == {"X_toy", "spatial"}
        assert "ridge_cv" not in adata.uns["hespotex"]
        assert not any("fold" in column for column in adata.obs)


def test_same_seed_same_table():
    first, second = run(cohort(), copy=True), run(cohort(), copy=True)
    pd.testing.assert_frame_equal(first, second)


def test_models_by_mapping_and_options():
    table = run(
        cohort(),
        {"low": Spy(level=1.0), "wide": {"name": "ridge", "components": (2,)}, "plain": "mean"},
        nulls=False,
        n_splits=3,
        genes=["G00", "G05", "G00"],
    )
    assert set(table["model"]) == {"low", "wide", "plain"}
    assert table.query("model == 'low'")["flat"].all()
    assert set(table["gene"]) == {"G00", "G05"}


def test_unmeasured_genes_of_a_test_section_are_masked():
    sections = cohort()
    sections[0] = sections[0][:, GENES[1:]].copy()
    table = run(sections, "ridge", genes=GENES[:3], nulls=True)
    rows = table.query("section == 'S0' and model == 'ridge'").set_index("gene")
    assert rows.loc["G00", "undefined"]
    assert np.isnan(rows.loc["G00", "pearson"])
    assert not rows.loc["G01", "undefined"]
    assert set(table.query("section == 'S1'")["gene"]) == {"G01", "G02"}  # S0 trains there and cannot teach G00


def test_empty_spots_are_predicted_but_neither_trained_on_nor_scored():
    sections = cohort()
    counts = sections[1].X.toarray()
    counts[:5] = 0
    sections[1].X = sparse.csr_matrix(counts)
    table = run(sections, "ridge", nulls=False)
    assert set(table.query("section == 'S1'")["n_spots"]) == {59}
    assert np.isfinite(sections[1].obsm["ridge_cv"]).all()


def test_ssim_on_the_array():
    table = run(cohort(), "ridge", nulls=False, metrics=["pearson", "ssim"])
    assert table["ssim"].between(-1, 1).all()
    sections = cohort()
    for adata in sections:
        del adata.obs["array_row"]
    with pytest.raises(MissingKeyError, match="array_row"):
        run(sections, "ridge", nulls=False, metrics=["ssim"])


def test_unknown_patients_are_said():
    sections = [section(f"S{k}", None, seed=k) for k in range(3)]
    with pytest.warns(HespotexWarning, match="is unknown, so that each counts as one of its own"):
        run(sections, "mean", nulls=False)
    table = run(sections, "mean", nulls=False, groups=["x", "y", "y"])
    assert set(table["patient"]) == {"x", "y"}


def test_bad_arguments():
    sections = cohort()
    for wrong, error, message in [
        ({"model": "rigde"}, DataValueError, "did you mean 'ridge'"),
        ({"model": []}, DataValueError, "at least one"),
        ({"model": ["ridge", "ridge"]}, DataValueError, "not unique"),
        ({"model": {"null_x": "ridge"}}, DataValueError, "must not start"),
        ({"model": 3}, DataTypeError, "got int"),
        ({"model": {"a": {"preset": "paper"}}}, DataTypeError, "'name'"),
        ({"unit": "tpm"}, DataValueError, "unit='tpm'"),
        ({"groups": ["x"]}, DataValueError, "1 patients for 3 sections"),
        ({"n_splits": 9}, DataValueError, "n_splits=9"),
        ({"genes": ["nope"]}, DataValueError, "none of the panel"),
        ({"metrics": ["r"]}, DataValueError, "metrics="),
        ({"embedding_key": "X_no"}, MissingKeyError, "X_no"),
        ({"min_counts": 10**9}, DataValueError, "no observation"),
    ]:
        with pytest.raises(error, match=message):
            run(sections, **{"model": "mean", **wrong})
    assert all(set(adata.obsm) == {"X_toy", "spatial"} for adata in sections)


def test_a_fitted_model_is_refused():
    sections = cohort()
    table = run(sections, "mean", nulls=False)
    assert len(table)
    model = hx.tl.train(sections[0], "mean", n_top_genes=5, gene_selection="high_mean")
    with pytest.raises(DataValueError, match="already fitted"):
        run(sections, model)
