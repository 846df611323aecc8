"""Counts on disk: read in blocks, equal to the same in memory."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import zarr
from anndata.experimental import read_elem_lazy
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from hespotex.data import lazy_counts
from hespotex.data.counts import check_counts, library_size
from hespotex.data.lazy_counts import as_lazy, is_lazy
from hespotex.data.panel import PanelSource, choose_panel
from hespotex.errors import CountsError

COUNTS = sparse.csr_matrix(np.random.default_rng(0).poisson(0.6, (83, 17)).astype(np.float32))
GENES = tuple(f"g{i}" for i in range(17))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(lazy_counts, "_BLOCK_ROWS", 10)


@pytest.fixture(params=["csr", "dask csr", "dask dense"])
def source(request, tmp_path):
    """The counts on disk, in every form that is read in blocks."""
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    if request.param == "dask dense":
        return da.from_array(COUNTS.toarray(), chunks=(20, 17))
    write_elem(group, "X", COUNTS)
    return sparse_dataset(group["X"]) if request.param == "csr" else read_elem_lazy(group["X"], chunks=(25, 17))


def test_rows_and_columns_are_those_of_the_matrix(source):
    assert is_lazy(source)
    lazy = as_lazy(source)
    dense = COUNTS.toarray()
    kept, columns = np.array([3, 7, 8, 50, 80]), np.array([5, 0, 16])
    some = lazy.take(rows=kept, columns=columns)
    assert (lazy.shape, some.shape) == ((83, 17), (5, 3))
    np.testing.assert_array_equal(lazy[5:40].toarray(), dense[5:40])
    np.testing.assert_array_equal(lazy[np.array([9, 2, 2])].toarray(), dense[[9, 2, 2]])
    np.testing.assert_array_equal(some[1:4].toarray(), dense[kept][1:4][:, columns])
    np.testing.assert_array_equal(some[np.array([4, 0])].toarray(), dense[kept][[4, 0]][:, columns])
    mask = np.arange(5) % 2 == 0
    np.testing.assert_array_equal(some.take(rows=mask).to_memory().toarray(), dense[kept][mask][:, columns])


def test_checks_sums_and_panels_are_those_in_memory(source, small_blocks):
    check_counts(source)
    np.testing.assert_array_equal(library_size(source), library_size(COUNTS))
    for method in ("hvg", "high_mean", "variance"):
        for n_top in (5, 17):
            options = {"method": method, "n_top": n_top, "span": 1.0, "min_spots": 30}
            on_disk, in_memory = (choose_panel([PanelSource(each, GENES)], **options) for each in (source, COUNTS))
            assert on_disk == in_memory


def test_what_is_no_count_is_found_in_any_block(tmp_path, small_blocks):
    wrong = COUNTS.copy()
    wrong.data[-1] = 0.5
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    write_elem(group, "X", wrong)
    with pytest.raises(CountsError, match="already normalised"):
        check_counts(sparse_dataset(group["X"]))


def test_counts_stored_gene_by_gene_are_refused_with_the_way_out(tmp_path):
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    write_elem(group, "X", sparse.csc_matrix(COUNTS))
    with pytest.raises(CountsError, match="to_memory"):
        as_lazy(sparse_dataset(group["X"]))
    with pytest.raises(CountsError, match="CSR"):
        check_counts(sparse_dataset(group["X"]))


class Counted:
    """A matrix on disk that notes what is read of it."""

    def __init__(self, source):
        self.source, self.shape, self.dtype, self.keys = source, source.shape, source.dtype, []

    def __getitem__(self, key):
        self.keys.append(key)
        return self.source[key]


def test_rows_that_lie_close_together_are_read_in_one_piece(source):
    counted = Counted(source)
    lazy = lazy_counts.LazyCounts(counted, (83, 17))
    for rows in (np.array([7, 3, 4, 4, 9]), np.arange(20, 40), np.delete(np.arange(83), [5, 50])):
        np.testing.assert_array_equal(lazy[rows].toarray(), COUNTS.toarray()[rows])
    assert counted.keys == [slice(3, 10), slice(20, 40), slice(0, 83)]
    np.testing.assert_array_equal(lazy[np.array([80, 2])].toarray(), COUNTS.toarray()[[80, 2]])
    assert list(counted.keys[-1]) == [80, 2]  # what lies between may be most of the matrix


def test_no_rows_are_a_matrix_without_rows(source):
    none = as_lazy(source).take(rows=np.zeros(83, dtype=bool))
    assert (none.to_memory().shape, library_size(none).shape) == ((0, 17), (0,))
    check_counts(none)
