"""The program: what it says, writes, refuses, and with which exit code."""

from __future__ import annotations

import json
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
    assert all(command in shown for command in ("demo", "train", "predict", "evaluate"))


def test_train_predict_evaluate_from_store_to_store(stores, model, tmp_path):
    import spatialdata

    before = sorted(path.name for path in (stores[1] / "tables" / "table" / "obsm").iterdir())
    out, table = tmp_path / "predicted.zarr", tmp_path / "scores.csv"
    assert runner.invoke(cli.app, ["predict", str(stores[1]), "-m", str(model), "-o", str(out)]).exit_code == 0
    result = runner.invoke(cli.app, ["evaluate", str(out), "--out", str(table)])
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(table)
    assert (scores["model"] == "ridge").sum() == 20
    assert hx.get.prediction(spatialdata.read_zarr(out), "ridge").n_vars == 20
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{store}", "-m", "x", "-o", "{store}"], "the slide itself"),
        (["predict", "{store}", "-m", "x", "-o", "{there}"], "add --overwrite"),
        (["train", "{store}", "-o", "{there}"], "add --overwrite"),
        (["demo", "--out", "{there}"], "holds other files"),
        (["predict", "{store}", "-m", "x", "-o", "{new}"], "does not exist; save a model"),
        (["train", "{store}", "-o", "{new}", "--model", "rigde"], "did you mean 'ridge'"),
    ],
)
def test_refusals_name_the_way_out(arguments, message, stores, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("mine")
    places = {"store": stores[0], "there": there, "new": tmp_path / "new.zarr"}
    result = runner.invoke(cli.app, [argument.format(**places) for argument in arguments])
    assert isinstance(result.exception, hx.errors.HespotexError)
    assert message in str(result.exception)
    assert (there / "thesis.txt").read_text() == "mine"


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
