"""Cross-validation of models below the spot, scored at the spots."""

from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.data.units import normalize
from hespotex.errors import DataValueError

GENES = ["TUMOUR1", "T_CELL1", "FIBROBLAST1"]


@pytest.fixture
def patients():
    sections = hx.datasets.synthetic(n_patients=3, size_px=600, n_genes=20, pitch_um=60, seed=3)
    for sdata in sections:
        hx.pp.embed(sdata, "morphology", progress_bar=False)
        hx.pp.detect_tissue(sdata)
        hx.pp.superpixels(sdata, 16)
        hx.pp.embed(sdata, "morphology", shapes_key="superpixels", tile_um=32, progress_bar=False)
    return sections


def test_counts_of_a_test_section_change_nothing_that_is_predicted_for_it(patients):
    options = {"n_top_genes": 8, "gene_selection": "high_mean", "nulls": False}
    hx.tl.cross_validate(patients, "ridge_parts", **options)
    before = hx.get.prediction(patients[1], "ridge_parts_cv", table_key="table")
    rng = np.random.default_rng(0)
    table = patients[1]["table"]
    table.X = type(table.X)(rng.poisson(4, size=table.shape).astype(np.float32))
    hx.tl.cross_validate(patients, "ridge_parts", **options)
    after = hx.get.prediction(patients[1], "ridge_parts_cv", table_key="table")
    assert list(after.var_names) == list(before.var_names)
    np.testing.assert_array_equal(after.X, before.X)


def test_parts_are_scored_by_their_sums_at_the_spots_whatever_the_blocks(patients, monkeypatch):
    kind = hx.models.get("ridge_parts")
    whole = kind.predict_blocks
    monkeypatch.setattr(kind, "predict_blocks", lambda self, section: whole(self, section, block_rows=37))
    hx.tl.cross_validate(patients, "ridge_parts", genes=GENES, nulls=False)
    found = hx.get.prediction(patients[0], "ridge_parts_cv", table_key="table").X
    monkeypatch.undo()
    model = hx.tl.train(patients[1:], "ridge_parts", genes=GENES)
    hx.tl.predict(patients[0], model)
    sums = np.maximum(hx.tl.aggregate(patients[0], "ridge_parts_superpixels", "spots", copy=True).X, 0)
    counts = [sdata["table"].X.toarray() for sdata in patients[1:]]
    place = patients[0]["table"].var_names.get_indexer(GENES)
    share_of_panel = sum(each[:, place].sum() for each in counts) / sum(each.sum() for each in counts)
    np.testing.assert_allclose(found, normalize(sums, sums.sum(axis=1) / share_of_panel), rtol=1e-4, atol=1e-4)


def test_one_gene_may_be_named_alone(patients):
    table = hx.tl.cross_validate(patients, "ridge_parts", genes="TUMOUR1", nulls=False, copy=True)
    assert set(table["gene"]) == {"TUMOUR1"}


def test_levels_are_not_mixed(patients):
    with pytest.raises(DataValueError, match="predict at several levels"):
        hx.tl.cross_validate(patients, ["ridge_parts", "stand"], genes=GENES)
