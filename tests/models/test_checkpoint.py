from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from hespotex import models
from hespotex.errors import CheckpointError, DataValueError
from hespotex.models import Recipe, Run
from hespotex.models._checkpoint import FORMAT, _digest

OPTIONS = {
    "hespotex": {
        "context": 0,
        "graph": "legacy",
        "gate_graph": "legacy",
        "epochs": 1,
        "gate_epochs": 1,
        "n_members": 1,
    },
    "mlp": {"hidden": [8], "max_epochs": 2},
    "ridge": {"penalties": [0.1, 1.0]},
}


@pytest.fixture
def saved(trio, tmp_path) -> Path:
    return models.create("ridge", **OPTIONS["ridge"]).fit(trio).save(tmp_path / "model")


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files again, as a careful attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: _digest(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["ridge", "mlp", "knn", "mean", "hespotex"])
def test_round_trip_is_bit_identical(name, make_planted, trio, tmp_path):
    model = models.create(name, **OPTIONS.get(name, {})).fit(trio, Run(seed=3, device="cpu"))
    model.recipe = Recipe(
        genes=model.genes,
        unit=model.unit,
        n_features=6,
        embedding_key="X_morphology",
        encoder={"name": "morphology", "mpp": 0.5},
        tiles={"diameter_um": 100.0, "pitch_um": 200.0, "lattice": "square"},
        training={"sections": [{"name": "s0", "group": "p0", "n_obs": 40}]},
    )
    again = models.load(model.save(tmp_path / "model"))
    assert type(again) is type(model)
    assert again.config == model.config
    assert again.recipe == model.recipe
    assert again.history == model.history
    assert (again.genes, again.unit, again.n_features) == (model.genes, model.unit, 6)
    test = make_planted("new", seed=5)
    np.testing.assert_array_equal(again.predict(test).mean, model.predict(test).mean)
    again.save(tmp_path / "second")
    for file in ("config.json", "recipe.json", "model.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_card_names_what_it_was_trained_on(trio, tmp_path):
    model = models.create("mean").fit(trio)
    model.recipe = Recipe(model.genes, model.unit, training={"sections": [{"name": "C2"}, {"name": "C3"}]})
    card = (model.save(tmp_path / "m") / "README.md").read_text()
    assert "trained on: C2, C3" in card


def test_existing_folders_are_safe(trio, saved, tmp_path):
    model = models.create("mean").fit(trio)
    with pytest.raises(DataValueError, match="overwrite=True"):
        model.save(saved)
    assert models.load(saved).info.name == "ridge"
    model.save(saved, overwrite=True)
    assert models.load(saved).info.name == "mean"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(DataValueError, match="left alone"):
        model.save(precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


def test_failed_save_leaves_nothing_behind(trio, saved, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = models.create("mean").fit(trio)
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unfitted_models_are_not_saved(tmp_path):
    with pytest.raises(DataValueError, match="not fitted"):
        models.create("ridge").save(tmp_path / "m")


def test_missing_folder_and_foreign_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        models.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        models.load(tmp_path)


def test_pickle_is_never_read(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    file = tmp_path / "model.pt"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="run code"):
        models.load(file)
    shutil.copy(file, saved / "model.safetensors")
    reseal(saved)
    with pytest.raises(CheckpointError, match="does not fit"):
        models.load(saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "recipe.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damaged_files(saved, name, damage):
    file = saved / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        models.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "1"}', '{"format": 0}', '{"format": 1}'])
def test_damaged_manifest(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        models.load(saved)


def test_newer_format(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match="upgrade hespotex"):
        models.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "no-such-model"},
        {"config": {"no_such_option": 1}},
        {"config": {"penalties": []}},
        {"config": None},
        {"values": {}},
        {"values": None},
    ],
    ids=str,
)
def test_resealed_nonsense_is_a_typed_error(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    reseal(saved)
    if change == {"config": None}:  # no settings stored means the defaults
        assert models.load(saved).info.name == "ridge"
        return
    with pytest.raises(CheckpointError, match="does not fit this hespotex"):
        models.load(saved)


@pytest.mark.parametrize("file", ["config.json", "recipe.json"])
def test_resealed_json_of_another_shape(saved, file):
    (saved / file).write_text("[1, 2]")
    reseal(saved)
    with pytest.raises(CheckpointError):
        models.load(saved)


@pytest.mark.parametrize("name", ["ridge", "mlp", "knn", "mean", "hespotex"])
def test_arrays_that_do_not_fit_the_recipe(name, trio, tmp_path):
    folder = models.create(name, **OPTIONS.get(name, {})).fit(trio, Run(device="cpu")).save(tmp_path / "model")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["genes"] = recipe["genes"][:-1]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    reseal(folder)
    with pytest.raises(CheckpointError, match="shape|does not fit"):
        models.load(folder)
