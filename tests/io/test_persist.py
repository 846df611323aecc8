from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from anndata.experimental import read_elem_lazy
from scipy import sparse
from spatialdata.models import Labels2DModel
from spatialdata.testing import assert_spatial_data_objects_are_identical

import hespotex as hx
from hespotex.data.lazy_counts import is_lazy
from hespotex.errors import DataTypeError, DataValueError, MissingKeyError, OutputError
from hespotex.io import _persist


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def backed(plain_section, tmp_path):
    plain_section(scale_factors=[2], chunks=128).write(tmp_path / "section.zarr")
    return sd.read_zarr(tmp_path / "section.zarr")


def again(sdata):
    return sd.read_zarr(sdata.path)


def test_a_changed_table_takes_the_place_of_the_old(backed):
    before = again(backed)
    backed["table"].obsm["X_new"] = np.arange(24.0).reshape(12, 2)
    hx.io.persist(backed, "table")
    stored = again(backed)
    np.testing.assert_array_equal(stored["table"].obsm["X_new"], backed["table"].obsm["X_new"])
    del stored["table"].obsm["X_new"]
    assert_spatial_data_objects_are_identical(stored, before)
    assert stored.has_consolidated_metadata()


def test_new_elements_and_all_tables_by_default(backed):
    labels = Labels2DModel.parse(np.arange(12, dtype=np.int32).reshape(3, 4), dims=("y", "x"))
    backed["cells"] = labels  # the first of its kind
    backed["more"] = backed["spots"].iloc[:3]
    backed["table"].obs["mark"] = 1
    backed["spots"]["unsaid"] = 1.0
    hx.io.persist(backed)
    stored = again(backed)
    np.testing.assert_array_equal(stored["cells"].values, labels.values)
    assert len(stored["more"]) == 3
    assert "mark" in stored["table"].obs
    assert "unsaid" not in stored["spots"]
    hx.io.persist(backed, ["spots"])
    assert "unsaid" in again(backed)["spots"]


def test_an_image_computed_from_its_old_version(backed):
    old = backed["image"]["scale0"]["image"].values
    backed["image"] = sd.models.Image2DModel.parse(
        255 - sd.get_pyramid_levels(backed["image"], n=0).data, dims=("c", "y", "x"), scale_factors=[2]
    )
    hx.io.persist(backed, "image")
    np.testing.assert_array_equal(again(backed)["image"]["scale0"]["image"].values, 255 - old)
    # the object itself reads the new files: 255 - (255 - old) would show if it still computed from them
    np.testing.assert_array_equal(backed["image"]["scale0"]["image"].values, 255 - old)


