"""The program on many slides, and its commands for single steps: what it says, writes, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
from typer.testing import CliRunner

import hespotex as hx
from hespotex import cli
from hespotex.cli import _cluster, _doctor
from hespotex.data.geometry import resolve_slide

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    section = hx.datasets.synthetic(size_px=600, pitch_um=40.0, diameter_um=40.0, n_genes=40, seed=2)
    hx.pp.embed(section)
    path = tmp_path_factory.mktemp("models") / "ridge.hx"
    hx.tl.train(section, "ridge", n_top_genes=10).save(path)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """A tiled TIFF of 700 x 700 px at 0.5 µm/px."""
    sdata = hx.datasets.synthetic(size_px=700, with_expression=False, first_patient=3, seed=1)
    pixels = resolve_slide(sdata).levels[0].array.compute().transpose(1, 2, 0)
    path = tmp_path_factory.mktemp("slide") / "biopsy.tif"
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), compression="deflate", **scale)
    return path


@pytest.fixture
def folder(slide, tmp_path) -> Path:
    """A folder of a fine slide and one that is none."""
    path = tmp_path / "slides"
    path.mkdir()
    shutil.copy2(slide, path / "fine.tif")
    (path / "text.tif").write_text("this is no slide")
    return path


def program(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hespotex", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


def test_a_folder_of_slides_becomes_a_folder_of_results(folder, model, tmp_path):
    out = tmp_path / "out"
    result = program("predict", folder, "-m", model, "-o", out, "--log", tmp_path / "log.jsonl")
    assert result.returncode == 3  # some failed
    lines = result.stderr.splitlines()
    assert any(line.startswith("✓ fine.tif (") for line in lines)
    assert any(line.startswith("✗ text.tif: ") and "TIFF" in line for line in lines)
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    assert table["fine.tif"][1] == "done"
    assert table["text.tif"][1] == "failed"
    assert f"{out}: 1 of 2 slides" in result.stdout
    assert "ridge_tiles" in sd.read_zarr(out / "fine.zarr").tables
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (events[0], events[-1]) == ("cohort_started", "cohort_finished")


def test_all_done_is_exit_code_0_and_quiet_says_nothing(folder, model, tmp_path):
    (folder / "text.tif").unlink()
    arguments = ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "out"), "--format", "h5ad", "--quiet"]
    for _ in range(2):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert result.output == ""
    assert [path.name for path in (tmp_path / "out").glob("*.h5ad")] == ["fine.h5ad"]


def test_quiet_keeps_errors(folder, model, tmp_path):
    result = runner.invoke(cli.app, ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "out"), "-q"])
    assert result.exit_code == 3
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("✗ text.tif: ")


def test_json_lines_on_stderr_are_nothing_but_json(folder, model, tmp_path):
    result = runner.invoke(
        cli.app, ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "out"), "--log", "-"]
    )
    assert [json.loads(line)["event"] for line in result.stderr.splitlines()][0] == "cohort_started"


def test_the_options_reach_the_library(folder, model, tmp_path, monkeypatch):
    from hespotex import tl

    seen = {}

    def cohort(paths, model, out, **options):
        seen.update(options, paths=paths, out=out)
        return pd.DataFrame({"slide": ["a"], "status": ["done"], "n_tiles": 1, "seconds": 1.0, "error": ""})

    monkeypatch.setattr(tl, "predict_cohort", cohort)
    options = ["--mpp", "0.4", "--batch-size", "7", "--device", "cpu", "--retries", "3", "--overwrite"]
    options += ["--format", "h5ad", "--weights", "w.pt"]
    options += ["--table-key", "t", "--shapes-key", "s", "--image-key", "i"]
    result = runner.invoke(cli.app, ["predict", str(folder), "-m", str(model), "-o", str(tmp_path / "o"), *options])
    assert result.exit_code == 0, result.output
    assert seen.pop("log")
    assert seen == {
        **{"paths": [folder], "out": tmp_path / "o", "client": None, "mpp": 0.4, "batch_size": 7, "device": "cpu"},
        **{"retries": 3, "overwrite": True, "format": "h5ad", "weights": Path("w.pt"), "progress_bar": False},
        **{"table_key": "t", "shapes_key": "s", "image_key": "i"},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{slide}", "{slide}", "-o", "x.zarr"], "is a store for one slide; name a folder"),
        (["{slide}", "-o", "x.zarr", "--format", "h5ad"], "go with a folder as --out"),
        (["{slide}", "-o", "x.zarr", "--workers", "2"], "go with a folder as --out"),
        (["{slide}", "-o", "x", "--workers", "2", "--scheduler", "tcp://here:1"], "give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, slide, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [argument.format(slide=slide) for argument in arguments]
    result = runner.invoke(cli.app, ["predict", *named, "-m", str(model)])
    assert isinstance(result.exception, hx.errors.HespotexError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_no_option_replaces_or_changes_what_is_no_result(slide, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy2(slide, tmp_path / "a.tif")
    (tmp_path / "a.h5ad").write_text("precious")
    command = ["predict", "a.tif", "-m", str(model), "--format", "h5ad", "-o"]
    result = runner.invoke(cli.app, [*command, ".", "--overwrite"])
    assert result.exit_code == 3
    assert "nothing but results is replaced: move it away" in result.stderr
    assert (tmp_path / "a.h5ad").read_text() == "precious"
    refused = {"a.tif": ["out", "--log", "a.tif"], "take out=": ["res.h5ad"]}
    for message, more in refused.items():
        result = runner.invoke(cli.app, [*command, *more])
        assert isinstance(result.exception, hx.errors.DataValueError)
        assert message in str(result.exception)
    assert (tmp_path / "a.tif").read_bytes() == slide.read_bytes()
    assert not {"out", "res", "res.h5ad"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("command", ["embed", "segment"])
def test_no_command_logs_into_a_slide(command, slide, tmp_path):
    shutil.copy2(slide, tmp_path / "a.tif")
    arguments = [command, str(tmp_path / "a.tif"), "-o", str(tmp_path / "out.zarr"), "--log", str(tmp_path / "a.tif")]
    result = runner.invoke(cli.app, arguments)
    assert "holds no such log" in str(result.exception)
    assert (tmp_path / "a.tif").read_bytes() == slide.read_bytes()


def test_a_scheduler_that_does_not_answer_is_said_in_a_line(monkeypatch):
    import distributed

    def nobody(*_, **__):
        raise OSError("Timed out trying to connect to tcp://127.0.0.1:1 after 30 s")

    monkeypatch.setattr(distributed, "Client", nobody)
    asked = _cluster.cluster("tcp://127.0.0.1:1", None)
    with pytest.raises(hx.errors.WorkerError, match="no scheduler answers at --scheduler tcp://127.0.0.1:1"):
        asked.__enter__()


@pytest.mark.slow
def test_workers_of_the_program_give_the_same(folder, model, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert program("predict", folder, "-m", model, "-o", here).returncode == 3
    result = program("predict", folder, "-m", model, "-o", there, "--workers", "2")
    assert result.returncode == 3, result.stderr
    tables = [sd.read_zarr(out / "fine.zarr")["ridge_tiles"].X for out in (here, there)]
    assert np.array_equal(*tables)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_ctrl_c_is_exit_code_130_and_the_next_run_goes_on(folder, slide, model, tmp_path, workers):
    for number in range(6):
        shutil.copy2(slide, folder / f"more{number}.tif")
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "hespotex", "predict", str(folder), "-m", str(model), "-o", str(out)]
    apart = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler), "start_new_session": True}
    with subprocess.Popen([*command, *workers, "--log", str(log)], stderr=subprocess.PIPE, text=True, **apart) as run:
        end = time.monotonic() + 120
        while not (log.exists() and "slide_done" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to the workers, too
        said = run.stderr.read()
    assert run.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    stored = pd.read_parquet(out / "manifest.parquet")
    assert (stored["status"] == "done").any()
    assert (stored["status"] == "pending").any()
    again = program(*command[3:])
    assert again.returncode == 3, again.stderr
    assert "(there already)" in again.stderr


def test_embed_and_segment_write_stores(slide, tmp_path):
    out = tmp_path / "new" / "embedded.zarr"
    result = runner.invoke(cli.app, ["embed", str(slide), "-o", str(out), "--encoder", "rgb", "--pitch-um", "50"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    stored = sd.read_zarr(out)
    expected = hx.io.read_wsi(slide)
    hx.pp.detect_tissue(expected)
    encoder = hx.encoders.create("rgb")
    hx.pp.make_tiles(expected, diameter_um=encoder.tile_um, pitch_um=50)
    hx.pp.embed(expected, encoder)
    assert np.array_equal(stored["rgb_tiles"].obsm["X_rgb"], expected["rgb_tiles"].obsm["X_rgb"])
    # Of a store, and in place of what is there.
    both = tmp_path / "both.zarr"
    result = runner.invoke(cli.app, ["segment", str(out), "-o", str(both), "--no-raster"])
    assert result.exit_code == 0, result.output
    result = runner.invoke(cli.app, ["segment", str(slide), "-o", str(both), "--no-raster", "--overwrite"])
    assert result.exit_code == 0, result.output
    stored = sd.read_zarr(both)
    assert len(stored["nuclei"]) == stored["nuclei_features"].n_obs > 50
    assert not stored.labels
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_commands_open_a_slide_with_what_lazyslide_found_on_it(slide, model, tmp_path):
    import geopandas as gpd
    from shapely.geometry import box
    from spatialdata.models import ShapesModel

    wsidata = pytest.importorskip("wsidata")
    shutil.copy2(slide, tmp_path / "s.tif")
    wsi = wsidata.open_wsi(tmp_path / "s.tif")
    frame = gpd.GeoDataFrame({"tile_id": [0, 1]}, geometry=[box(200, 200, 300, 300), box(350, 350, 450, 450)])
    wsi.shapes["tiles"] = ShapesModel.parse(frame)
    wsi.write()
    wsi.close()
    store, out = tmp_path / "s.zarr", tmp_path / "out.zarr"
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    for name in ("s.tif", "s.zarr"):
        more = {"embed": ["--encoder", "rgb"], "segment": ["--no-raster"], "predict": ["-m", str(model)]}
        for command, options in more.items():
            shutil.rmtree(out, ignore_errors=True)
            result = runner.invoke(cli.app, [command, str(tmp_path / name), "-o", str(out), *options])
            assert result.exit_code == 0, result.output
            stored = sd.read_zarr(out)
            assert resolve_slide(stored).shape == (700, 700)  # slide and result, also for the next command
            tables = {"embed": "rgb_tiles", "segment": "nuclei_features", "predict": "ridge_tiles"}
            assert len(stored["tiles"]) == 2
            assert command == "segment" or stored[tables[command]].n_obs == 2
    result = runner.invoke(cli.app, ["segment", str(tmp_path / "s.tif"), "-o", str(store), "--overwrite"])
    assert "LazySlide's store of the slide" in str(result.exception)
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def commands(slide, model, tmp_path) -> dict[str, list[str]]:
    """Arguments of the commands that make one thing, and write it to ``out.zarr``."""
    section = hx.datasets.synthetic(size_px=500, pitch_um=40, diameter_um=30, n_genes=40, seed=1)
    section.write(tmp_path / "section.zarr")
    made = {
        "train": [str(tmp_path / "section.zarr"), "--model", "mean", "--encoder", "rgb"],
        "embed": [str(slide), "--encoder", "rgb"],
        "segment": [str(slide), "--no-raster"],
        "predict": [str(slide), "-m", str(model)],
    }
    return {name: [name, *arguments, "-o", str(tmp_path / "out.zarr")] for name, arguments in made.items()}


STAGES = {
    "train": ["prepare", "train"],
    "embed": ["tiles", "embed", "write"],
    "segment": ["segment", "write"],
    "predict": ["predict", "write"],
}


@pytest.mark.parametrize("command", STAGES)
def test_quiet_commands_say_nothing_and_log_each_step(command, commands, tmp_path):
    log = tmp_path / "logs" / "run.jsonl"
    result = runner.invoke(cli.app, [*commands[command], "--quiet", "--log", str(log)])
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert (tmp_path / "out.zarr").is_dir()
    first, *stages, last = [event for event in events(log.read_text()) if event["event"] != "warning"]
    assert (first["event"], last["event"]) == ("command_started", "command_finished")
    assert first["command"] == last["command"] == command
    assert [event["stage"] for event in stages] == STAGES[command]
    assert all(event["seconds"] >= 0 and event["time"] for event in [*stages, last])
    result = runner.invoke(cli.app, [*commands[command], "-q", "--log", str(log)])  # what is there is not replaced
    assert result.exit_code == 1
    failed = events(log.read_text())[-1]
    assert (failed["event"], failed["error"]) == ("command_failed", "DataValueError")
    assert "exists" in failed["message"]


@pytest.mark.parametrize("command", STAGES)
def test_a_log_on_stderr_is_nothing_but_json(command, commands, tmp_path):
    result = runner.invoke(cli.app, [*commands[command], "--log", "-"])
    assert result.exit_code == 0, result.output
    assert events(result.stderr)[-1]["event"] == "command_finished"
    assert result.stdout.startswith(str(tmp_path / "out.zarr"))


@pytest.mark.parametrize("arguments", [[], ["--quiet"]])
def test_warnings_of_the_library_are_logged_and_silent_if_quiet(arguments, commands, tmp_path, monkeypatch):
    import warnings

    from hespotex import pp
    from hespotex.cli._screen import show_warning

    def noisy(*_, **__):
        warnings.warn("the slide is odd", hx.errors.HespotexWarning, stacklevel=1)

    monkeypatch.setattr(pp, "segment_nuclei", noisy)
    log = tmp_path / "run.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        result = runner.invoke(cli.app, [*commands["segment"], *arguments, "--log", str(log)])
        assert warnings.showwarning is show_warning  # as it was
    assert result.exit_code == 0, result.output
    assert ("Warning: the slide is odd" in result.stderr) == (not arguments)
    assert [event["message"] for event in events(log.read_text()) if event["event"] == "warning"] == [
        "the slide is odd"
    ]


def test_a_key_is_named_as_an_option_where_it_is_one(capsys):
    from hespotex.cli._predict import _line
    from hespotex.cli._screen import name_options

    name_options(["table_key"])
    event = {
        "event": "slide_failed",
        "slide": "a.zarr",
        "message": "there are several tables, name one with table_key=: []",
    }
    assert "--table-key: []" in str(_line(event))


def test_evaluate_is_silent_or_logs(tmp_path):
    other, section = hx.datasets.synthetic(2, size_px=500, pitch_um=40, diameter_um=30, n_genes=40, seed=1)
    hx.pp.embed(other, "rgb")
    hx.tl.predict(section, hx.tl.train(other, "mean", embedding_key="X_rgb"))
    section.write(tmp_path / "s.zarr")
    log = tmp_path / "run.jsonl"
    result = runner.invoke(cli.app, ["evaluate", str(tmp_path / "s.zarr"), "--quiet", "--log", str(log)])
    assert (result.exit_code, result.output) == (0, ""), result.exception
    kinds = [event["event"] for event in events(log.read_text()) if event["event"] != "warning"]
    assert kinds == ["command_started", "stage", "command_finished"]


def test_options_of_networks_reach_the_encoder_or_are_refused(slide, tmp_path, monkeypatch):
    from hespotex import encoders

    made: list[dict] = []
    create = encoders.create
    monkeypatch.setattr(encoders, "create", lambda name, **options: made.append(options) or create("rgb"))
    more = ["--dtype", "bfloat16", "--pooling", "class", "--batch-size", "auto"]
    command = ["embed", str(slide), "-o", str(tmp_path / "out.zarr"), "--encoder", "rgb"]
    result = runner.invoke(cli.app, [*command, *more])
    assert result.exit_code == 0, result.output
    assert made == [{"dtype": "bfloat16", "pooling": "class"}]
    monkeypatch.setattr(encoders, "create", create)
    for options, message in (
        (["--dtype", "bfloat16"], "dtype"),
        (["--pooling", "class"], "pooling"),
        (["--compile"], "compile"),
        (["--batch-size", "0"], "--batch-size 0 must be"),
    ):
        result = runner.invoke(cli.app, [*command, *options, "--overwrite"])
        assert isinstance(result.exception, hx.errors.HespotexError), result.exception
        assert message in str(result.exception)


def test_encoders_are_listed():
    result = runner.invoke(cli.app, ["encoders"])
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert {"licence", "gated", "cached"} <= set(header.split())
    assert {"morphology", "quiltnet"} <= {row.split()[0] for row in rows if row.strip()}


def test_the_doctor_finds_nothing_wrong_here_and_touches_no_network():
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert f"hespotex {hx.__version__}" in said
    for part in (
        "Packages",
        "Extras",
        "Device",
        "Cache",
        "Encoders",
        "Nuclei",
        "cellpose:",
        "instanseg:",
        "Settings",
        "bf16",
        "No problem found",
    ):
        assert part in said


def test_the_doctor_names_what_is_broken(monkeypatch, tmp_path):
    from importlib.metadata import requires

    (tmp_path / "file").write_text("")
    listed = ["numpy>=999", "no-such-package", "another-one; extra == 'cluster'", *(requires("hespotex") or [])]
    monkeypatch.setattr(_doctor, "requires", lambda _: listed)
    with hx.settings.override(cache_dir=tmp_path / "file" / "cache", device="cuda:7"):
        result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    problems = [line.strip() for line in result.stdout.splitlines() if "PROBLEM" in line]
    assert len(problems) == 4
    assert "is not >=999" in problems[0]
    assert "no-such-package is not installed; pip install" in problems[1]
    assert "device='cuda:7' is not available" in problems[2]
    assert "cannot be written to" in problems[3]
    assert "another-one is not installed: pip install 'hespotex[cluster]'" in result.stdout
    assert "4 problems found" in result.stdout
