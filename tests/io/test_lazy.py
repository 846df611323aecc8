"""Stores read with their matrices left on disk."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata
from anndata.abc import CSRDataset
from dask.array import Array

import hespotex as hx
from hespotex.errors import MissingKeyError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_matrices_stay_on_disk_and_all_else_is_what_spatialdata_reads(section, tmp_path):
    table = section["table"]
    table.layers["dense"] = table.X.toarray() + 1.0
    table.obsm["X_some"] = np.arange(table.n_obs * 2.0).reshape(-1, 2)
    section.attrs["hespotex"] = {**section.attrs.get("hespotex", {}), "patient": "p7"}
    section.write(tmp_path / "s.zarr")
    lazy, eager = hx.io.read_lazy(tmp_path / "s.zarr"), spatialdata.read_zarr(tmp_path / "s.zarr")
    assert isinstance(lazy["table"].X, CSRDataset)
    assert isinstance(lazy["table"].layers["dense"], Array)
    np.testing.assert_array_equal(lazy["table"].X[:].toarray(), eager["table"].X.toarray())
    np.testing.assert_array_equal(lazy["table"].layers["dense"].compute(), eager["table"].layers["dense"])
    np.testing.assert_array_equal(lazy["table"].obsm["X_some"], eager["table"].obsm["X_some"])
    assert lazy["table"].obs.equals(eager["table"].obs)
    assert {name for _, name, _ in lazy.gen_elements()} == {name for _, name, _ in eager.gen_elements()}
    assert lazy.attrs == eager.attrs


def test_a_store_without_tables_is_read(section, tmp_path):
    del section.tables["table"]
    section.write(tmp_path / "s.zarr")
    assert set(hx.io.read_lazy(tmp_path / "s.zarr").shapes) == set(section.shapes)


def test_a_store_that_is_not_there_is_an_error_naming_it(tmp_path):
    with pytest.raises(MissingKeyError, match=r"nowhere\.zarr"):
        hx.io.read_lazy(tmp_path / "nowhere.zarr")
