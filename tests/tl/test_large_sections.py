"""Sections with their counts on disk, and predictions of spots that are written there."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata
from anndata.experimental import read_elem_lazy

import hespotex as hx
from hespotex.data import blockwise
from hespotex.errors import DataTypeError, DataValueError

from ..conftest import fresh, stored

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUICK = {"epochs": 2, "gate_epochs": 2, "width": 16, "head_width": 16, "gate_hidden": 16, "n_members": 1}
METHODS = {"ridge": None, "hespotex": {**QUICK, "window": 64}}


@pytest.fixture(scope="module")
def grid():
    """A section with a square lattice of touching spots, embedded and with its graph."""
    sdata = hx.datasets.synthetic(size_px=800, pitch_um=20, diameter_um=20, n_genes=30, lattice="st", seed=4)
    hx.pp.embed(sdata, "morphology", tile_um=40, progress_bar=False)
    hx.pp.spatial_graph(sdata)
    return sdata


@pytest.fixture
def section_in_memory(grid):
    return fresh(grid)


@pytest.fixture(params=["csr", "dask"])
def section_on_disk(request, section_in_memory, tmp_path):
    """The same with its counts left on disk."""
    section_in_memory.write(tmp_path / "section.zarr")
    lazy = hx.io.read_lazy(tmp_path / "section.zarr")
    if request.param == "dask":
        lazy["table"].X = read_elem_lazy(lazy["table"].X.group)
    return lazy


@pytest.mark.parametrize("method", METHODS)
def test_counts_on_disk_give_the_same_model_and_prediction(section_in_memory, section_on_disk, method):
    X = section_on_disk["table"].X
    models = [
        hx.tl.train(sdata, method, config=METHODS[method], n_top_genes=12, gene_selection="high_mean", device="cpu")
        for sdata in (section_in_memory, section_on_disk)
    ]
    assert models[0].genes == models[1].genes
    arrays = [model.state()[0] for model in models]
    for name in arrays[0]:
        np.testing.assert_array_equal(arrays[0][name], arrays[1][name])
    for sdata in (section_in_memory, section_on_disk):
        hx.tl.predict(sdata, models[0])
    found, expected = (sdata["table"].obsm[method] for sdata in (section_on_disk, section_in_memory))
    np.testing.assert_array_equal(found, expected)
    assert section_on_disk["table"].X is X


def test_counts_on_disk_are_never_read_whole(section_in_memory, section_on_disk, monkeypatch):
    from hespotex.data import lazy_counts

    monkeypatch.setattr(lazy_counts, "_BLOCK_ROWS", 50)
    read = []
    original = lazy_counts.LazyCounts.__getitem__

    def counted(self, rows):
        block = original(self, rows)
        read.append(block.shape[0])
        return block

    monkeypatch.setattr(lazy_counts.LazyCounts, "__getitem__", counted)
    monkeypatch.setattr("hespotex.models.hespotex.targets._READ_ROWS", 50)
    n = section_on_disk["table"].n_obs
    least = int(np.quantile(np.asarray(section_in_memory["table"].X.sum(axis=1)), 0.2))
    with pytest.warns(hx.errors.HespotexWarning, match="are left out"):
        hx.tl.train(
            section_on_disk,
            "hespotex",
            config={**METHODS["hespotex"], "regression": "none", "target_ranks": (4,)},
            min_counts=least,
            device="cpu",
        )
    assert sum(read) > n
    assert max(read) <= 50


@pytest.mark.parametrize("method", METHODS)
def test_a_target_on_disk_holds_the_prediction_of_spots_and_leaves_the_object_alone(
    section_in_memory, tmp_path, method
):
    genes = list(section_in_memory["table"].var_names[:10])
    model = hx.tl.train(section_in_memory, method, config=METHODS[method], genes=genes, device="cpu")
    before = stored(section_in_memory)
    assert hx.tl.predict(section_in_memory, model, target=tmp_path / "big.zarr", block_rows=70) is None
    assert stored(section_in_memory) == before
    found = spatialdata.read_zarr(tmp_path / "big.zarr")
    expected = hx.tl.predict(section_in_memory, model, copy=True)
    table = found[f"{method}_spots"]
    np.testing.assert_allclose(table.X, expected.X, rtol=1e-5, atol=1e-5)
    assert list(table.obs_names) == list(section_in_memory["table"].obs_names)
    prediction = hx.get.prediction(found)
    np.testing.assert_array_equal(prediction.X, table.X)
    assert (list(prediction.var_names), prediction.uns["hespotex"][method]["unit"]) == (genes, "log1p_cp10k")
    assert set(found.shapes) == {"spots"}
    with pytest.raises(DataValueError, match="exists already"):
        hx.tl.predict(section_in_memory, model, target=tmp_path / "big.zarr")


def test_some_genes_go_to_disk_in_the_order_asked_for(section_in_memory, tmp_path):
    genes = list(section_in_memory["table"].var_names[:6])
    model = hx.tl.train(section_in_memory, "ridge", genes=genes)
    hx.tl.predict(section_in_memory, model, genes=genes[3:1:-1], target=tmp_path / "some.zarr")
    found = spatialdata.read_zarr(tmp_path / "some.zarr")["ridge_spots"]
    whole = hx.tl.predict(section_in_memory, model, copy=True)
    assert list(found.var_names) == genes[3:1:-1]
    np.testing.assert_allclose(found.X, whole[:, genes[3:1:-1]].X, rtol=1e-6)


def test_rows_of_several_regions_find_their_place(section_in_memory, tmp_path):
    """One table on two shapes, its rows mixed."""
    from spatialdata.models import TableModel

    sdata = section_in_memory
    shapes, table = sdata["spots"], sdata["table"]
    half = np.arange(table.n_obs) % 3 == 0
    key = table.uns["spatialdata_attrs"]
    names = np.where(half, "odd", "even")
    sdata["even"], sdata["odd"] = shapes[~half], shapes[half]
    own = table.copy()
    del own.uns["spatialdata_attrs"]
    own.obs[key["region_key"]] = np.array(names)
    own.obs[key["region_key"]] = own.obs[key["region_key"]].astype("category")
    del sdata.tables["table"]
    sdata["table"] = TableModel.parse(
        own, region=["even", "odd"], region_key=key["region_key"], instance_key=key["instance_key"]
    )
    model = hx.tl.train(sdata, "ridge", genes=list(own.var_names[:5]))
    hx.tl.predict(sdata, model, target=tmp_path / "two.zarr", block_rows=9)
    (found,) = spatialdata.read_zarr(tmp_path / "two.zarr").tables.values()
    hx.tl.predict(sdata, model)
    np.testing.assert_allclose(found.X, sdata["table"].obsm["ridge"], rtol=1e-5, atol=1e-6)


def test_a_target_of_spots_appears_only_when_whole(section_in_memory, tmp_path, monkeypatch):
    model = hx.tl.train(section_in_memory, "ridge", genes=list(section_in_memory["table"].var_names[:4]))
    written = []
    write = blockwise.TableStore.write

    def breaking(self, rows, values, layer=None):
        written.append(rows)
        if len(written) == 3:
            raise OSError("disk full")
        write(self, rows, values, layer)

    monkeypatch.setattr(blockwise.TableStore, "write", breaking)
    before = stored(section_in_memory)
    with pytest.raises(OSError, match="disk full"):
        hx.tl.predict(section_in_memory, model, target=tmp_path / "big.zarr", block_rows=50)
    assert list(tmp_path.iterdir()) == []
    assert stored(section_in_memory) == before


def test_a_prediction_of_spots_larger_than_memory_is_refused_before_anything_is_embedded(
    section_in_memory, monkeypatch
):
    model = hx.tl.train(section_in_memory, "ridge", genes=list(section_in_memory["table"].var_names[:4]))
    del section_in_memory["table"].obsm["X_morphology"]
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 1000)
    with pytest.raises(DataValueError, match=r"genes=.*target="):
        hx.tl.predict(section_in_memory, model)
    assert "X_morphology" not in section_in_memory["table"].obsm


def test_a_target_needs_shapes(section_in_memory, tmp_path):
    model = hx.tl.train(section_in_memory, "ridge", genes=list(section_in_memory["table"].var_names[:4]))
    with pytest.raises(DataTypeError, match="SpatialData"):
        hx.tl.predict(section_in_memory["table"], model, target=tmp_path / "x.zarr")
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_at_the_target_in_the_meantime_is_left_alone(section_in_memory, tmp_path, monkeypatch):
    model = hx.tl.train(section_in_memory, "ridge", genes=list(section_in_memory["table"].var_names[:4]))
    write = blockwise.TableStore.write

    def slow(self, rows, values, layer=None):
        (tmp_path / "big.zarr").mkdir(exist_ok=True)
        (tmp_path / "big.zarr" / "theirs").touch()
        write(self, rows, values, layer)

    monkeypatch.setattr(blockwise.TableStore, "write", slow)
    with pytest.raises(DataValueError, match="exists already"):
        hx.tl.predict(section_in_memory, model, target=tmp_path / "big.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["big.zarr"]
    assert [path.name for path in (tmp_path / "big.zarr").iterdir()] == ["theirs"]


def test_a_full_disk_leaves_the_shapes_as_they_are(section_in_memory, tmp_path, monkeypatch):
    from geopandas import GeoDataFrame
    from spatialdata.transformations import get_transformation

    def full(*args, **kwargs):
        raise OSError("disk full")

    model = hx.tl.train(section_in_memory, "ridge", genes=list(section_in_memory["table"].var_names[:4]))
    section_in_memory.write(tmp_path / "own.zarr")
    before = get_transformation(section_in_memory["spots"], get_all=True)
    for write in (
        lambda: hx.tl.predict(section_in_memory, model, target=tmp_path / "big.zarr"),
        lambda: hx.io.persist(section_in_memory, "spots"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(GeoDataFrame, "to_parquet", full)
            with pytest.raises(OSError, match="disk full"):
                write()
        assert get_transformation(section_in_memory["spots"], get_all=True) == before
        write()
    assert len(spatialdata.read_zarr(tmp_path / "own.zarr")["spots"]) == len(section_in_memory["spots"])
