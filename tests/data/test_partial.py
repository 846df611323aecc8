from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.data import partial
from hespotex.data.partial import PartialRows
from hespotex.errors import HespotexWarning


def interrupted() -> None:
    with PartialRows("identity", (4, 3)) as rows:
        rows.write(np.array([0, 2]), np.ones((2, 3)))
        raise KeyboardInterrupt


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file that an interrupted computation leaves."""
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    with hx.settings.override(cache_dir=tmp_path):
        with pytest.warns(HespotexWarning, match="after 2 of 4 rows"), pytest.raises(KeyboardInterrupt):
            interrupted()
        (path,) = tmp_path.rglob("*.npz")
        yield path


def test_what_was_done_is_there_again(kept):
    again = PartialRows("identity", (4, 3))
    assert again.done.tolist() == [True, False, True, False]
    assert again.values().sum() == 6


@pytest.mark.parametrize("n_bytes", [0, 3, 60, -40])
def test_a_damaged_file_counts_as_none(kept, n_bytes):
    kept.write_bytes(kept.read_bytes()[:n_bytes])
    assert not PartialRows("identity", (4, 3)).done.any()


def test_a_file_of_another_width_counts_as_none(kept):
    assert not PartialRows("identity", (4, 5)).done.any()
    assert not PartialRows("identity", (2, 3)).done.any()
