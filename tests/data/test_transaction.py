from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd

from hespotex.data.transaction import restored_on_error

from ..conftest import fresh, stored


def table() -> ad.AnnData:
    adata = ad.AnnData(np.ones((3, 2), np.float32), pd.DataFrame({"a": [1, 2, 3]}, index=list("xyz")))
    adata.obsm["old"], adata.obsm["other"] = np.zeros((3, 2)), np.ones((3, 1))
    adata.layers["counts"] = np.ones((3, 2))
    adata.uns["hespotex"] = {"note": {"genes": ["A"]}}
    adata.uns["theirs"] = 1
    return adata


def spoil(adata: ad.AnnData, error: type[BaseException] | None = None) -> None:
    """Write, replace and delete in every slot; then perhaps fail."""
    del adata.obsm["old"]
    adata.obsm["other"] = np.zeros((3, 1))
    adata.obsm["new"] = np.zeros((3, 1))
    del adata.layers["counts"]
    adata.X = np.zeros((3, 2), np.float32)
    adata.obs["a"] = 0
    adata.var["new"] = 0
    adata.uns["hespotex"]["note"]["genes"].append("B")
    adata.uns["hespotex"]["more"] = {}
    del adata.uns["theirs"]
    if error is not None:
        raise error("the true reason")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_a_block_wrote_or_deleted_is_undone(error) -> None:
    adata = table()
    before, x = stored(adata), adata.X
    with pytest.raises(error, match="the true reason"), restored_on_error(adata):
        spoil(adata, error)
    assert stored(adata) == before
    assert adata.X is x


def test_a_block_that_ends_is_kept() -> None:
    adata = table()
    with restored_on_error(adata):
        spoil(adata)
    assert "old" not in adata.obsm
    assert not adata.X.any()


def spoil_elements(sdata: sd.SpatialData) -> None:
    sdata["more"] = sdata["spots"].copy()
    del sdata["spots"]
    del sdata["table"].obsm["spatial"]
    sdata["table"].obs["new"] = 0
    sdata.attrs["hespotex"]["name"] = "S2"
    raise RuntimeError("half way")


def test_elements_of_a_spatialdata_come_back(plain_section) -> None:
    sdata = fresh(plain_section())
    before, spots = stored(sdata), sdata["spots"]
    sdata.attrs["hespotex"] = {"name": "S1"}
    with pytest.raises(RuntimeError, match="half way"), restored_on_error(sdata):
        spoil_elements(sdata)
    assert sdata.attrs == {"hespotex": {"name": "S1"}}
    del sdata.attrs["hespotex"]
    assert stored(sdata) == before
    assert sdata["spots"] is spots
