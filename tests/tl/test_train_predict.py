"""Training and prediction through the public functions, on sections whose morphology drives expression."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

import hespotex as hx
from hespotex._keys import Keys
from hespotex.errors import (
    AmbiguousKeyError,
    CheckpointError,
    DataTypeError,
    DataValueError,
    HespotexWarning,
    MissingKeyError,
    ModelMismatchError,
)
from hespotex.models._store import identify

from ..conftest import stored

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")


@pytest.fixture
def embedded(patients):
    for sdata in patients:
        hx.pp.embed(sdata, "morphology")
    return patients


def genes_of(sdata, n=12):
    return list(sdata["table"].var_names[:n])


def test_the_prediction_of_some_genes_goes_to_obsm_and_nothing_else_changes(embedded):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    before, counts = stored(test), test["table"].X.copy()
    assert hx.tl.predict(test, model) is None
    assert stored(test).keys() - before.keys() == {("table", "obsm", "ridge"), ("table", "uns", "ridge")}
    table = test["table"]
    assert (counts != table.X).nnz == 0
    assert table.obsm["ridge"].shape == (table.n_obs, 12)
    assert table.obsm["ridge"].dtype == np.float32
    entry = table.uns["hespotex"]["ridge"]
    assert list(entry["genes"]) == list(model.genes)
    assert entry["unit"] == "log1p_cp10k"


def test_the_prediction_of_all_genes_is_a_layer_in_the_order_of_the_table(embedded):
    train, test = embedded[:2], embedded[2]
    shared = [gene for gene in test["table"].var_names if all(gene in sdata["table"].var_names for sdata in train)]
    model = hx.tl.train(train, "ridge", genes=shared)
    subset = test["table"][:, sorted(shared, reverse=True)].copy()
    test["table"] = subset
    hx.tl.predict(test, model)
    by_name = dict(zip(model.genes, model.predict(hx.data.bridge.views_of(test)[0].section).mean.T, strict=True))
    for column, gene in enumerate(subset.var_names):
        np.testing.assert_array_equal(subset.layers["ridge"][:, column], by_name[gene])


def test_a_prediction_of_another_form_replaces_the_earlier_one(embedded):
    sdata = embedded[0]
    hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=list(sdata["table"].var_names)))
    assert "ridge" in sdata["table"].layers
    hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=genes_of(sdata)))
    assert "ridge" not in sdata["table"].layers
    assert hx.get.prediction(sdata, "ridge").n_vars == 12


def test_prediction_does_not_look_at_measured_expression(embedded):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    hx.tl.predict(test, model)
    before = test["table"].obsm["ridge"].copy()
    rng = np.random.default_rng(0)
    test["table"].X = sparse.csr_matrix(rng.poisson(3, test["table"].shape).astype(np.float32))
    hx.tl.predict(test, model)
    np.testing.assert_array_equal(test["table"].obsm["ridge"], before)


def test_an_unseen_patient_is_predicted_better_than_by_chance(embedded):
    train, test = embedded[:2], embedded[2]
    hx.tl.predict(test, hx.tl.train(train, "ridge", genes=list(test["table"].var_names)))
    result = hx.get.prediction(test, "ridge")
    spread = (result.X.std(0) > 0) & (result.layers["measured"].std(0) > 0)
    r = [np.corrcoef(result.X[:, g], result.layers["measured"][:, g])[0, 1] for g in np.flatnonzero(spread)]
    assert np.mean(r) > 0.15


def test_measured_values_are_in_the_unit_of_the_prediction(embedded):
    sdata = embedded[0]
    hx.tl.predict(sdata, hx.tl.train(sdata, "mean", genes=genes_of(sdata), unit="log1p_cpm_panel"))
    counts = sdata["table"][:, genes_of(sdata)].X.toarray().astype(float)
    expected = np.log1p(1e6 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    np.testing.assert_allclose(hx.get.prediction(sdata, "mean").layers["measured"], expected, rtol=1e-5)


def test_copy_returns_the_prediction_and_leaves_the_object_alone(embedded):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    before = stored(test)
    result = hx.tl.predict(test, model, copy=True)
    assert stored(test) == before
    hx.tl.predict(test, model)
    np.testing.assert_array_equal(result.X, hx.get.prediction(test, "ridge").X)


def test_the_object_names_the_model_it_trained(embedded):
    train = embedded[:2]
    model = hx.tl.train(train, "ridge", genes=genes_of(train[0]))
    hx.tl.predict(train[1])
    np.testing.assert_array_equal(train[1]["table"].obsm["ridge"], hx.tl.predict(train[1], model, copy=True).X)


def test_without_any_model_the_ways_to_name_one_are_listed(embedded):
    with pytest.raises(MissingKeyError, match="hx.settings.default_model"):
        hx.tl.predict(embedded[0])


def test_a_saved_model_predicts_the_same(embedded, tmp_path):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    path = model.save(tmp_path / "her2.hx")
    with hx.settings.override(default_model=path):
        hx.tl.predict(test)
    np.testing.assert_array_equal(test["table"].obsm["ridge"], hx.tl.predict(test, model, copy=True).X)
    with pytest.raises(CheckpointError, match="does not exist"):
        hx.tl.predict(test, tmp_path / "elsewhere.hx")


def test_missing_steps_are_run_with_the_parameters_of_training(patients):
    train, test = patients[:2], patients[2]
    for sdata in train:
        hx.pp.embed(sdata, "morphology", tile_um=60.0, context_um=120.0, key_added="X_own")
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    hx.tl.predict(test, model)
    assert test["table"].obsm["X_own"].shape[1] == train[0]["table"].obsm["X_own"].shape[1]
    assert test["table"].uns["hespotex"]["X_own"]["encoder"] == train[0]["table"].uns["hespotex"]["X_own"]["encoder"]


def test_a_slide_without_expression_gets_tiles_and_a_table_of_its_own(embedded):
    train, slide = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(train[0]))
    for name in ("table", "spots"):
        del slide[name]
    hx.tl.predict(slide, model)
    table = slide["ridge_tiles"]
    assert list(table.var_names) == list(model.genes)
    assert np.isfinite(table.X).all()
    assert table.obsm["spatial"].shape == (table.n_obs, 2)
    tiles = slide["tiles"]
    assert abs(2 * tiles.radius.iloc[0] * 0.5 - 40.0) < 1e-6  # the diameter of the training spots, at 0.5 µm/px
    result = hx.get.prediction(slide)
    assert "measured" not in result.layers
    hx.tl.predict(slide, model)  # once more: nothing piles up
    assert hx.get.prediction(slide).n_obs == table.n_obs


def test_an_anndata_with_its_embedding_suffices(embedded):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train([sdata["table"] for sdata in train], "ridge", genes=genes_of(test))
    adata = test["table"].copy()
    hx.tl.predict(adata, model)
    expected = hx.tl.predict(test, hx.tl.train(train, "ridge", genes=genes_of(test)), copy=True).X
    np.testing.assert_allclose(adata.obsm["ridge"], expected, atol=1e-6)


def test_spot_order_does_not_matter(embedded):
    train, test = embedded[:2], embedded[2]
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    hx.tl.predict(test, model)
    straight = hx.get.prediction(test, "ridge").to_df()
    test["table"] = test["table"][np.random.default_rng(0).permutation(test["table"].n_obs)].copy()
    hx.tl.predict(test, model)
    shuffled = hx.get.prediction(test, "ridge").to_df()
    np.testing.assert_allclose(shuffled.loc[straight.index], straight, atol=1e-5)


def test_blocks_give_the_same_as_the_whole(embedded):
    sdata = embedded[0]
    model = hx.tl.train(sdata, "ridge", genes=genes_of(sdata))
    whole = hx.tl.predict(sdata, model, copy=True).X
    np.testing.assert_allclose(hx.tl.predict(sdata, model, copy=True, block_rows=7).X, whole, atol=1e-5)


def test_everything_survives_a_zarr_round_trip(embedded, tmp_path):
    from spatialdata import read_zarr

    sdata = embedded[0]
    hx.pp.spatial_graph(sdata)
    model = hx.tl.train(sdata, "ridge", genes=genes_of(sdata))
    hx.tl.predict(sdata, model)
    sdata.write(tmp_path / "section.zarr")
    back = read_zarr(tmp_path / "section.zarr")
    before, after = hx.get.prediction(sdata, "ridge"), hx.get.prediction(back, "ridge")
    np.testing.assert_array_equal(after.X, before.X)
    np.testing.assert_array_equal(after.layers["measured"], before.layers["measured"])
    assert list(after.var_names) == list(before.var_names)
    assert hx.tl.predict(back, copy=True).shape == before.shape  # attrs still name the model


@pytest.mark.parametrize("chosen", ["given", "selected"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_checklist_24_genes_come_in_the_stored_order_and_that_of_the_tables_is_nothing(embedded, preset, chosen):
    for sdata in embedded:
        hx.pp.spatial_graph(sdata)
        sdata["table"].obs[Keys.N_NUCLEI_WINDOW] = np.arange(sdata["table"].n_obs) % 13 + 1
    panel = {"genes": genes_of(embedded[0])[::-1]} if chosen == "given" else {"n_top_genes": 12}
    small = {"epochs": 2, "gate_epochs": 2, "width": 16, "head_width": 16, "n_members": 1}
    rng = np.random.default_rng(0)
    results = []
    for _ in ("as they are", "permuted"):
        config = replace(hx.models.create("hespotex", preset=preset).config, **small)
        model = hx.tl.train(embedded[:2], "hespotex", config=config, device="cpu", **panel)
        result = hx.tl.predict(embedded[2], model, copy=True, device="cpu")
        assert tuple(result.var_names) == model.genes
        results.append(result)
        for sdata in embedded:
            sdata["table"] = sdata["table"][:, rng.permutation(sdata["table"].n_vars)].copy()
    first, permuted = results
    expected = panel["genes"] if chosen == "given" else sorted(first.var_names)
    assert list(first.var_names) == list(permuted.var_names) == expected
    assert np.ptp(first.X, axis=0).min() > 0
    np.testing.assert_allclose(permuted.X, first.X, atol=1e-5)
    np.testing.assert_array_equal(permuted.layers["measured"], first.layers["measured"])


def test_the_missing_step_is_named(patients):
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.embed"):
        hx.tl.train(patients, "ridge", genes=genes_of(patients[0]))
    for sdata in patients:
        hx.pp.embed(sdata, "morphology")
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.spatial_graph"):
        hx.tl.train(patients, "hespotex", genes=genes_of(patients[0]))


def test_several_embeddings_have_to_be_told_apart(embedded):
    for sdata in embedded:
        hx.pp.embed(sdata, "morphology", tile_um=60.0, context_um=120.0, key_added="X_small")
    with pytest.raises(AmbiguousKeyError, match="X_small"):
        hx.tl.train(embedded, "ridge", genes=genes_of(embedded[0]))


def test_sections_embedded_differently_are_refused(patients):
    for sdata, tile_um in zip(patients[:2], (60.0, 80.0), strict=True):
        hx.pp.embed(sdata, "morphology", tile_um=tile_um, context_um=160.0)
    with pytest.raises(ModelMismatchError, match="tile_um"):
        hx.tl.train(patients[:2], "ridge", genes=genes_of(patients[0]))


def test_an_error_in_the_last_step_takes_back_the_steps_before(patients, monkeypatch):
    train, test = patients[:2], patients[2]
    for sdata in train:
        hx.pp.embed(sdata, "morphology")
    model = hx.tl.train(train, "ridge", genes=genes_of(test))
    before = stored(test)

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "predict_blocks", broken)
    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict(test, model)
    assert stored(test) == before


def test_wrong_arguments_are_named(embedded):
    with pytest.raises(DataTypeError, match="sdatas"):
        hx.tl.train(["section.zarr"])
    with pytest.raises(DataValueError, match="empty"):
        hx.tl.train([])
    with pytest.raises(DataTypeError, match="model must be"):
        hx.tl.predict(embedded[0], 3)
    with pytest.raises(ModelMismatchError, match="not fitted"):
        hx.tl.predict(embedded[0], hx.models.create("ridge"))
    with pytest.raises(DataValueError, match="did you mean 'ridge'"):
        hx.tl.train(embedded, "rigde")
    with pytest.raises(DataValueError, match="groups names 1"):
        hx.tl.train(embedded, "ridge", genes=genes_of(embedded[0]), groups=["a"])


def test_marked_genes_are_used(embedded):
    for sdata in embedded:
        sdata["table"].var[Keys.TARGET] = np.arange(sdata["table"].n_vars) < 7
    model = hx.tl.train(embedded[:2], "ridge")
    assert sorted(model.genes) == sorted(genes_of(embedded[0], 7))


def test_a_missing_prediction_lists_those_there(embedded):
    sdata = embedded[0]
    hx.tl.predict(sdata, hx.tl.train(sdata, "mean", genes=genes_of(sdata)), key_added="my_mean")
    with pytest.raises(MissingKeyError, match="'my_mean'"):
        hx.get.prediction(sdata, "ridge")


def test_several_regions_of_one_object_are_sections_of_their_own(embedded):
    import spatialdata as sd

    both = sd.concatenate({"a": embedded[0], "b": embedded[1]}, concatenate_tables=True)
    model = hx.tl.train(both, "ridge", genes=genes_of(embedded[0]), embedding_key="X_morphology")
    assert [entry["n_obs"] for entry in model.recipe.training["sections"]] == [s["table"].n_obs for s in embedded[:2]]
    hx.tl.predict(both, model)
    apart = hx.tl.predict(embedded[1], hx.tl.train(embedded[:2], "ridge", genes=genes_of(embedded[0])), copy=True)
    np.testing.assert_allclose(both["table"].obsm["ridge"][-apart.n_obs :], apart.X, atol=1e-5)


def test_words_for_what_is_no_object_no_model_and_no_method(embedded, tmp_path):
    model = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]))
    with pytest.raises(DataTypeError, match=r"data is the path 'slide.png'.*read_image"):
        hx.tl.predict("slide.png", model)
    with pytest.raises(DataTypeError, match="sdatas must be SpatialData or AnnData"):
        hx.tl.train(3, "mean")
    with pytest.raises(DataValueError, match=r"model='ridge' names a method.*hx.tl.train\(sections, 'ridge'\)"):
        hx.tl.predict(embedded[1], "ridge")
    with pytest.raises(DataValueError, match=r"gene_selection='hgv'.*'hvg'"):
        hx.tl.train(embedded[0], "mean", gene_selection="hgv")
    with pytest.raises(DataValueError, match=r"gene_selection='hgv'.*'hvg'"):
        hx.tl.cross_validate(embedded, "mean", gene_selection="hgv")


def test_a_section_without_an_embedding_is_named(embedded):
    del embedded[1]["table"].obsm["X_morphology"]
    with pytest.raises(MissingKeyError, match=r"section '.+' holds no image embedding"):
        hx.tl.train(embedded[:2], "ridge", genes=genes_of(embedded[0]))


def test_a_model_that_the_cache_cannot_take_is_not_lost(embedded, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with hx.settings.override(cache_dir=blocked), pytest.warns(HespotexWarning, match="model.save"):
        model = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]))
    assert model.is_fitted


def test_what_a_model_reads_is_part_of_its_identity(embedded):
    table = embedded[0]["table"]
    table.obsm["X_other"] = table.obsm["X_morphology"].copy()
    one = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]), embedding_key="X_morphology")
    other = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]), embedding_key="X_other")
    assert identify(one) != identify(other)
    hx.tl.predict(embedded[0])  # by the model that the object names: the one trained last
    assert embedded[0]["table"].uns["hespotex"]["mean"]["embedding_key"] == "X_other"


def test_the_device_asked_for_is_the_one_that_predicts(embedded, monkeypatch):
    for sdata in embedded[:2]:
        hx.pp.spatial_graph(sdata)
    model = hx.tl.train(embedded[0], "hespotex", genes=genes_of(embedded[0]), config={"epochs": 1, "gate_epochs": 1})
    seen = []
    original = hx.models.hespotex.model.resolve_device
    monkeypatch.setattr(
        "hespotex.models.hespotex.model.resolve_device", lambda: seen.append(hx.settings.device) or original()
    )
    hx.tl.predict(embedded[1], model, device="cpu")
    assert seen == ["cpu"]
    assert hx.settings.device == "auto"


def test_a_prediction_replaces_predictions_only(embedded):
    model = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]))
    table = embedded[1]["table"]
    table.layers["counts"] = table.X.copy()
    before = stored(embedded[1])
    for key, held in {
        "counts": "layers['counts']",
        "morphology": "obsm['X_morphology']",
        "X_morphology": "obsm",
    }.items():
        with pytest.raises(DataValueError, match="no prediction") as caught:
            hx.tl.predict(embedded[1], model, key_added=key)
        assert held in str(caught.value)
    with pytest.raises(DataValueError, match="cannot be stored"):
        hx.tl.predict(embedded[1], model, key_added="my model")
    assert stored(embedded[1]) == before
    hx.tl.predict(embedded[1], model)
    hx.tl.predict(embedded[1], hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0], 5)))
    assert embedded[1]["table"].obsm["mean"].shape[1] == 5


def test_what_cross_validation_would_overwrite_is_refused_before_the_work(embedded):
    embedded[2]["table"].layers["mean_cv"] = embedded[2]["table"].X.copy()
    with pytest.raises(DataValueError, match="no prediction"):
        hx.tl.cross_validate(embedded, "mean", genes=genes_of(embedded[0]))


def test_a_model_fitted_anew_on_bare_sections_forgets_its_recipe(embedded):
    model = hx.tl.train(embedded[0], "mean", genes=genes_of(embedded[0]))
    model.fit([hx.data.bridge.views_of(embedded[0], genes=genes_of(embedded[0], 4))[0].section])
    assert model.recipe is None


def test_scores_of_inner_choices_travel_with_the_model(embedded, tmp_path):
    model = hx.tl.train(embedded, "ridge", genes=genes_of(embedded[0]))
    assert -1 < model.scores["inner_pearson"] < 1
    assert hx.models.load(model.save(tmp_path / "m.hx")).scores == model.scores
