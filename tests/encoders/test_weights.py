from __future__ import annotations

import zipfile

import pytest

import hespotex as hx
from hespotex.encoders._weights import known_as, read_state_dict, remember_as
from hespotex.errors import CheckpointError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def state():
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3, dtype=torch.float16)}


def save(state, path):
    if path.suffix == ".safetensors":
        safetensors.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".pth")
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth"])
def test_all_formats_hold_the_same(name, state, tmp_path):
    found = read_state_dict(save(state, tmp_path / name))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in state.items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth"])
def test_the_format_is_told_by_the_content_as_well(name, state, tmp_path):
    path = save(state, tmp_path / name).rename(tmp_path / ("0" * 64))
    assert read_state_dict(path).keys() == state.keys()


def test_wrappers_and_prefixes_are_taken_off(state, tmp_path):
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    assert read_state_dict(save(wrapped, tmp_path / "a.bin")).keys() == state.keys()


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth"])
@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, 0.9])
def test_truncated_files_are_refused(name, keep, state, tmp_path):
    path = save(state, tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 1 or keep == 0 else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=rf"weights '{name}'"):
        read_state_dict(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about other protocols
@pytest.mark.parametrize("name", ["a.bin", "a.pth"])
def test_damage_in_the_pickle_is_refused_or_harmless(name, state, tmp_path):
    """A byte of the program that rebuilds the tensors is another one: it may not run, or run on other numbers."""
    path = save(state, tmp_path / name)
    if name == "a.pth":
        content, write = path.read_bytes()[:400], lambda data: path.write_bytes(data + path.read_bytes()[400:])
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {part: archive.read(part) for part in archive.namelist()}
        program = next(part for part in parts if part.endswith("data.pkl"))
        content = parts[program]

        def write(data):
            with zipfile.ZipFile(path, "w") as archive:
                for part, own in parts.items():
                    archive.writestr(part, data if part == program else own)

    refused = 0
    for place in range(2, len(content), 7):
        for byte in (0, 0x52, 0x75, 0xFF):
            write(content[:place] + bytes([byte]) + content[place + 1 :])
            try:
                read_state_dict(path)
            except CheckpointError:
                refused += 1
    assert refused > 20


def test_code_in_a_file_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"weight": Harm()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_state_dict(tmp_path / "a.bin")


def test_a_name_leads_to_the_last_file_given_for_it(tmp_path):
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        assert known_as("timm:x/y") is None
        for number in (1, 2):
            file = tmp_path / f"{number}.bin"
            file.write_bytes(b"x")
            remember_as("timm:x/y", file)
            assert known_as("timm:x/y") == file
        file.unlink()
        assert known_as("timm:x/y") is None


def test_names_that_are_alike_as_files_are_told_apart(tmp_path):
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        for name in ("timm:hf-hub:a/b_c", "timm:hf-hub:a_b/c"):
            file = tmp_path / f"{len(list(tmp_path.glob('*.bin')))}.bin"
            file.write_bytes(b"x")
            remember_as(name, file)
        assert known_as("timm:hf-hub:a/b_c").name == "0.bin"
        assert known_as("timm:hf-hub:a_b/c").name == "1.bin"


def test_what_is_no_checkpoint_is_named_in_a_line(tmp_path):
    (tmp_path / "slide.tif").write_bytes(b"II*\0" + bytes(300))
    with pytest.raises(CheckpointError, match=r"'slide.tif' are damaged or hold .*: Unsupported operand 73$"):
        read_state_dict(tmp_path / "slide.tif")