def test_what_another_image_is_computed_from_is_not_replaced_under_it(backed):
    old = sd.get_pyramid_levels(backed["image"], n=0)
    backed["negative"] = sd.models.Image2DModel.parse(255 - old.data, dims=("c", "y", "x"))
    backed["image"] = sd.models.Image2DModel.parse(old.data // 2, dims=("c", "y", "x"))
    expected = backed["negative"].values
    with pytest.raises(DataValueError, match=r"'image' cannot be replaced while 'negative' is computed from it"):
        hx.io.persist(backed, "image")
    hx.io.persist(backed, ["image", "negative"])
    for sdata in (backed, again(backed)):
        np.testing.assert_array_equal(sdata["negative"].values, expected)
        np.testing.assert_array_equal(sdata["image"].values, (255 - expected) // 2)


@pytest.mark.parametrize("form", ["sparse", "sparse in dask", "dense"])
@pytest.mark.parametrize("name", ["raw", "zraw"])
def test_counts_left_on_disk_are_kept_under_another_name_before_the_table_changes(plain_section, tmp_path, form, name):
    section = plain_section()
    counts = np.asarray(section["table"].X, dtype=np.float32)
    section["table"].X = counts if form == "dense" else sparse.csr_matrix(counts)
    section.write(tmp_path / "s.zarr")
    lazy = hx.io.read_lazy(tmp_path / "s.zarr")
    table = lazy["table"]
    kept = read_elem_lazy(table.X.group) if form == "sparse in dask" else table.X
    lazy[name] = AnnData(X=kept, obs=table.obs.copy(), var=table.var.copy(), uns=dict(table.uns))
    table.X = np.log1p(counts) if form == "dense" else sparse.csr_matrix(np.log1p(counts))
    with pytest.raises(DataValueError, match=f"'table' cannot be replaced while '{name}' is computed from it"):
        hx.io.persist(lazy, "table")
    hx.io.persist(lazy)
    stored = again(lazy)
    for key, expected in (("table", np.log1p(counts)), (name, counts)):
        values = stored[key].X
        np.testing.assert_array_equal(values if form == "dense" else values.toarray(), expected)
    assert is_lazy(lazy[name].X)
    hx.io.persist(lazy, "table")  # it reads its own files now


def test_elements_that_read_each_other_are_refused(backed):
    image = sd.get_pyramid_levels(backed["image"], n=0)
    backed["other"] = sd.models.Image2DModel.parse(image.data, dims=("c", "y", "x"))
    hx.io.persist(backed, "other")
    one, other = (sd.get_pyramid_levels(backed["image"], n=0).data, backed["other"].data)
    backed["image"] = sd.models.Image2DModel.parse(other // 2, dims=("c", "y", "x"))
    backed["other"] = sd.models.Image2DModel.parse(255 - one, dims=("c", "y", "x"))
    with pytest.raises(DataValueError, match="each reads the other"):
        hx.io.persist(backed, ["image", "other"])


def test_calls_at_once_wait_for_each_other(backed):
    names = [f"more_{number}" for number in range(4)]
    for name in names:
        backed[name] = backed["table"].copy()
    hx.io.persist(backed)

    def write(name):
        sdata = again(backed)
        for number in range(2):
            sdata[name].obsm["X_new"] = np.full((12, 2000), number, dtype=np.float32)
            hx.io.persist(sdata, name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(write, names))
    stored = again(backed)
    assert all((stored[name].obsm["X_new"] == 1).all() for name in names)
    assert stored.has_consolidated_metadata()
    assert sorted(path.name for path in backed.path.parent.iterdir()) == ["section.zarr"]


def test_a_store_behind_a_link_is_written_where_it_lies(backed, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "here.zarr").symlink_to(backed.path, target_is_directory=True)
    linked = sd.read_zarr(tmp_path / "links" / "here.zarr")
    linked["table"].obs["mark"] = 1
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        exchange = _persist.exchange
        patch.setattr(_persist, "exchange", lambda one, other: seen.append((one, other)) or exchange(one, other))
        hx.io.persist(linked, "table")
    assert seen
    assert not any("links" in path.parts for pair in seen for path in pair)  # the link may lie on another disk
    assert "mark" in again(backed)["table"].obs


def test_attributes_are_written(backed):
    backed.attrs["hespotex"] = {"model": "her2.hx"}
    hx.io.persist(backed, [])
    assert again(backed).attrs["hespotex"] == {"model": "her2.hx"}


STEPS = [  # function, whether two names can be exchanged, whether the kill comes after it
    ("_drop_consolidated", True, True),
    ("exchange", True, False),
    ("exchange", True, True),
    ("write_consolidated_metadata", True, False),
    ("rmtree", True, False),
    ("rmtree", False, False),
    ("rmtree", False, True),
]


@pytest.mark.parametrize(("step", "exchanges", "after"), STEPS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(backed, monkeypatch, step, after, exchanges):
    before = again(backed)
    backed["table"].obs["mark"] = 1
    if not exchanges:
        monkeypatch.setattr(_persist, "exchange", lambda one, other: False)
    where = {"rmtree": shutil, "write_consolidated_metadata": sd.SpatialData}.get(step, _persist)
    function = getattr(where, step)

    def killed(*arguments, **options):
        if after:
            function(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, step, killed)
        with pytest.raises(Killed):
            hx.io.persist(backed, "table")
    stored = sd.read_zarr(backed.path)
    marked = "mark" in stored["table"].obs if "table" in stored else None
    assert marked in (True, False)
    if not marked:
        assert_spatial_data_objects_are_identical(stored, before)
    hx.io.persist(backed, "table")
    assert "mark" in again(backed)["table"].obs
    assert sorted(path.name for path in backed.path.parent.iterdir()) == ["section.zarr"]


@pytest.mark.parametrize("error", [OSError, Killed])
def test_the_old_is_put_back_where_it_was_moved_away_at_once_or_by_the_next_call(backed, monkeypatch, error):
    monkeypatch.setattr(_persist, "exchange", lambda one, other: False)
    rename = _persist.Path.rename
    calls = []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(_persist.Path, "rename", second_fails)
        with pytest.raises(error):
            hx.io.persist(backed, "table")
    if error is Killed:
        assert "table" not in sd.read_zarr(backed.path)
        hx.io.persist(backed, [])
    assert_spatial_data_objects_are_identical(again(backed), backed)


def test_a_full_disk_leaves_the_store_as_it_was(backed, monkeypatch):
    before = again(backed)
    backed["table"].obs["mark"] = 1

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_persist, "_sync", full)
        with pytest.raises(OSError, match="No space left"):
            hx.io.persist(backed, "table")
    assert_spatial_data_objects_are_identical(again(backed), before)
    assert sorted(path.name for path in backed.path.parent.iterdir()) == ["section.zarr"]


def test_what_cannot_be_persisted(plain_section, backed):
    with pytest.raises(DataValueError, match=r"lives in memory only; write it first: sdata.write"):
        hx.io.persist(plain_section())
    with pytest.raises(MissingKeyError, match=r"names=\['spot'\] are no elements.*'spots'"):
        hx.io.persist(backed, ["table", "spot"])
    with pytest.raises(DataTypeError, match="sdata must be a SpatialData, got AnnData"):
        hx.io.persist(backed["table"])


WRITER = """
import sys, numpy as np, spatialdata as sd, hespotex as hx
sdata = sd.read_zarr(sys.argv[1])
print("ready", flush=True)
for number in range(1, 10_000):
    sdata["table"].obsm["X_new"] = np.full((12, 50_000), number, dtype=np.float32)
    hx.io.persist(sdata, "table")
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_at_random_moments(backed):
    rng = np.random.default_rng(0)
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(backed.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline().strip() == "ready"
            time.sleep(rng.uniform(0.2, 1.5))
            process.kill()
            said = process.stdout.read().split()
        values = again(backed)["table"].obsm.get("X_new", np.zeros((12, 1)))
        assert len(np.unique(values)) == 1
        if said:
            assert values[0, 0] >= int(said[-1])
    hx.io.persist(backed, "table")
    assert sorted(path.name for path in backed.path.parent.iterdir()) == ["section.zarr"]


def test_a_read_only_store_is_named_before_anything_is_written(backed, monkeypatch):
    before = sorted(path.name for path in backed.path.parent.iterdir())
    mkdir = Path.mkdir

    def read_only(self, *arguments, **options):
        if self.name.endswith(".probe"):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(_persist, "_replace", lambda *_: pytest.fail("it writes"))
    with pytest.raises(OutputError, match=r"sdata\.path=.*Read-only file system"):
        hx.io.persist(backed, "table")
    assert sorted(path.name for path in backed.path.parent.iterdir()) == before
