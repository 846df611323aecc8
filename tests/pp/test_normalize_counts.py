import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hespotex.errors import CountsError, DataValueError, HespotexWarning, MissingKeyError
from hespotex.pp import normalize_counts


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(2, size=(6, 5)).astype(np.int32)
    return ad.AnnData(
        sparse.csr_matrix(counts),
        pd.DataFrame(index=[f"s{k}" for k in range(6)]),
        pd.DataFrame({"hespotex_target": [True, False, True, False, False]}, index=list("ABCDE")),
    )


def test_full_library_is_the_default_and_x_stays(adata):
    counts = adata.X.toarray()
    assert normalize_counts(adata) is None
    layer = adata.layers["log1p_cp10k"]
    assert sparse.issparse(layer)
    assert layer.dtype == np.float32
    np.testing.assert_allclose(layer.toarray(), np.log1p(1e4 * counts / counts.sum(1, keepdims=True)), rtol=1e-6)
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.X.dtype == np.int32
    assert adata.uns["hespotex"]["log1p_cp10k"]["unit"] == "log1p_cp10k"


def test_panel_unit_holds_the_panel_alone(adata):
    counts = adata.X.toarray()[:, [0, 2]].astype(float)
    normalize_counts(adata, unit="log1p_cpm_panel", key_added="cpm")
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(adata.obsm["cpm"].toarray(), np.log1p(1e6 * counts / total), rtol=1e-6)
    assert list(adata.uns["hespotex"]["cpm"]["genes"]) == ["A", "C"]
    del adata.var["hespotex_target"]
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.select_genes"):
        normalize_counts(adata, unit="log1p_cpm_panel")


def test_copy_returns_the_matrix_and_writes_nothing(adata):
    values = normalize_counts(adata, copy=True)
    assert values.shape == adata.shape
    several = normalize_counts([adata, adata], copy=True)
    assert len(several) == 2
    assert not adata.uns
    assert not adata.layers.keys() - {None}


def test_what_is_there_is_not_replaced(adata):
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(DataValueError, match=r"layers\['counts'\]"):
        normalize_counts(adata, layer="counts", key_added="counts")
    assert adata.layers["counts"].dtype == np.int32
    adata.uns["hespotex"] = {"ridge": {"created_by": "hespotex.tl.predict"}}
    with pytest.raises(DataValueError, match=r"uns\['hespotex'\]\['ridge'\]"):
        normalize_counts(adata, key_added="ridge")
    normalize_counts(adata)
    normalize_counts(adata)


def test_empty_spots_stay_zero_with_a_warning(adata):
    counts = adata.X.toarray()
    counts[2] = 0
    adata.X = sparse.csr_matrix(counts)
    with pytest.warns(HespotexWarning, match="1 of 6 spots have no counts"):
        normalize_counts(adata)
    assert adata.layers["log1p_cp10k"][2].nnz == 0
    assert np.isfinite(adata.layers["log1p_cp10k"].data).all()


def test_what_cannot_be_normalised_is_an_error(adata):
    with pytest.raises(DataValueError, match="unit='tpm'"):
        normalize_counts(adata, unit="tpm")
    with pytest.raises(DataValueError, match="holds already"):
        normalize_counts(adata, unit="counts")
    with pytest.raises(MissingKeyError, match="layer 'raw'"):
        normalize_counts(adata, layer="raw")
    adata.X = adata.X.astype(float) * 0.5
    with pytest.raises(CountsError, match="already normalised"):
        normalize_counts(adata)
    assert not adata.uns
