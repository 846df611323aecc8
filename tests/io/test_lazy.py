"""Stores read with their matrices left on disk."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata
import zarr
from anndata.abc import CSRDataset
from anndata.io import sparse_dataset, write_elem
from dask.array import Array
from scipy import sparse

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


@pytest.mark.parametrize("make", ["folder", "file", "table"])
def test_what_is_no_store_of_a_spatialdata_is_an_error(section, tmp_path, make):
    place = tmp_path / "other"
    if make == "folder":
        place.mkdir()
    elif make == "file":
        place.write_text("no store")
    else:
        section["table"].write_zarr(place)
    with pytest.raises(MissingKeyError, match="is not the zarr store of a SpatialData"):
        hx.io.read_lazy(place)


def test_matrices_that_are_persisted_are_read_from_the_new_files(section, tmp_path):
    """The old layout says nothing of what another writer made of them."""
    counts = section["table"].X.toarray()
    section["table"].layers["dense"] = counts
    section.write(tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr" / "tables" / "table", mode="r+")
    write_elem(group, "X", sparse.csr_matrix(counts[:5]))
    sparse_dataset(group["X"]).append(sparse.csr_matrix(counts[5:]))  # in chunks of the first rows' length
    write_elem(group, "layers/dense", counts, dataset_kwargs={"chunks": (7, 5)})
    zarr.consolidate_metadata(tmp_path / "s.zarr")
    lazy = hx.io.read_lazy(tmp_path / "s.zarr")
    for number in range(2):
        lazy["table"].obs["number"] = number
        hx.io.persist(lazy)
        stored = spatialdata.read_zarr(tmp_path / "s.zarr")["table"]
        assert (stored.obs["number"] == number).all()
        table = lazy["table"]
        for found in (
            table.X[:].toarray(),
            table.layers["dense"].compute(),
            stored.X.toarray(),
            stored.layers["dense"],
        ):
            np.testing.assert_array_equal(found, counts)
        assert isinstance(table.X, CSRDataset)
