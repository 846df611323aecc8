from __future__ import annotations

from pathlib import Path

import pytest

from hespotex import _files
from hespotex._files import check_writable, publish, replacing, staged
from hespotex.data.blockwise import check_target
from hespotex.errors import OutputError


def make(folder: Path, text: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)
    return folder


def test_a_folder_takes_its_name_whole(tmp_path):
    publish(make(tmp_path / "part", "new"), tmp_path / "final")
    assert (tmp_path / "final" / "deep" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another_and_mixes_nothing(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(_files, "exchange", lambda one, other: False)
    make(tmp_path / "final", "old")
    (tmp_path / "final" / "only_old.txt").write_text("")
    publish(make(tmp_path / "part", "new"), tmp_path / "final")
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["b.txt", "deep"]
    assert (tmp_path / "final" / "b.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    rename = Path.rename

    def fails(self, target):
        if self.name == "part":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    make(tmp_path / "final", "old")
    part = make(tmp_path / "part", "new")
    monkeypatch.setattr(_files, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        publish(part, tmp_path / "final")
    assert (tmp_path / "final" / "b.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "part"]


def test_what_a_kill_between_two_renamings_leaves_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "exchange", lambda one, other: False)
    target = make(tmp_path / "final", "old")
    rename = Path.rename

    def killed(self, name):
        if self.name == "part":
            raise KeyboardInterrupt
        return rename(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(make(tmp_path / "part", "new"), target)
    with staged(target):
        pass
    (before,) = tmp_path.glob(".final.*.before")
    assert (before / "b.txt").read_text() == "old"


def test_a_file_takes_the_place_of_another(tmp_path):
    (tmp_path / "final").write_text("old")
    (tmp_path / "part").write_text("new")
    publish(tmp_path / "part", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "new"


def test_what_is_cut_short_leaves_what_was_there(tmp_path):
    (tmp_path / "final").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _cut_short(tmp_path / "final")
    assert (tmp_path / "final").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def _cut_short(path: Path) -> None:
    with replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt


def test_a_folder_beside_is_gone_afterwards_and_so_are_those_of_killed_runs(tmp_path):
    target = tmp_path / "out [1].zarr"
    other = tmp_path / f".{target.name}-mine"  # somebody else's
    other.mkdir()
    with staged(target) as folder:
        assert folder.parent == tmp_path
        (folder / "part").write_text("much")
        left = tmp_path / f".{target.name}-left"
        make(left, "by a kill")
        (left / ".in_use").touch()
        with staged(target) as second:
            assert {path.name for path in tmp_path.iterdir()} == {folder.name, second.name, other.name}
        assert (folder / "part").exists()
    with pytest.raises(KeyError), staged(target):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_place_is_tried_without_leaving_anything(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x.zarr", "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x.zarr", tmp_path / "file" / "deep" / "x.zarr"):
        with pytest.raises(OutputError, match="out: nothing can be written to the folder .*file"):
            check_writable(place, "out")
        with pytest.raises(OutputError, match="target="):
            check_target(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
