"""What the loaders of lazyslide-models are kept from, and how a file is found again."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

import hespotex as hx
from hespotex.encoders import _lazyslide_load
from hespotex.encoders.lazyslide import image_models
from hespotex.errors import CheckpointError, DataValueError, MissingWeightsError

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
lazyslide_models = pytest.importorskip("lazyslide_models")
huggingface_hub = pytest.importorskip("huggingface_hub")

DATA_ONLY, WITH_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture(autouse=True)
def _nothing_is_agreed_to(monkeypatch, tmp_path):
    monkeypatch.setattr(_lazyslide_load, "_AGREED", set())
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        yield


def quietly(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hx.encoders.create(name, **options)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A checkpoint with code in it, which ``omiclip`` would run, and the file that shows it ran."""
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "code": Code(ran)}, tmp_path / "checkpoint.pt")

    def made(architecture, *, pretrained, weights_only):
        assert not weights_only  # which is what the package asks for
        return torch.load(pretrained, weights_only=weights_only), None

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", made)
    return tmp_path / "checkpoint.pt", ran


@pytest.mark.parametrize("value", [None, "0"])
def test_a_file_of_the_hub_runs_no_code(evil, monkeypatch, value):
    path, ran = evil
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(path))
    monkeypatch.delenv(DATA_ONLY, raising=False)
    if value is not None:
        monkeypatch.setenv(DATA_ONLY, value)
    monkeypatch.setenv(WITH_CODE, "1")
    with pytest.raises(CheckpointError, match=r"published weights \(WangGuangyuLab/Loki\) .*weights='tensors.pt'"):
        quietly("lazyslide:omiclip")
    assert not ran.exists()
    assert os.environ.get(DATA_ONLY) == value
    assert os.environ[WITH_CODE] == "1"


def test_a_file_that_evades_the_check_runs_no_code(evil, monkeypatch):
    """As one does that is both safetensors and a pickle."""
    path, ran = evil
    monkeypatch.setattr(_lazyslide_load, "read_state_dict", lambda path: {})
    with pytest.raises(CheckpointError, match=r"weights 'checkpoint.pt' hold more than tensors"):
        quietly("lazyslide:omiclip", weights=path)
    assert not ran.exists()


def test_code_of_publishers_is_run_by_those_who_ask_for_it(monkeypatch):
    kind, made = lazyslide_models.MODEL_REGISTRY["hibou-l"], []

    def loader(self):
        made.append(self)
        raise OSError("offline")

    with pytest.raises(DataValueError, match="Python code .*histai/hibou.*trust_remote_code=True"):
        quietly("lazyslide:hibou-l")
    monkeypatch.setattr(_lazyslide_load, "runs_code", lambda kind: True)
    monkeypatch.setattr(kind, "__init__", loader)
    for options in ({"trust_remote_code": True}, {}):  # the second time by its name, as a trained model asks for it
        with pytest.raises(MissingWeightsError, match="offline"):
            quietly("lazyslide:hibou-l", **options)
    assert len(made) == 2
    with pytest.raises(DataValueError, match="trust_remote_code"):
        quietly("lazyslide:titan")


def test_loaders_that_run_code_of_publishers_are_known():
    kinds = image_models()
    running = {key for key, kind in kinds.items() if _lazyslide_load.runs_code(kind)}
    assert {"conceptclip", "hibou-b", "hibou-l", "titan", "genbio-pathfm", "open-midnight"} <= running
    assert not running & {"uni", "plip", "omiclip", "keep", "phikon", "midnight", "virchow2", "ctranspath"}
    table = hx.encoders.available(family="lazyslide")
    assert "trust_remote_code=True" in table.loc["lazyslide:titan", "summary"]
    assert "trust_remote_code=True" not in table.loc["lazyslide:uni", "summary"]


@pytest.fixture
def folder(tmp_path):
    """All that ``plip`` reads, as names."""
    path = tmp_path / "plip"
    path.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_folders_with_code_are_refused(folder):
    nested = json.dumps({"vision": {"auto_map": {"AutoModel": "evil.Model"}}}).replace("_map", "\\u005fmap")
    for name, text in (("evil.py", "raise SystemExit"), ("processor_config.json", nested)):
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=f"holds Python code, which hespotex does not run: {name}"):
            quietly("lazyslide:plip", weights=folder)
        (folder / name).unlink()
    (folder / "evil.py").touch()
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(DataValueError, match=r"takes no weights=.*runs the code that lies beside them"):
            quietly("lazyslide:conceptclip", weights=folder, **options)


def test_a_folder_that_is_at_fault_is_said_to_be(folder):
    with pytest.raises(CheckpointError, match="'plip' is not the folder that its loader takes"):
        quietly("lazyslide:plip", weights=folder)
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        MissingWeightsError, match="lacks model.safetensors, tokenizer.json. Download all files"
    ) as caught:
        quietly("lazyslide:plip", weights=folder)
    assert "accept the terms" not in str(caught.value)


@pytest.fixture
def in_cache(monkeypatch, tmp_path):
    """``put(hub_id, file, state)`` into a cache of the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(cache), raising=False)

    def put(hub_id: str, file: str) -> None:
        folder = cache / f"models--{hub_id.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc" / file).touch()

    return put


@pytest.mark.parametrize(
    ("key", "hub_id", "file"),
    [
        ("crown", "LexieK/Crown", "CROWN.pth"),
        ("omiclip", "WangGuangyuLab/Loki", "checkpoint.pt"),
        ("crisp", "FTZhou/CRISP", "CRISP.pth"),
        ("uni", "MahmoodLab/uni", "model.safetensors"),
    ],
)
def test_what_the_cache_of_the_hub_holds_goes_before_a_file_given_earlier(in_cache, tmp_path, key, hub_id, file):
    kind, name = lazyslide_models.MODEL_REGISTRY[key], f"lazyslide:{key}"
    own = tmp_path / "own.pt"
    own.touch()
    _lazyslide_load.remember(name, own, "0" * 64)
    assert _lazyslide_load.own_file(kind, name, None, None) == own
    in_cache(hub_id, file)
    assert _lazyslide_load.own_file(kind, name, None, None) is None
    assert _lazyslide_load.own_file(kind, name, None, "0" * 64) == own
    assert _lazyslide_load.own_file(kind, name, None, "1" * 64) is None


def test_a_model_trained_on_ones_own_file_finds_it_beside_the_cache_of_the_hub(in_cache, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: create("vit_tiny_patch16_224", num_classes=0, depth=1))
    torch.save(timm.create_model("uni").state_dict(), tmp_path / "own.bin")
    encoder = quietly("lazyslide:uni", weights=tmp_path / "own.bin")
    in_cache("MahmoodLab/UNI", "pytorch_model.bin")
    in_cache("MahmoodLab/uni", "pytorch_model.bin")
    assert quietly(**encoder.params()).params() == encoder.params()
