"""What can be wrong with a section below the spot: each is a clear error, or does no harm."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from geopandas import GeoDataFrame
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import DataValueError, HespotexError
from hespotex.models import _samples

GENES = ["TUMOUR1", "T_CELL1"]
TRAINED = {
    "ridge_parts": {},
    "istar": {"epochs": 2, "n_members": 1, "width": 16},
    "histex": {"epochs": 1, "n_members": 1},
    "xfuse": {
        "depth": 2,
        "width": 2,
        "patch": 8,
        "metagenes": 1,
        "start_profiles": "equal",
        "epochs": 1,
        "n_samples": 2,
    },
}
UNTRAINED = ("tesla", "interpolate")


def section(**options):
    sdata = hx.datasets.synthetic(**{"size_px": 700, "n_genes": 20, "pitch_um": 60, "seed": 4, **options})
    hx.pp.detect_tissue(sdata)
    return sdata


def with_parts(sdata):
    hx.pp.superpixels(sdata, 16)
    hx.pp.embed(sdata, "morphology", shapes_key="superpixels", tile_um=32, context_um=0, progress_bar=False)
    hx.pp.embed(sdata, "rgb", shapes_key="superpixels", tile_um=16, progress_bar=False)
    return sdata


def fit_predict(sdata, name, genes=GENES):
    if name in UNTRAINED:
        hx.tl.predict(sdata, name, genes=genes)
    else:
        hx.tl.predict(sdata, hx.tl.train(sdata, name, config=TRAINED[name], genes=genes))
    return sdata[f"{name}_superpixels"].X


def keep(sdata, rows):
    """Only some of the spots."""
    sdata["table"] = sdata["table"][rows].copy()
    return sdata


def move_tissue(sdata, outline):
    sdata["tissue"] = ShapesModel.parse(
        GeoDataFrame(geometry=[outline]), transformations=get_transformation(sdata["image"], get_all=True)
    )
    return sdata


METHODS = [*TRAINED, *UNTRAINED]


@pytest.mark.parametrize("name", METHODS)
def test_a_single_spot(name):
    sdata = with_parts(keep(section(), [0]))
    try:
        values = fit_predict(sdata, name)
    except HespotexError as error:
        assert len(str(error)) > 20  # noqa: PT017  either a clear error or a finite map
        assert f"{name}_superpixels" not in sdata.tables
    else:
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", METHODS)
def test_spots_off_all_superpixels(name):
    sdata = section()
    x = sdata["table"].obsm["spatial"][:, 0]
    keep(sdata, x > 400)
    move_tissue(sdata, shapely.box(0, 0, 200, 700))
    with_parts(sdata)
    if name == "interpolate":
        assert np.isfinite(fit_predict(sdata, name)).all()  # places alone: it may look far
    else:
        with pytest.raises(HespotexError, match="superpixel|parts|spot"):
            fit_predict(sdata, name)
        assert f"{name}_superpixels" not in sdata.tables


@pytest.mark.parametrize("name", METHODS)
def test_spots_partly_off_tissue_do_no_harm(name):
    sdata = move_tissue(section(), shapely.box(0, 0, 400, 700))
    assert np.isfinite(fit_predict(with_parts(sdata), name)).all()


@pytest.mark.parametrize("name", METHODS)
def test_overlapping_spots(name):
    sdata = with_parts(section(pitch_um=60, diameter_um=90))
    assert np.isfinite(fit_predict(sdata, name)).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_gene_without_counts_is_predicted_as_none(name):
    sdata = section()
    counts = sdata["table"].X.tolil()
    counts[:, sdata["table"].var_names.get_loc("T_CELL1")] = 0
    sdata["table"].X = counts.tocsr()
    values = fit_predict(with_parts(sdata), name)
    assert np.isfinite(values).all()
    share = values[:, 1].mean() / values[:, 0].mean()
    assert share < 0.2


@pytest.mark.parametrize("name", METHODS)
def test_genes_that_are_all_zero(name):
    sdata = section()
    counts = sdata["table"].X.tolil()
    counts[:, sdata["table"].var_names.get_indexer(GENES)] = 0
    sdata["table"].X = counts.tocsr()
    sdata = with_parts(sdata)
    try:
        values = fit_predict(sdata, name)
    except HespotexError as error:
        assert "zero" in str(error) or "counts" in str(error)  # noqa: PT017
    else:
        assert np.abs(values).max() < 1


OF_NUCLEI = [("ridge_parts", {}), ("stand", {"max_epochs": 2})]


def keep_nuclei(sdata, chosen):
    """Only some of the nuclei."""
    hx.pp.segment_nuclei(sdata, progress_bar=False)
    kept = sdata["nuclei"][chosen(sdata["nuclei"].geometry.centroid)]
    del sdata["nuclei_features"]
    sdata["nuclei"] = kept
    hx.pp.embed_nuclei(sdata, "morphology", progress_bar=False)
    return sdata


@pytest.mark.parametrize(("name", "config"), OF_NUCLEI)
def test_nuclei_outside_all_spots_and_spots_without_nuclei(name, config):
    sdata = keep_nuclei(section(), lambda centres: centres.x < 350)
    model = hx.tl.train(sdata, name, config=config, genes=GENES, parts_key="nuclei")
    hx.tl.predict(sdata, model)
    assert sdata[f"{name}_nuclei"].n_obs == len(sdata["nuclei"])
    assert np.isfinite(sdata[f"{name}_nuclei"].X).all()


@pytest.mark.parametrize(("name", "config"), OF_NUCLEI)
def test_nuclei_of_which_no_spot_holds_any(name, config):
    sdata = section()
    keep(sdata, sdata["table"].obsm["spatial"][:, 0] > 450)
    keep_nuclei(sdata, lambda centres: centres.x < 300)
    with pytest.raises(HespotexError, match="no spot holds any of its|no spot holds a nucle"):
        hx.tl.train(sdata, name, config=config, genes=GENES, parts_key="nuclei")


def test_more_samples_than_memory_holds(monkeypatch):
    sdata = with_parts(section())
    model = hx.tl.train(sdata, "xfuse", config=TRAINED["xfuse"], genes=GENES)
    monkeypatch.setattr(_samples, "available_bytes", lambda: 2 * 3 * 4 * len(sdata["superpixels"]) * len(GENES))
    with pytest.raises(DataValueError, match="memory allows n_samples=3"):
        hx.tl.predict(sdata, model, n_samples=4, keep_samples=True)
    assert "xfuse_superpixels" not in sdata.tables
    hx.tl.predict(sdata, model, n_samples=3, keep_samples=True)
    assert sdata["xfuse_superpixels"].obsm["xfuse_samples"].shape[1:] == (2, 3)


def test_a_method_of_nuclei_does_not_take_superpixels_for_them():
    sdata = with_parts(section())
    with pytest.raises(HespotexError, match=r"hx\.pp\.segment_nuclei"):
        hx.tl.train(sdata, "stand", genes=GENES)


def test_an_in_sample_method_cannot_be_cross_validated():
    patients = hx.datasets.synthetic(n_patients=2, size_px=600, n_genes=20, pitch_um=60)
    with pytest.raises(DataValueError, match="predict only the section"):
        hx.tl.cross_validate(patients, ["tesla"])
