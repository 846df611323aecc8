"""Training and predicting below the spot, gathering, coarsening, rasters."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import spatialdata
from spatialdata.models import TableModel
from spatialdata.transformations import get_transformation, set_transformation

import hespotex as hx
from hespotex.data import blockwise
from hespotex.errors import (
    AmbiguousKeyError,
    CountsError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    ModelMismatchError,
)

GENES = ("TUMOUR1", "T_CELL1", "FIBROBLAST1")


@pytest.fixture(scope="module")
def pair():
    """Two patients with superpixels of 16 µm and features for them."""
    sections = hx.datasets.synthetic(n_patients=2, size_px=1000, n_genes=40, pitch_um=60, seed=3)
    for sdata in sections:
        hx.pp.detect_tissue(sdata)
        hx.pp.superpixels(sdata, 16)
        hx.pp.embed(sdata, "morphology", shapes_key="superpixels", tile_um=32, progress_bar=False)
    return sections


@pytest.fixture
def section(pair):
    return own_copy(pair[0])


@pytest.fixture
def other(pair):
    return own_copy(pair[1])


@pytest.fixture(scope="module")
def linear(pair):
    return hx.tl.train(own_copy(pair[0]), "ridge_parts", genes=GENES)


def own_copy(sdata):
    elements = {name: element for _, name, element in sdata.gen_spatial_elements()}
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return spatialdata.SpatialData.init_from_elements({**elements, **tables}, attrs=dict(sdata.attrs))


def test_an_untrained_method_predicts_at_once_and_makes_what_it_needs():
    sdata = hx.datasets.synthetic(size_px=800, n_genes=20, pitch_um=60, seed=0)
    hx.tl.predict(sdata, "tesla", genes=GENES[:2])
    table = sdata["tesla_superpixels"]
    assert list(table.var_names) == list(GENES[:2])
    assert np.isfinite(table.X).all()
    assert sdata["superpixels"]["size_um"].iloc[0] == 8
    assert "model" not in sdata.attrs["hespotex"]  # nothing was trained


def test_a_prediction_at_superpixels_is_a_table_of_their_own(section, linear):
    hx.tl.predict(section, linear)
    table = section["ridge_parts_superpixels"]
    assert table.shape == (len(section["superpixels"]), 3)
    assert list(table.obs["part_id"]) == list(section["superpixels"].index)
    assert (
        table.obs[["array_row", "array_col"]].to_numpy().tolist()
        == section["superpixels"][["row", "col"]].to_numpy().tolist()
    )
    found = hx.get.prediction(section, "ridge_parts")
    np.testing.assert_array_equal(found.X, table.X)
    assert found.uns["hespotex"]["ridge_parts"]["unit"] == "counts"


def test_the_table_survives_zarr(section, linear, tmp_path):
    hx.tl.predict(section, linear)
    section.write(tmp_path / "s.zarr")
    again = spatialdata.read_zarr(tmp_path / "s.zarr")
    np.testing.assert_array_equal(hx.get.prediction(again, "ridge_parts").X, section["ridge_parts_superpixels"].X)


def test_transfer_lays_the_grid_and_embeds_it_on_a_slide_that_has_only_the_image(linear):
    slide = hx.datasets.synthetic(size_px=600, with_expression=False, seed=9)
    hx.tl.predict(slide, linear)
    assert slide["superpixels"]["size_um"].iloc[0] == 16
    assert np.isfinite(slide["ridge_parts_superpixels"].X).all()


def test_measured_expression_of_another_section_is_not_looked_at(other, linear):
    blank = own_copy(other)
    blank["table"].X.data[:] = 7
    for sdata in (other, blank):
        hx.tl.predict(sdata, linear)
    np.testing.assert_array_equal(other["ridge_parts_superpixels"].X, blank["ridge_parts_superpixels"].X)


def test_blocks_do_not_change_the_result(section, linear):
    hx.tl.predict(section, linear, block_rows=100)
    whole = hx.tl.predict(section, linear, copy=True, key_added="again")
    np.testing.assert_allclose(section["ridge_parts_superpixels"].X, whole.X, rtol=1e-5)
    assert "again_superpixels" not in section.tables


def test_genes_can_be_chosen_at_prediction(section, linear):
    whole = hx.tl.predict(section, linear, copy=True)
    some = hx.tl.predict(section, linear, genes=["T_CELL1"], copy=True)
    np.testing.assert_array_equal(some.X[:, 0], whole[:, "T_CELL1"].X[:, 0])
    with pytest.raises(DataValueError, match="does not predict 1 of 1: NOPE"):
        hx.tl.predict(section, linear, genes=["NOPE"])


def test_a_target_on_disk_holds_the_same_and_leaves_the_object_alone(section, linear, tmp_path):
    hx.tl.predict(section, linear, target=tmp_path / "big.zarr", block_rows=500)
    assert "ridge_parts_superpixels" not in section.tables
    stored = spatialdata.read_zarr(tmp_path / "big.zarr")
    expected = hx.tl.predict(section, linear, copy=True)
    np.testing.assert_allclose(stored["ridge_parts_superpixels"].X, expected.X, rtol=1e-5)
    np.testing.assert_allclose(hx.get.prediction(stored).X, expected.X, rtol=1e-5)
    with pytest.raises(DataValueError, match="exists already"):
        hx.tl.predict(section, linear, target=tmp_path / "big.zarr")


def test_a_target_appears_only_when_whole(section, linear, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(blockwise.TableStore, "write", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        hx.tl.predict(section, linear, target=tmp_path / "big.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_result_larger_than_memory_is_refused_with_the_ways_out(section, linear, monkeypatch):
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 10_000)
    with pytest.raises(DataValueError, match=r"genes=.*target="):
        hx.tl.predict(section, linear)
    assert "ridge_parts_superpixels" not in section.tables


def test_an_in_sample_method_knows_its_section(section, other):
    model = hx.tl.train(section, "interpolate", genes=GENES)
    hx.tl.predict(section, model)
    with pytest.raises(ModelMismatchError, match="predicts only the section it was fitted on"):
        hx.tl.predict(other, model)


@pytest.mark.parametrize(("name", "config"), [("interpolate", {}), ("stage", {"max_epochs": 2, "patience": None})])
def test_an_in_sample_method_knows_its_section_without_the_spots_it_left_out(section, name, config):
    totals = np.asarray(section["table"].X.sum(axis=1)).ravel()
    section["table"].layers["raw"] = section["table"].X.copy()
    section["table"].X = section["table"].X * 0.5  # no counts: the layer named at training is read again
    with pytest.warns(HespotexWarning, match="are left out"):
        model = hx.tl.train(
            section,
            name,
            config=config,
            genes=GENES,
            min_counts=int(np.median(totals)),
            counts_layer="raw",
            parts_key="superpixels",
        )
    with pytest.warns(HespotexWarning, match="are left out"):
        hx.tl.predict(section, model)
    assert np.isfinite(section[f"{name}_superpixels"].X).all()


def test_what_was_learned_of_superpixels_is_not_taken_for_nuclei(section, linear):
    hx.pp.segment_nuclei(section, progress_bar=False)
    hx.pp.embed_nuclei(section, "morphology", tile_um=32, progress_bar=False)
    with pytest.raises(ModelMismatchError, match="'nuclei' are nuclei, and the model was trained on superpixels"):
        hx.tl.predict(section, linear, parts_key="nuclei")
    assert "ridge_parts_nuclei" not in section.tables


def test_one_gene_may_be_named_alone(section):
    hx.tl.predict(section, "interpolate", genes="TUMOUR1")
    assert list(section["interpolate_superpixels"].var_names) == ["TUMOUR1"]


def without_scale():
    sdata = hx.datasets.synthetic(size_px=600, n_genes=20, pitch_um=60, seed=0)
    for _, _, element in sdata.gen_spatial_elements():
        set_transformation(element, {"global": get_transformation(element, "global")}, set_all=True)
    return sdata


def systems(sdata):
    return {name: dict(get_transformation(each, get_all=True)) for _, name, each in sdata.gen_spatial_elements()}


def test_a_scale_given_at_prediction_reaches_an_untrained_method_and_stays_with_its_result():
    sdata = without_scale()
    hx.tl.predict(sdata, "interpolate", genes=GENES[:2], mpp=0.5)
    assert "microns" in get_transformation(sdata["image"], get_all=True)
    assert np.isfinite(sdata["interpolate_superpixels"].X).all()


@pytest.mark.parametrize("way", ["copy", "target", "error"])
def test_a_scale_given_at_prediction_is_taken_back(way, tmp_path):
    sdata = without_scale()
    before = systems(sdata)
    if way == "copy":
        hx.tl.predict(sdata, "interpolate", genes=GENES[:2], mpp=0.5, copy=True)
    elif way == "target":
        hx.tl.predict(sdata, "interpolate", genes=GENES[:2], mpp=0.5, target=tmp_path / "x.zarr")
    else:
        with pytest.raises(DataValueError, match="NOPE"), pytest.warns(HespotexWarning, match="NOPE"):
            hx.tl.predict(sdata, "interpolate", genes=[*GENES[:2], "NOPE"], mpp=0.5)
    assert systems(sdata) == before


def test_what_is_wrong_is_said_before_parts_are_embedded(linear, tmp_path, monkeypatch):
    sdata = hx.datasets.synthetic(size_px=600, with_expression=False, seed=9)

    def never(*args, **kwargs):
        raise AssertionError("embedded first")

    monkeypatch.setattr(hx.pp, "embed", never)
    (tmp_path / "there.zarr").mkdir()
    with pytest.raises(DataValueError, match="exists already"):
        hx.tl.predict(sdata, linear, target=tmp_path / "there.zarr")
    with pytest.raises(DataValueError, match="NOPE"):
        hx.tl.predict(sdata, linear, genes=["NOPE"])
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 1_000)
    with pytest.raises(DataValueError, match=r"genes=.*target="):
        hx.tl.predict(sdata, linear)


def test_ctrl_c_leaves_neither_object_nor_target_half_written(section, linear, tmp_path, monkeypatch):
    blocks = type(linear).predict_blocks

    def interrupted(self, *args, **kwargs):
        yield next(blocks(self, *args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(linear), "predict_blocks", interrupted)
    before = {name for _, name, _ in section.gen_elements()}
    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict(section, linear, block_rows=100)
    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict(section, linear, block_rows=100, target=tmp_path / "big.zarr")
    assert {name for _, name, _ in section.gen_elements()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_raster_names_what_is_wrong(section, linear):
    hx.tl.predict(section, linear)
    with pytest.raises(DataValueError, match="genes is empty"):
        hx.get.raster(section, "ridge_parts", genes=[])
    section["ridge_parts_superpixels_raster"] = section["tissue"]
    with pytest.raises(DataValueError, match="'ridge_parts_superpixels_raster', as another element is"):
        hx.get.raster(section, "ridge_parts", write=True)


def test_a_raster_of_nuclei_is_refused_before_they_are_predicted(section, monkeypatch):
    hx.pp.segment_nuclei(section, progress_bar=False)
    monkeypatch.setattr(hx.models.get("interpolate"), "predict_blocks", None)
    with pytest.raises(DataValueError, match="only a grid makes an image"):
        hx.tl.predict(section, "interpolate", genes=GENES, parts_key="nuclei", raster=True)


def test_cells_of_another_size_are_refused(linear, other):
    fresh = hx.datasets.synthetic(size_px=600, with_expression=False, seed=9)
    hx.pp.detect_tissue(fresh)
    hx.pp.superpixels(fresh, 20)
    with pytest.raises(ModelMismatchError, match=r"cells of 20 µm, the model was trained on 16"):
        hx.tl.predict(fresh, linear)


def test_another_encoder_setting_is_refused(linear):
    fresh = hx.datasets.synthetic(size_px=600, with_expression=False, seed=9)
    hx.pp.detect_tissue(fresh)
    hx.pp.superpixels(fresh, 16)
    hx.pp.embed(fresh, "morphology", shapes_key="superpixels", tile_um=64, progress_bar=False)
    with pytest.raises(ModelMismatchError, match="tile_um: 64.0 here, 32.0 in training"):
        hx.tl.predict(fresh, linear)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda sdata: None, r"hx\.pp\.superpixels"),
        (lambda sdata: (hx.pp.detect_tissue(sdata), hx.pp.superpixels(sdata, 16)), r"hx\.pp\.embed"),
    ],
)
def test_what_training_lacks_is_named(prepare, message):
    sdata = hx.datasets.synthetic(size_px=600, n_genes=20, pitch_um=60)
    prepare(sdata)
    with pytest.raises(MissingKeyError, match=message):
        hx.tl.train(sdata, "ridge_parts", genes=GENES)


def test_an_anndata_has_no_parts(section, linear):
    with pytest.raises(DataTypeError, match="SpatialData"):
        hx.tl.train(section["table"], "ridge_parts", genes=GENES)
    with pytest.raises(DataTypeError, match="SpatialData"):
        hx.tl.predict(section["table"], linear)


def test_fine_words_do_not_go_with_spot_models(section):
    hx.pp.embed(section, "morphology", progress_bar=False)
    with pytest.raises(DataValueError, match="reads no parts"):
        hx.tl.train(section, "ridge", genes=GENES, parts_key="superpixels")
    model = hx.tl.train(section, "ridge", genes=GENES)
    with pytest.raises(DataValueError, match="methods below the spot"):
        hx.tl.predict(section, model, raster=True)


def test_a_prediction_does_not_replace_another_table(section, linear):
    section["ridge_parts_superpixels"] = section["table"].copy()
    with pytest.raises(DataValueError, match="which is no prediction"):
        hx.tl.predict(section, linear)


def test_raster_shows_each_cell_at_its_place(section, linear):
    hx.tl.predict(section, linear, raster=True)
    image = section["ridge_parts_superpixels_raster"]
    table, shapes = section["ridge_parts_superpixels"], section["superpixels"]
    low = shapes[["row", "col"]].min().to_numpy()
    row, column = (shapes[["row", "col"]].to_numpy() - low).T
    np.testing.assert_array_equal(image.sel(c="T_CELL1").values[row, column], table[:, "T_CELL1"].X.ravel())
    assert int(np.isfinite(image.values[0]).sum()) == len(shapes)
    matrix = get_transformation(image, "global").to_affine_matrix(("x", "y"), ("x", "y"))
    whole = int(np.argmax(shapes.area))
    centre = matrix @ [column[whole] + 0.5, row[whole] + 0.5, 1]
    np.testing.assert_allclose(centre[:2], np.ravel(shapes.geometry.iloc[whole].centroid.coords[0]))


def test_a_raster_is_not_taken_for_the_slide(section, linear):
    hx.tl.predict(section, linear, raster=True)
    assert len(section.images) == 2
    hx.tl.predict(section, linear, key_added="again")
    hx.tl.aggregate(section, "again_superpixels", "spots")
    hx.pp.embed(section, "rgb", shapes_key="spots", progress_bar=False)
    hx.pl.spatial(section, GENES[:1], "again", table_key="table")
    with pytest.raises(MissingKeyError, match="image_key='nowhere'"):
        hx.pp.detect_tissue(section, image_key="nowhere", key_added="other")


def test_what_is_made_of_a_prediction_knows_what_that_was_trained_on(section, linear):
    hx.tl.predict(section, linear)
    hx.tl.reconcile(section, "ridge_parts_superpixels")
    hx.tl.aggregate(section, "ridge_parts_reconciled_superpixels", "spots")
    with pytest.warns(HespotexWarning, match="train"):
        hx.tl.evaluate(section, "ridge_parts_reconciled", table_key="table", nulls=False, copy=True)


def test_aggregation_is_the_sum_the_model_learned(section, linear):
    hx.tl.predict(section, linear)
    hx.tl.aggregate(section, "ridge_parts_superpixels", "spots")
    spots = hx.get.prediction(section, "ridge_parts", table_key="table")
    assert spots.X.shape == (section["table"].n_obs, 3)
    r = np.corrcoef(spots[:, "TUMOUR1"].X.ravel(), spots[:, "TUMOUR1"].layers["measured"].ravel())[0, 1]
    assert r > 0.5
    assert section["table"].obs["ridge_parts_coverage"].max() <= np.pi * (27.5 / 16) ** 2 + 1e-9


def test_a_table_of_some_of_the_shapes_gets_just_its_own(section, linear):
    hx.tl.predict(section, linear)
    whole = hx.tl.aggregate(section, "ridge_parts_superpixels", "spots", copy=True)
    section["table"] = section["table"][::2].copy()
    some = hx.tl.aggregate(section, "ridge_parts_superpixels", "spots", copy=True)
    np.testing.assert_array_equal(some.X, whole.X[::2])
    assert list(some.obs["part_id"]) == list(section["table"].obs["spot_id"])


def test_sums_over_regions_that_cover_everything_are_conserved(section, linear):
    import shapely
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    hx.tl.predict(section, linear)
    section["halves"] = ShapesModel.parse(
        GeoDataFrame(geometry=[shapely.box(0, 0, 333.3, 1000), shapely.box(333.3, 0, 1000, 1000)]),
        transformations=get_transformation(section["superpixels"], get_all=True),
    )
    halves = hx.tl.aggregate(section, "ridge_parts_superpixels", "halves", copy=True)
    weight = section["superpixels"].area.to_numpy() / 32**2
    expected = weight @ section["ridge_parts_superpixels"].X
    np.testing.assert_allclose(halves.X.sum(axis=0), expected, rtol=1e-5)
    hx.tl.aggregate(section, "ridge_parts_superpixels", "halves")
    np.testing.assert_array_equal(section["ridge_parts_halves"].X, halves.X)


def test_aggregation_of_logarithms_is_a_mean(section):
    hx.tl.predict(section, "interpolate", genes=GENES)
    with pytest.raises(DataValueError, match="how='mean'"):
        hx.tl.aggregate(section, "interpolate_superpixels", "spots", how="sum")
    hx.tl.aggregate(section, "interpolate_superpixels", "spots")
    values = hx.get.prediction(section, "interpolate", table_key="table").X
    fine = section["interpolate_superpixels"].X
    assert np.nanmin(values) >= fine.min() - 1e-6
    assert np.nanmax(values) <= fine.max() + 1e-6


def test_values_that_are_no_counts_are_not_summed_as_such(section):
    hx.pp.segment_nuclei(section, progress_bar=False)
    found = hx.tl.aggregate(section, "nuclei_features", "spots", copy=True)
    assert found.uns["hespotex"]["nuclei_features"]["unit"] == "unknown"
    area = section["nuclei_features"][:, "area_um2"].X.ravel()
    known = found[:, "area_um2"].X[found.obs["nuclei_features_coverage"].to_numpy() > 0]
    assert known.min() >= area.min()
    assert known.max() <= area.max()
    with pytest.raises(DataValueError, match="'unknown', of which sums mean nothing"):
        hx.tl.aggregate(section, "nuclei_features", "spots", how="sum")
    counted = section["nuclei_features"][:, ["area_um2"]].copy()
    counted.X = np.ones_like(counted.X)
    section["counted"] = counted
    sums = hx.tl.aggregate(section, "counted", "spots", copy=True)
    np.testing.assert_array_equal(sums.X.ravel(), sums.obs["counted_coverage"])


def test_aggregation_names_what_is_wrong(section, linear):
    with pytest.raises(MissingKeyError, match=r"did you mean one of \['morphology_superpixels'\]"):
        hx.tl.aggregate(section, "superpixels", "spots")
    hx.tl.predict(section, linear)
    with pytest.raises(MissingKeyError, match="to_='nowhere'"):
        hx.tl.aggregate(section, "ridge_parts_superpixels", "nowhere")
    section["table"].layers["mine"] = section["table"].X.copy()
    with pytest.raises(DataValueError, match="choose another key_added"):
        hx.tl.aggregate(section, "ridge_parts_superpixels", "spots", key_added="mine")
    hx.tl.predict(section, linear, key_added="ridge_parts")
    section["ridge_parts_superpixels"].uns["hespotex"]["two"] = dict(
        section["ridge_parts_superpixels"].uns["hespotex"]["ridge_parts"]
    )
    with pytest.raises(AmbiguousKeyError, match="several predictions"):
        hx.tl.aggregate(section, "ridge_parts_superpixels", "spots")


def test_a_reconciled_prediction_adds_up_to_every_spot(section, linear):
    hx.tl.predict(section, linear)
    before = section["ridge_parts_superpixels"].X.copy()
    hx.tl.reconcile(section, "ridge_parts_superpixels")
    sums = hx.tl.aggregate(section, "ridge_parts_reconciled_superpixels", "spots", copy=True)
    held = (sums.obs["ridge_parts_reconciled_coverage"] > 0).to_numpy()
    assert 0.9 * len(held) < held.sum()
    np.testing.assert_allclose(sums.X[held], section["table"][:, sums.var_names].X.toarray()[held], atol=1e-3)
    np.testing.assert_array_equal(section["ridge_parts_superpixels"].X, before)
    assert "measured" not in section["ridge_parts_reconciled_superpixels"].layers
    assert hx.get.prediction(section, "ridge_parts_reconciled").shape == before.shape


def test_nuclei_are_reconciled_with_a_layer_of_counts(section):
    hx.pp.segment_nuclei(section)
    hx.pp.embed_nuclei(section)
    model = hx.tl.train(section, "ridge_parts", genes=GENES, parts_key="nuclei")
    hx.tl.predict(section, model, parts_key="nuclei")
    section["table"].layers["raw"] = section["table"].X * 2
    section["table"].X = section["table"].X / 3
    with pytest.raises(CountsError, match="not whole numbers"):
        hx.tl.reconcile(section, "ridge_parts_nuclei")
    assert "ridge_parts_reconciled_nuclei" not in section.tables
    with pytest.warns(HespotexWarning, match="1 of 50 spots hold no part of 'nuclei'"):
        hx.tl.reconcile(section, "ridge_parts_nuclei", counts_layer="raw", key_added="exact")
    sums = hx.tl.aggregate(section, "exact_nuclei", "spots", copy=True)
    held = (sums.obs["exact_coverage"] > 0).to_numpy()
    np.testing.assert_allclose(
        sums.X[held], section["table"][:, sums.var_names].layers["raw"].toarray()[held], atol=1e-3
    )


def test_sums_of_overlapping_spots_that_no_map_meets_are_told_of():
    sdata = hx.datasets.synthetic(size_px=700, n_genes=20, pitch_um=60, diameter_um=110, seed=4)
    hx.pp.detect_tissue(sdata)
    hx.pp.superpixels(sdata, 16)
    hx.pp.embed(sdata, "morphology", shapes_key="superpixels", progress_bar=False)
    hx.tl.predict(sdata, hx.tl.train(sdata, "ridge_parts", genes=GENES[:2]))
    with pytest.warns(HespotexWarning, match=r"\d+ of 44 sums of spots are not met"):
        hx.tl.reconcile(sdata, "ridge_parts_superpixels")
    sums = hx.tl.aggregate(sdata, "ridge_parts_reconciled_superpixels", "spots", copy=True)
    measured = sdata["table"][:, sums.var_names].X
    np.testing.assert_allclose(sums.X.sum(axis=0), np.asarray(measured.sum(axis=0)).ravel(), rtol=1e-5)


def test_a_region_of_a_table_is_reconciled_alone(section, linear):
    hx.tl.predict(section, linear)
    hx.tl.reconcile(section, "ridge_parts_superpixels", key_added="alone")
    table, spots = section["table"].copy(), section["spots"]
    section["others"] = spots.iloc[:5].copy()
    more = table[:5].copy()
    more.obs["region"] = "others"
    more.obs_names = [f"other{i}" for i in range(5)]
    more.X = more.X * 3
    both = anndata.concat([more, table])
    both.obs["region"] = both.obs["region"].astype("category")
    section["table"] = TableModel.parse(both, region=["others", "spots"], region_key="region", instance_key="spot_id")
    with pytest.raises(AmbiguousKeyError, match=r"name one with shapes_key="):
        hx.tl.reconcile(section, "ridge_parts_superpixels")
    hx.tl.reconcile(section, "ridge_parts_superpixels", shapes_key="spots")
    np.testing.assert_array_equal(section["ridge_parts_reconciled_superpixels"].X, section["alone_superpixels"].X)


def test_a_reconciled_prediction_knows_that_it_saw_the_section(section, other, linear):
    hx.tl.predict(other, linear)
    hx.tl.reconcile(other, "ridge_parts_superpixels")
    entry = other["ridge_parts_reconciled_superpixels"].uns["hespotex"]["ridge_parts_reconciled"]
    names = [sdata.attrs["hespotex"]["name"] for sdata in (section, other)]
    assert list(entry["training_sections"]) == names


def test_reconciling_names_what_is_wrong(section, linear):
    hx.tl.predict(section, linear)
    with pytest.raises(DataValueError, match="would replace table 'ridge_parts_superpixels' that is reconciled"):
        hx.tl.reconcile(section, "ridge_parts_superpixels", key_added="ridge_parts")
    hx.tl.predict(section, "interpolate", genes=GENES)
    with pytest.raises(DataValueError, match="'log1p_cp10k', of which sums mean nothing"):
        hx.tl.reconcile(section, "interpolate_superpixels")
    hx.tl.predict(section, linear)
    section["table"] = section["table"][:, section["table"].var_names != "T_CELL1"].copy()
    with pytest.raises(MissingKeyError, match=r"1 predicted genes are not in table 'table' \(T_CELL1\)"):
        hx.tl.reconcile(section, "ridge_parts_superpixels")
    hx.tl.predict(section, linear, genes=GENES[:1])
    section["mine_superpixels"] = section["morphology_superpixels"].copy()
    with pytest.raises(DataValueError, match="choose another key_added"):
        hx.tl.reconcile(section, "ridge_parts_superpixels", key_added="mine")


def test_merged_spots_count_what_theirs_counted(section):
    merged = hx.tl.coarsen(section, merge=2)
    assert merged["table"].n_obs * 4 <= section["table"].n_obs
    assert (merged["table"].obs["n_parts"] == 4).all()
    shares = merged["table"].X.sum() / section["table"].X.sum()
    assert shares == pytest.approx(merged["table"].n_obs * 4 / section["table"].n_obs, rel=0.4)
    spots = section["table"].X.toarray()
    assert any(
        np.array_equal(merged["table"].X[0].toarray()[0], spots[list(four)].sum(axis=0)) for four in _fours(section)
    )
    assert merged["fine_table"].n_obs == section["table"].n_obs
    hx.tl.predict(merged, "interpolate", genes=GENES, parts_key="fine")
    assert merged["interpolate_fine"].n_obs == section["table"].n_obs


def test_a_model_of_the_fine_section_does_not_answer_for_the_coarse_one(section):
    section.attrs["hespotex"] = {"model": "somewhere.hx", "patient": "p"}
    assert hx.tl.coarsen(section, merge=2).attrs["hespotex"] == {"patient": "p"}
    assert section.attrs["hespotex"]["model"] == "somewhere.hx"


def _fours(section):
    obs = section["table"].obs.reset_index()
    block = obs["array_row"] // 2 * 1000 + obs["array_col"] // 4
    return [rows for rows in obs.groupby(block).indices.values() if len(rows) == 4]


def test_a_lattice_of_spots_pools_cells(section):
    cells = hx.datasets.cell_truth(section)
    rng = np.random.default_rng(0)
    cells.X = rng.poisson(cells.X * 3).astype(np.int32)
    fine = own_copy(section)
    del fine["table"]
    from spatialdata.models import ShapesModel, TableModel

    fine["cells"] = ShapesModel.parse(
        cells.obsm["spatial"], geometry=0, radius=5.0, index=cells.obs_names,
        transformations=get_transformation(section["spots"], get_all=True),
    )  # fmt: skip
    cells.obs["region"], cells.obs["cell_id"] = "cells", cells.obs_names.to_numpy()
    cells.obs["region"] = cells.obs["region"].astype("category")
    fine["cells_table"] = TableModel.parse(cells, region="cells", region_key="region", instance_key="cell_id")
    pooled = hx.tl.coarsen(fine, pitch_um=80, diameter_um=60, table_key="cells_table")
    distance = np.linalg.norm(cells.obsm["spatial"][:, None] - pooled["table"].obsm["spatial"][None], axis=2)
    inside = distance <= 60
    np.testing.assert_array_equal(pooled["table"].X.toarray(), inside.T.astype(int) @ cells.X)
    np.testing.assert_array_equal(pooled["table"].obs["n_parts"], inside.sum(axis=0))
    assert hx.data.tables.resolve_table(pooled).key == "table"


def test_coarsening_names_what_is_wrong(section):
    with pytest.raises(DataValueError, match="merge=1"):
        hx.tl.coarsen(section, merge=1)
    with pytest.raises(GeometryError, match="no spot holds 50"):
        hx.tl.coarsen(section, min_parts=50)
    with pytest.raises(DataTypeError, match="must be a SpatialData"):
        hx.tl.coarsen(section["table"])
    del section["table"].obs["array_row"]
    with pytest.raises(MissingKeyError, match="array positions"):
        hx.tl.coarsen(section, merge=2)
