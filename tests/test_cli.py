"""The program: what it says, writes, refuses, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import hespotex as hx
from hespotex import cli
from hespotex.data.geometry import resolve_slide

runner = CliRunner()


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hespotex", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    sections = hx.datasets.synthetic(2, size_px=500, pitch_um=40, diameter_um=30, n_genes=40, seed=1)
    paths = []
    for sdata in sections:
        del sdata.points["cells_truth"]
        path = folder / f"{sdata.attrs['hespotex']['name']}.zarr"
        sdata.write(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def model(stores, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "ridge.hx"
    result = runner.invoke(
        cli.app, ["train", str(stores[0]), "--out", str(path), "--model", "ridge", "--n-top-genes", "20"]
    )
    assert result.exit_code == 0, result.output
    return path


def test_version_and_help():
    assert runner.invoke(cli.app, ["--version"]).output.strip() == hx.__version__
    shown = runner.invoke(cli.app, ["--help"]).output
    commands = ("demo", "train", "predict", "evaluate", "embed", "segment", "encoders", "doctor")
    assert all(command in shown for command in commands)


def test_train_predict_evaluate_from_store_to_store(stores, model, tmp_path):
    import spatialdata

    before = sorted(path.name for path in (stores[1] / "tables" / "table" / "obsm").iterdir())
    out, table = tmp_path / "new" / "predicted.zarr", tmp_path / "also_new" / "scores.csv"
    assert runner.invoke(cli.app, ["predict", str(stores[1]), "-m", str(model), "-o", str(out)]).exit_code == 0
    result = runner.invoke(cli.app, ["evaluate", str(out), "--out", str(table)])
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(table)
    assert (scores["model"] == "ridge").sum() == 20
    printed = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.split()[1:]}
    own = scores[scores["model"] == "ridge"]
    assert [float(number) for number in printed["ridge"][:3]] == pytest.approx(
        [own["pearson"].mean(), own["pearson"].median(), own["rmse"].mean()], abs=6e-4
    )
    assert {"null_shuffle:ridge", "null_random_gene:ridge"} < set(printed)
    assert "ceiling" in result.stdout
    assert hx.get.prediction(spatialdata.read_zarr(out), "ridge").n_vars == 20
    slide = tmp_path / "slide.tif"
    slide.write_bytes(b"pixels")
    for taken, words in ((table, "add --overwrite to replace it"), (slide, "name a file that ends in .csv")):
        content = taken.read_bytes()
        refused = runner.invoke(cli.app, ["evaluate", str(out), "--out", str(taken)])
        assert refused.exit_code == 1
        assert words in str(refused.exception)
        assert taken.read_bytes() == content
    assert runner.invoke(cli.app, ["evaluate", str(out), "--out", str(table), "--overwrite"]).exit_code == 0
    assert sorted(path.name for path in (stores[1] / "tables" / "table" / "obsm").iterdir()) == before


def test_an_image_file_is_a_slide(model, tmp_path):
    import numpy as np
    import spatialdata
    from PIL import Image

    slide = hx.datasets.synthetic(size_px=500, with_expression=False, first_patient=3, seed=1)
    pixels = resolve_slide(slide).levels[0].array.compute().transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "biopsy.png")
    out = tmp_path / "biopsy.zarr"
    result = runner.invoke(
        cli.app, ["predict", str(tmp_path / "biopsy.png"), "--mpp", "0.5", "-m", str(model), "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "ridge_tiles" in spatialdata.read_zarr(out).tables


def test_what_went_wrong_is_one_sentence_without_traceback(tmp_path, stores):
    result = _program("predict", str(tmp_path / "no.zarr"), "-m", "x", "-o", str(tmp_path / "y.zarr"))
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert _program("train").returncode == 2


def test_a_warning_is_one_line_and_those_of_libraries_are_silent(capsys, monkeypatch):
    import warnings

    from hespotex.cli._screen import name_options

    name_options(["mpp", "n_top_genes"])  # of the command that runs

    def noisy():
        warnings.warn("mpp=0.2 was given, but the file states 0.5", hx.errors.HespotexWarning, stacklevel=1)
        warnings.warn("zarr will change", FutureWarning, stacklevel=1)
        raise hx.errors.DataValueError("pass mpp=, n_top_genes= or overwrite=True")

    monkeypatch.setattr(cli, "app", noisy)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit, match="1"):
            cli.main()
    assert capsys.readouterr().err.splitlines() == [
        "Warning: --mpp 0.2 was given, but the file states 0.5",
        "Error: pass --mpp, --n-top-genes or --overwrite",
    ]


def test_an_error_of_the_system_is_one_line(tmp_path, stores):
    (tmp_path / "file").write_text("")
    result = _program("evaluate", str(stores[0]), "--out", str(tmp_path / "file" / "scores.csv"))
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_seed_of_the_settings_holds_where_none_is_given(stores, tmp_path):
    options = ["--model", "mean", "--n-top-genes", "20"]
    with hx.settings.override(seed=7):
        for name, more in (("default", []), ("given", ["--seed", "3"])):
            out = tmp_path / name
            assert runner.invoke(cli.app, ["train", str(stores[0]), "-o", str(out), *options, *more]).exit_code == 0
    assert hx.models.load(tmp_path / "default").recipe.training["seed"] == 7
    assert hx.models.load(tmp_path / "given").recipe.training["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{store}", "-m", "x", "-o", "{store}"], "the slide itself"),
        (["predict", "{store}", "-m", "x", "-o", "{there}.zarr"], "add --overwrite"),
        (["embed", "{store}", "-o", "{store}"], "the slide itself"),
        (["segment", "{store}", "-o", "{there}"], "add --overwrite"),
        (["embed", "{store}", "-o", "{new}", "--encoder", "morfology"], "did you mean 'morphology'"),
        (["train", "{store}", "-o", "{there}"], "add --overwrite"),
        (
            ["train", "{store}", "-o", "{new}", "--model", "ridge", "--devices", "none"],
            "a number of at least 1, or 'auto'",
        ),
        (["demo", "--out", "{there}"], "holds other files"),
        (["predict", "{store}", "-m", "x", "-o", "{new}"], "--model x does not exist; hespotex train"),
        (["train", "{store}", "-o", "{there}", "--overwrite"], "is no saved model"),
        (["predict", "{store}", "-m", "x", "-o", "{there}.zarr", "--overwrite"], "is no zarr store"),
        (["train", "{store}", "{store}", "-o", "{new}"], "given more than once"),
        (["train", "{there}/biopsy.png", "-o", "{new}"], "training needs SpatialData stores"),
        (["train", "{there}", "-o", "{new}"], "cannot be read as a SpatialData store"),
        (["evaluate", "{there}"], "cannot be read as a SpatialData store"),
        (["evaluate", "{store}", "--out", "{there}"], "name a file that ends in .csv"),
        (["train", "{store}", "-o", "{new}", "--model", "rigde"], "did you mean 'ridge'"),
    ],
)
def test_refusals_name_the_way_out(arguments, message, stores, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("mine")
    (there / "biopsy.png").write_bytes(b"")
    (tmp_path / "there.zarr").symlink_to(there)
    places = {"store": stores[0], "there": there, "new": tmp_path / "new.zarr"}
    result = runner.invoke(cli.app, [argument.format(**places) for argument in arguments])
    assert isinstance(result.exception, hx.errors.HespotexError)
    assert message in str(result.exception)
    assert (there / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(stores, model, tmp_path, monkeypatch, number):
    """By ``mkdir``, as it is on a read-only drive and in ``/sys``, root or not."""
    from hespotex import pp, tl
    from hespotex.io import _open

    def no_work(*_, **__):
        raise AssertionError("the work has begun")

    for module, name in ((_open, "open_slide"), (pp, "embed"), (pp, "segment_nuclei"), (tl, "train")):
        monkeypatch.setattr(module, name, no_work)
    commands = (
        ["embed", "{slide}"],
        ["segment", "{slide}"],
        ["train", "{slide}"],
        ["predict", "{slide}", "-m", "{model}"],
    )

    def refused(out: Path) -> None:
        for command in commands:
            arguments = [word.format(slide=stores[0], model=model) for word in command]
            result = runner.invoke(cli.app, [*arguments, "-o", str(out)])
            assert isinstance(result.exception, hx.errors.OutputError), result.exception
            message = str(result.exception)
            assert message.startswith(f"--out {out}: nothing can be written to the folder")
            assert "name a place" in message

    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "x.zarr")
    mkdir = Path.mkdir

    def read_only(self, *arguments, **options):
        if self.name.endswith(".probe"):
            raise OSError(number, os.strerror(number))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(tmp_path / "x.zarr")
    refused(tmp_path / "new" / "x.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_run_py_keeps_the_callers_folder_and_sees_a_killed_step(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("run", Path(__file__).parents[1] / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    calls = []

    def record(command, *, cwd, **_):
        calls.append(cwd)
        return subprocess.CompletedProcess(command, -9 if len(calls) == 1 else 0)

    monkeypatch.setattr(run, "install", lambda *_: None)
    monkeypatch.setattr(run.subprocess, "run", record)
    monkeypatch.chdir(tmp_path)
    assert run.main(["lint"]) == 128 + 9
    assert run.main(["predict", "biopsy.png"]) == 0
    assert calls == [run.ROOT, run.ROOT, run.ROOT, tmp_path]


@pytest.mark.parametrize("patient", range(4))
def test_the_small_pieces_of_the_demo_are_whole_and_hold_several_regions(patient):
    import numpy as np

    from hespotex.datasets._tissue import Region, make_tissue

    rng = np.random.default_rng([0, patient])
    mixture = {"tumour": 0.25, "adipose": 1.25, "immune": 1.7, "glands": 14.0}
    region = make_tissue(rng, (800.0, 800.0), mixture).region
    border = np.concatenate([region[0], region[-1], region[:, 0], region[:, -1]])
    assert (border == Region.GLASS).all()
    assert 0.5 < (region != Region.GLASS).mean() < 0.85
    assert len(np.unique(region)) >= 4


@pytest.mark.slow
def test_demo_writes_report_tables_and_maps(tmp_path):
    out = tmp_path / "demo"
    result = _program("demo", "--quick", "--out", str(out))
    assert result.returncode == 0, result.stderr
    report = (out / "report.md").read_text()
    for name in ("held_out_patient", "image_only_slide", "gene_correlation", "predicted_vs_measured", "training"):
        assert f"({name}.png)" in report
        assert (out / f"{name}.png").stat().st_size > 10_000
    metrics = pd.read_csv(out / "metrics.csv", index_col="model")
    assert {"hespotex", "ridge", "null_train_mean", "null_density"} <= set(metrics.index)
    assert metrics.loc["ridge", "mean r"] > metrics.loc["null_train_mean", "mean r"]
    assert metrics["ceiling"].between(0.2, 1).all()
    assert json.loads((out / "hespotex.hx" / "manifest.json").read_text())["format"] == 1


def test_arguments_become_options_and_calls_stay_python():
    from hespotex.cli._screen import in_options, name_options

    name_options(["mpp", "out"])
    text = "pass mpp=0.5, or set it with hx.pp.set_scale(sdata, mpp=...)"
    assert in_options("mpp=-1 must be") == "--mpp -1 must be"
    assert in_options(text) == "pass --mpp 0.5, or set it with hx.pp.set_scale(sdata, mpp=...)"
