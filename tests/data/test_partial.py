from __future__ import annotations

import errno

import numpy as np
import pytest

import hespotex as hx
from hespotex.data import partial
from hespotex.data.partial import PartialRows
from hespotex.errors import HespotexWarning


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    with hx.settings.override(cache_dir=tmp_path):
        yield tmp_path


def rows(*, identity: str = "identity", shape: tuple[int, int] = (4, 3)) -> PartialRows:
    return PartialRows(identity, shape)


def interrupted() -> None:
    with rows() as some:
        some.write(np.array([0, 2]), np.ones((2, 3)))
        raise KeyboardInterrupt


def kept(cache) -> list:
    return sorted(cache.rglob("*.npz"))


def test_what_was_done_is_there_again():
    with pytest.warns(HespotexWarning, match="after 2 of 4 rows"), pytest.raises(KeyboardInterrupt):
        interrupted()
    again = rows()
    assert again.done.tolist() == [True, False, True, False]
    assert again.values().sum() == 6
    assert not rows(identity="another").done.any()


def test_a_run_is_kept_as_soon_as_it_is_written(cache):
    # Nothing runs after a kill: not even the end of the block.
    some = rows().__enter__()
    some.write(np.array([3]), np.full((1, 3), 7.0))
    assert rows().values()[3].tolist() == [7, 7, 7]
    some.write(np.array([1]), np.full((1, 3), 5.0))
    assert len(kept(cache)) == 2
    assert rows().done.tolist() == [False, True, False, True]


def test_what_is_done_soon_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 60.0)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kept(cache) == []


def test_discarded_nothing_is_left(cache):
    some = rows()
    some.write(np.array([3]), np.full((1, 3), 7.0))
    some.discard()
    assert not any(cache.rglob("identity*"))
    assert not rows().done.any()


@pytest.mark.parametrize("n_bytes", [0, 3, 60, -40])
def test_a_damaged_file_counts_as_none(cache, n_bytes):
    some = rows()
    some.write(np.array([3]), np.ones((1, 3)))
    some.write(np.array([1]), np.ones((1, 3)))
    damaged = kept(cache)[0]
    damaged.write_bytes(damaged.read_bytes()[:n_bytes])
    assert rows().done.tolist() == [False, False, False, True]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3)])
def test_a_file_of_another_shape_counts_as_none(shape):
    rows().write(np.array([3]), np.ones((1, 3)))
    assert not rows(shape=shape).done.any()


def test_a_full_disk_costs_only_what_is_kept(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with rows() as some:
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", full)
            some.write(np.array([0]), np.ones((1, 3)))
        assert kept(cache) == []
        assert not list(cache.rglob("*.part"))
        some.write(np.array([1]), np.ones((1, 3)))
    assert rows().done.tolist() == [True, True, False, False]

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.warns(HespotexWarning, match="could not be kept.*No space"), pytest.raises(KeyboardInterrupt):
            interrupted()


def test_a_long_run_is_kept_in_several_files(cache, monkeypatch):
    monkeypatch.setattr(partial, "_KEEP_BYTES", 2 * 3 * 4)  # one row and a bit
    values = np.arange(9.0).reshape(3, 3)
    rows().write(np.array([3, 0, 1]), values)
    assert len(kept(cache)) == 3
    again = rows()
    assert again.done.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(again.values()[[3, 0, 1]], values)


def test_the_last_run_is_not_kept(cache):
    some = rows()
    some.write(np.arange(3), np.ones((3, 3)))
    some.write(np.array([3]), np.ones((1, 3)))
    assert rows().done.tolist() == [True, True, True, False]
