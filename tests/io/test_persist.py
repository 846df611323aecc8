from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Labels2DModel
from spatialdata.testing import assert_spatial_data_objects_are_identical

import hespotex as hx
from hespotex.errors import DataTypeError, DataValueError, MissingKeyError
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


def test_attributes_are_written(backed):
    backed.attrs["hespotex"] = {"model": "her2.hx"}
    hx.io.persist(backed, [])
    assert again(backed).attrs["hespotex"] == {"model": "her2.hx"}


STEPS = [
    *(("_drop_consolidated", True, exchanges) for exchanges in (True, False)),
    *(("_exchange", True, after) for after in (False, True)),
    *(("write_consolidated_metadata", exchanges, False) for exchanges in (True, False)),
    *(("rmtree", exchanges, after) for exchanges in (True, False) for after in (False, True)),
]


@pytest.mark.parametrize(("step", "exchanges", "after"), STEPS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(backed, monkeypatch, step, after, exchanges):
    before = again(backed)
    backed["table"].obs["mark"] = 1
    if not exchanges:
        monkeypatch.setattr(_persist, "_exchange", lambda one, other: False)
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


def test_between_two_renamings_the_next_call_puts_the_old_back(backed, monkeypatch):
    monkeypatch.setattr(_persist, "_exchange", lambda one, other: False)
    rename = _persist.Path.rename
    calls = []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(_persist.Path, "rename", second_fails)
        with pytest.raises(Killed):
            hx.io.persist(backed, "table")
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
