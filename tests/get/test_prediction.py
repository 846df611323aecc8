from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.data.provenance import record
from hespotex.data.stored import check_free, write_prediction
from hespotex.errors import DataValueError, HespotexWarning, MissingKeyError

from ..conftest import stored

GENES = ("B", "X", "A")  # X was never measured


def table(unit: str = "log1p_cp10k", genes: tuple[str, ...] = GENES) -> ad.AnnData:
    """Three spots of four genes with a prediction of `genes`."""
    counts = np.array([[1, 2, 0, 7], [0, 5, 5, 0], [3, 0, 0, 1]], dtype=np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame({"length": [10, 20, 30, 40]}, index=list("ABCD")))
    values = np.arange(9, dtype=np.float32).reshape(3, 3)[:, : len(genes)]
    form = write_prediction(adata, "ridge", values, genes, {"std": values / 10}, own_table=False)
    record(adata, "ridge", kind="prediction", form=form, unit=unit, genes=list(genes), created_by="test")
    return adata


def test_measured_genes_carry_their_values_and_the_others_nan() -> None:
    pred = hx.get.prediction(table())
    assert list(pred.var_names) == list(GENES)
    assert pred.var["measured"].tolist() == [True, False, True]
    assert pred.var["length"].fillna(0).tolist() == [20, 0, 10]
    measured = pred.layers["measured"]
    np.testing.assert_allclose(measured[:, 0], np.log1p(1e4 * np.array([2 / 10, 5 / 10, 0])), rtol=1e-6)
    np.testing.assert_allclose(measured[:, 2], np.log1p(1e4 * np.array([1 / 10, 0, 3 / 4])), rtol=1e-6)
    assert np.isnan(measured[:, 1]).all()
    np.testing.assert_allclose(pred.layers["std"], pred.X / 10)


def test_a_panel_that_was_not_measured_whole_has_no_measurement_per_panel() -> None:
    assert "measured" not in hx.get.prediction(table("log1p_cpm_panel")).layers
    whole = hx.get.prediction(table("log1p_cpm_panel", ("B", "A"))).layers["measured"]
    np.testing.assert_allclose(whole[0], np.log1p(1e6 * np.array([2, 1]) / 3), rtol=1e-6)


def test_without_any_measured_gene_there_is_no_layer() -> None:
    pred = hx.get.prediction(table(genes=("X", "Y")))
    assert "measured" not in pred.layers
    assert not pred.var["measured"].any()


def test_what_is_no_count_is_not_taken_for_the_measurement() -> None:
    adata = table()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    with pytest.warns(HespotexWarning, match="already normalised"):
        assert "measured" not in hx.get.prediction(adata).layers
    expected = hx.get.prediction(table()).layers["measured"]
    np.testing.assert_array_equal(hx.get.prediction(adata, counts_layer="counts").layers["measured"], expected)
    with pytest.raises(MissingKeyError, match="'raw'"):
        hx.get.prediction(adata, counts_layer="raw")
    adata.X = None
    assert "measured" not in hx.get.prediction(adata).layers


def test_the_result_is_apart_from_the_object() -> None:
    adata = table()
    adata.obsm["spatial"] = np.ones((3, 2))
    adata.obsp["near"] = sparse.csr_matrix(np.ones((3, 3)))
    adata.uns["theirs"] = {"inside": np.ones(2)}
    before = stored(adata)
    pred = hx.get.prediction(adata)
    pred.X[:] = 0
    pred.obs["new"] = 1
    pred.obsm["spatial"][:] = 0
    pred.obsp["near"].data[:] = 0
    pred.uns["theirs"]["inside"][:] = 0
    pred.uns["hespotex"]["ridge"]["genes"][0] = "?"
    pred.layers["std"][:] = 0
    assert stored(adata) == before


def test_a_new_prediction_leaves_nothing_of_the_last_one_under_its_key() -> None:
    adata = table()
    adata.obsm["ridge_samples"] = np.zeros((3, 3, 2), dtype=np.float32)
    adata.obs["ridge_ood"] = 0.5
    write_prediction(adata, "ridge", np.zeros((3, 3), dtype=np.float32), GENES, {}, own_table=False)
    assert set(adata.obsm) == {"ridge"}
    assert "ridge_ood" not in adata.obs


@pytest.mark.parametrize("place", ["obsm['ridge_samples']", "obs['ridge_ood']"])
def test_what_a_user_keeps_under_a_name_of_a_prediction_is_not_replaced(place: str) -> None:
    adata = ad.AnnData(np.ones((3, 2), dtype=np.float32))
    if place.startswith("obsm"):
        adata.obsm["ridge_samples"] = np.zeros((3, 2))
    else:
        adata.obs["ridge_ood"] = 1.0
    with pytest.raises(DataValueError, match=re.escape(place)):
        check_free(adata, "ridge")
