"""What a cohort must not touch, and what it knows again: inputs, files of others, its own results."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import distributed
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.errors import DataTypeError, DataValueError, OutputError
from hespotex.tl import _cohort, _predict_cohort

HOW = {"mpp": 0.5, "progress_bar": False}


@pytest.fixture(scope="module")
def sections() -> list[sd.SpatialData]:
    found = hx.datasets.synthetic(2, size_px=500, pitch_um=40.0, diameter_um=40.0, n_genes=20, seed=2)
    for section in found:
        hx.pp.embed(section, "rgb")
    return found


@pytest.fixture(scope="module")
def model(sections):
    return hx.tl.train(sections[0], "ridge", n_top_genes=5, embedding_key="X_rgb")


@pytest.fixture(scope="module")
def another(sections):
    return hx.tl.train(sections[1], "ridge", n_top_genes=5, embedding_key="X_rgb")


@pytest.fixture(scope="module")
def store(sections, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "section.zarr"
    sections[1].write(path)
    return path


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    slides = hx.datasets.synthetic(2, size_px=700, with_expression=False, first_patient=4, seed=5)
    return [np.ascontiguousarray(resolve_slide(s).levels[0].array.compute().transpose(1, 2, 0)) for s in slides]


@pytest.fixture
def two(pixels, tmp_path) -> list[Path]:
    """Folders of a slide each, which bear the same name."""
    for number, image in enumerate(pixels):
        (tmp_path / f"s{number}").mkdir()
        tifffile.imwrite(tmp_path / f"s{number}" / "a.tif", image, photometric="rgb", tile=(256, 256))
    return [tmp_path / "s0", tmp_path / "s1"]


def listing(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def outputs(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(frame["output"], frame["status"], strict=True))


def about(result: Path) -> dict:
    return json.loads((result / "zarr.json").read_text())["attributes"]["hespotex"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_store_is_not_replaced_by_its_own_result(store, model, tmp_path, overwrite):
    mine = tmp_path / "L" / "section.zarr"
    shutil.copytree(store, mine)
    before = listing(mine)
    for _ in range(2):
        frame = hx.tl.predict_cohort(mine, model, tmp_path / "L", overwrite=overwrite, **HOW)
        assert outputs(frame) == [("section-2.zarr", "done")], frame["message"][0]
        assert listing(mine) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_store_is_not_replaced_by_the_result_of_another_slide(two, store, model, tmp_path, overwrite):
    mine = tmp_path / "in" / "a.zarr"
    shutil.copytree(store, mine)
    before = listing(mine)
    frame = hx.tl.predict_cohort([two[0] / "a.tif", mine], model, tmp_path / "in", overwrite=overwrite, **HOW)
    assert outputs(frame) == [("a-2.zarr", "done"), ("a-3.zarr", "done")], frame["message"].tolist()
    assert listing(mine) == before


def test_a_result_that_becomes_a_slide_is_not_replaced(two, model, tmp_path):
    out = tmp_path / "out"
    assert outputs(hx.tl.predict_cohort(two[0], model, out, **HOW)) == [("a.zarr", "done")]
    before = listing(out / "a.zarr")
    slides = [two[0] / "a.tif", out / "a.zarr"]
    frame = hx.tl.predict_cohort(slides, model, out, overwrite=True, **HOW)
    assert "a.zarr" not in set(frame["output"])
    assert frame["status"][0] == "done"
    assert listing(out / "a.zarr") == before


def test_what_lazyslide_keeps_beside_a_slide_is_not_replaced(two, model, tmp_path):
    wsidata = pytest.importorskip("wsidata")
    slide = two[0] / "a.tif"
    wsi = wsidata.open_wsi(slide)
    wsi.write()
    wsi.close()
    before = listing(two[0] / "a.zarr")
    frame = hx.tl.predict_cohort(slide, model, two[0], overwrite=True, **HOW)
    assert frame["output"].tolist() == ["a-2.zarr"]
    assert listing(two[0] / "a.zarr") == before


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_no_result_is_not_overwritten(two, model, tmp_path, format, is_folder):
    foreign = tmp_path / "out" / f"a.{format}"
    (foreign if is_folder else foreign.parent).mkdir(parents=True)
    (foreign / "notes.txt" if is_folder else foreign).write_text("precious")
    for _ in range(2):
        frame = hx.tl.predict_cohort(two[0], model, tmp_path / "out", format=format, overwrite=True, **HOW)
        assert frame["status"].tolist() == ["failed"]
        assert "move it away" in frame["message"][0]
        assert "overwrite" not in frame["message"][0]
        assert list(listing(foreign).values()) == [b"precious"]


def test_a_slide_made_of_a_result_is_none(two, model, tmp_path):
    """Who puts the pixels back keeps the attributes."""
    out = tmp_path / "out"
    hx.tl.predict_cohort(two[0], model, out, **HOW)
    both = hx.io.read_wsi(two[0] / "a.tif", mpp=0.5)
    result = sd.read_zarr(out / "a.zarr")
    both["tiles"] = result["tiles"]
    both.attrs = result.attrs
    shutil.rmtree(out / "a.zarr")
    both.write(out / "a.zarr")
    before = listing(out / "a.zarr")
    assert hx.tl.predict_cohort(two[0], model, out, overwrite=True, **HOW)["status"].tolist() == ["failed"]
    assert listing(out / "a.zarr") == before
    assert _cohort.slides.find_slides(out, but=tmp_path / "other") == [out / "a.zarr"]


def test_results_do_not_go_into_a_store_that_is_read(store, model, tmp_path):
    mine = tmp_path / "section.zarr"
    shutil.copytree(store, mine)
    before = listing(mine)
    with pytest.raises(DataValueError, match="is read and must not change; name another folder"):
        hx.tl.predict_cohort(mine, model, mine / "predicted", **HOW)
    assert listing(mine) == before


def test_another_table_of_the_name_of_the_manifest_stays(two, model, tmp_path):
    (tmp_path / "out").mkdir()
    pd.DataFrame({"patient": ["P1"]}).to_parquet(tmp_path / "out" / "manifest.parquet")
    with pytest.raises(DataValueError, match="a manifest.parquet of something else"):
        hx.tl.predict_cohort(two[0], model, tmp_path / "out", **HOW)
    assert pd.read_parquet(tmp_path / "out" / "manifest.parquet")["patient"].tolist() == ["P1"]


@pytest.mark.parametrize("of_another_model", [False, True])
def test_a_result_of_another_slide_is_never_replaced_unasked(two, model, another, tmp_path, of_another_model):
    hx.tl.predict_cohort(two[0], model, tmp_path / "first", **HOW)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "first" / "a.zarr", out / "a.zarr")
    before = listing(out / "a.zarr")
    how = HOW | {"model": another if of_another_model else model}
    for _ in range(3):
        frame = hx.tl.predict_cohort(two[not of_another_model], out=out, **how)
        assert frame["status"].tolist() == ["failed"]
        assert "replace it with overwrite=True" in frame["message"][0]
        assert listing(out / "a.zarr") == before
    assert hx.tl.predict_cohort(two[1], out=out, overwrite=True, **how)["status"].tolist() == ["done"]


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_without_the_manifest_each_slide_finds_its_result(two, model, tmp_path, format):
    out = tmp_path / "out"
    first = hx.tl.predict_cohort(two, model, out, format=format, **HOW).set_index("slide")
    (out / "manifest.parquet").unlink()
    seen: list[str] = []
    how = HOW | {"format": format, "log": lambda event: seen.append(event["event"])}
    again = hx.tl.predict_cohort(two[::-1], model, out, **how).set_index("slide")
    assert again.loc[first.index, "output"].equals(first["output"])
    assert set(again["status"]) == {"done"}
    assert seen.count("slide_kept") == 2
    # A slide that came first now, and has no result, takes no name away.
    (out / "manifest.parquet").unlink()
    (two[0].parent / "r").mkdir()
    shutil.copy(two[1] / "a.tif", two[0].parent / "r" / "a.tif")
    third = hx.tl.predict_cohort([two[0].parent / "r", *two], model, out, **how).set_index("slide")
    assert third.loc[first.index, "output"].equals(first["output"])
    assert set(third["status"]) == {"done"}


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_without_the_manifest_a_touched_slide_is_known_again(two, model, tmp_path, format):
    out = tmp_path / "out"
    hx.tl.predict_cohort(two, model, out, format=format, **HOW)
    (out / "manifest.parquet").write_bytes(b"PAR1 and no more")
    os.utime(two[1] / "a.tif", ns=(0, 10**18))
    frame = hx.tl.predict_cohort(two[::-1], model, out, format=format, **HOW)
    assert outputs(frame) == [(f"a-2.{format}", "done"), (f"a.{format}", "done")], frame["message"].tolist()


def test_workers_that_outlive_the_call_publish_nothing(two, model, tmp_path, monkeypatch):
    predict_slide = _cohort.run.predict_slide
    ended, came = threading.Event(), []

    def fake(job, *args, **kwargs):
        if Path(job.path).parent.name == "s0":
            return _cohort.one.Outcome(error="OSError", message="no space", stops_all=True)
        ended.wait(60)
        came.append(predict_slide(job, *args, **kwargs))
        return came[0]

    monkeypatch.setattr(_cohort.run, "predict_slide", fake)
    monkeypatch.setattr(_cohort.run, "_AT_A_TIME", nullcontext())
    out = tmp_path / "out"
    workers = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    workers |= {"host": "127.0.0.1", "protocol": "tcp://"}
    with distributed.LocalCluster(**workers) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        with pytest.raises(OutputError, match="no space") as kept:  # holds the traceback, as a notebook does
            hx.tl.predict_cohort(two, model, out, client=client, **HOW)
        assert not client.futures
        ended.set()
        deadline = time.monotonic() + 60
        while not came and time.monotonic() < deadline:
            time.sleep(0.05)
    assert kept.value
    assert came[0].error == "WorkerError"
    assert "has ended" in came[0].message
    assert not list(out.glob("*.zarr"))


def test_a_result_that_is_ready_after_the_call_is_not_published(two, model, tmp_path, monkeypatch):
    """The call ends while the slide is predicted."""
    predict = _cohort.one.predict

    def slow(*args, **kwargs):
        predict(*args, **kwargs)
        _predict_cohort._clean(tmp_path / "out" / ".hespotex")

    monkeypatch.setattr(_cohort.one, "predict", slow)
    frame = hx.tl.predict_cohort(two[0], model, tmp_path / "out", retries=0, **HOW)
    assert frame["error"].tolist() == ["WorkerError"]
    assert not list((tmp_path / "out").glob("*.zarr"))


def test_results_of_another_cohort_are_no_slides(two, model, another, tmp_path):
    folder = two[0]
    hx.tl.predict_cohort(folder, model, folder / "predA", **HOW)
    frame = hx.tl.predict_cohort(folder, another, folder / "predB", **HOW)
    assert [Path(slide).name for slide in frame["slide"]] == ["a.tif"]
    assert frame["status"].tolist() == ["done"]
    with pytest.raises(DataValueError, match="holds no slide"):
        hx.tl.predict_cohort(folder / "predA", model, tmp_path / "out", **HOW)
    named = _cohort.slides.find_slides(folder / "predA" / "a.zarr", but=tmp_path)
    assert named == [folder / "predA" / "a.zarr"]


def test_a_slide_that_is_found_again_is_one(two, tmp_path):
    first, second = two
    (second / "link.tif").symlink_to(first / "a.tif")
    find = _cohort.slides.find_slides
    assert find(tmp_path, but=tmp_path / "out") == [first / "a.tif", second / "a.tif"]
    assert find([second / "link.tif", tmp_path], but=tmp_path / "out") == [second / "link.tif", second / "a.tif"]
    assert find([first, first / "a.tif", first], but=tmp_path / "out") == [first / "a.tif"]
    with pytest.raises(DataValueError, match=r"named more than once, as .*s0/a.tif and .*s1/link.tif"):
        find([first / "a.tif", second / "link.tif"], but=tmp_path / "out")
    (first / "circle.tif").symlink_to("circle.tif")
    assert find(first, but=tmp_path / "out") == [first / "a.tif", first / "circle.tif"]


def test_a_log_is_not_added_to_other_files(two, model, tmp_path):
    slide = two[0] / "a.tif"
    before = slide.read_bytes()
    (tmp_path / "config.json").write_text('{"lr": 1}\n')
    for log in (slide, tmp_path / "config.json"):
        with pytest.raises(DataValueError, match="log=.* holds no such log"):
            hx.tl.predict_cohort(slide, model, tmp_path / "out", log=log, **HOW)
    assert slide.read_bytes() == before
    with pytest.raises(DataValueError, match="log=.* is a folder"):
        hx.tl.predict_cohort(slide, model, tmp_path / "out", log=tmp_path, **HOW)
    with pytest.raises(OutputError, match="log=.* cannot be written to"):
        hx.tl.predict_cohort(slide, model, tmp_path / "out", log=slide / "run.jsonl", **HOW)
    with pytest.raises(DataTypeError, match="log must be a path"):
        hx.tl.predict_cohort(slide, model, tmp_path / "out", log=5, **HOW)
    assert not (tmp_path / "out").exists()
    (tmp_path / "run.jsonl").write_text("")
    lines = []
    for _ in range(2):
        hx.tl.predict_cohort(slide, model, tmp_path / "out", log=tmp_path / "run.jsonl", **HOW)
        lines.append(len((tmp_path / "run.jsonl").read_text().splitlines()))
    assert lines[1] > lines[0] > 0


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mpp": 0}, DataValueError, "mpp=0 must be"),
        ({"mpp": float("nan")}, DataValueError, "mpp=nan must be"),
        ({"mpp": -1.0}, DataValueError, "mpp=-1.0 must be"),
        ({"mpp": "0.5"}, DataTypeError, "mpp='0.5' must be"),
        ({"batch_size": 8.5}, DataTypeError, "batch_size=8.5 must be a whole number"),
        ({"batch_size": "8"}, DataTypeError, "batch_size='8' must be a whole number"),
        ({"batch_size": 0}, DataValueError, "batch_size=0 must be at least 1"),
        ({"retries": "1"}, DataTypeError, "retries='1' must be a whole number"),
        ({"key_added": "a/b c"}, DataValueError, "key_added='a/b c' cannot be stored"),
        ({"paths": None}, DataTypeError, "paths must be a path"),
        ({"paths": [None]}, DataTypeError, "paths must be a path"),
        ({"out": None}, DataTypeError, "out must be the path of a folder"),
        ({"out": "res.h5ad"}, DataValueError, "take out='res'"),
        ({"out": "res.zarr"}, DataValueError, "take out='res'"),
    ],
)
def test_what_is_wrong_for_all_slides_is_said_once(two, model, tmp_path, monkeypatch, wrong, error, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        hx.tl.predict_cohort(**{"paths": two[0], "model": model, "out": "out"} | HOW | wrong)
    assert sorted(tmp_path.iterdir()) == before


def test_a_slide_that_is_not_there_is_said_with_its_path(two, model, tmp_path):
    link = two[0] / "link.tif"
    link.symlink_to(tmp_path / "nowhere.tif")
    frame = hx.tl.predict_cohort([two[0], tmp_path / "gone.tif"], model, tmp_path / "out", **HOW)
    said = dict(zip(frame["slide"].map(lambda path: Path(path).name), frame["message"], strict=True))
    assert said["gone.tif"] == f"{tmp_path / 'gone.tif'} does not exist; check the name"
    assert f"{link} is a link to {tmp_path / 'nowhere.tif'}" in said["link.tif"]
    assert frame["status"].tolist() == ["done", "failed", "failed"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_a_pipe_is_not_waited_for(two, model, tmp_path):
    os.mkfifo(two[0] / "pipe.tif")
    frame = hx.tl.predict_cohort(two[0], model, tmp_path / "out", **HOW)
    assert outputs(frame) == [("a.zarr", "done")]
    frame = hx.tl.predict_cohort(two[0] / "pipe.tif", model, tmp_path / "out", **HOW)
    assert "is a pipe, socket or device" in frame["message"][0]


def test_the_home_folder_may_be_a_tilde(two, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    frame = hx.tl.predict_cohort("~/s0", model, "~/out", log="~/run.jsonl", **HOW)
    assert frame["status"].tolist() == ["done"]
    assert (tmp_path / "out" / "a.zarr").is_dir()
    assert (tmp_path / "run.jsonl").is_file()
    assert not (tmp_path / "~").exists()
