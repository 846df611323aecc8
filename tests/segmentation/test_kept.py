from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import HespotexWarning
from hespotex.segmentation import Watershed, _kept
from hespotex.segmentation._appearance import estimate_appearance
from hespotex.segmentation._kept import KeptRuns
from hespotex.segmentation._nuclei import Nuclei
from hespotex.segmentation._tiled import iter_nuclei

from ._scenes import discs, lattice, slide_of

SHAPE = (300, 380)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return discs(SHAPE, lattice(SHAPE, 24, seed=3), radius=8, seed=1)[0]


class Backend:
    """Counts its calls, and is interrupted at one of them."""

    def __init__(self, image: np.ndarray, stop_at: int = -1) -> None:
        self.watershed = Watershed(16.0, estimate_appearance(image))
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, block) -> np.ndarray:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.watershed(block.pixels)


@pytest.fixture
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_kept, "KEEP_AFTER_S", 0.0)
    with hx.settings.override(cache_dir=tmp_path):
        yield tmp_path / "nuclei" / "same"


def segment(image: np.ndarray, backend: Backend, *, name: str = "same") -> Nuclei:
    slide = slide_of(image)
    options = {"mpp": 0.5, "halo_px": backend.watershed.halo_px, "block_px": 64, "n_jobs": 1, "progress_bar": False}
    with KeptRuns(lambda: name) as kept:
        parts = list(iter_nuclei(slide, backend, kept=kept, **options))
    return Nuclei.concatenate(parts, parts[0].grid)


def same(one: Nuclei, other: Nuclei) -> bool:
    arrays = other.regions.arrays()
    return all(np.array_equal(array, arrays[name]) for name, array in one.regions.arrays().items())


def test_interrupted_work_goes_on_where_it_stopped(image, cache) -> None:
    whole, blocks = Backend(image), 5 * 6
    expected = segment(image, whole)
    assert whole.calls == blocks
    assert not cache.exists()

    with pytest.raises(KeyboardInterrupt), pytest.warns(HespotexWarning, match="interrupted; 3 finished parts"):
        segment(image, Backend(image, stop_at=22))  # in the fourth row of six blocks
    assert len(list(cache.glob("*.npz"))) == 3
    second = Backend(image)
    assert same(segment(image, second), expected)
    assert second.calls == blocks - 18
    assert not cache.exists()


def test_a_damaged_part_counts_as_none(image, cache) -> None:
    expected = segment(image, Backend(image))
    with pytest.raises(KeyboardInterrupt), pytest.warns(HespotexWarning, match="4 finished"):
        segment(image, Backend(image, stop_at=25))
    first, second, third, _ = sorted(cache.glob("*.npz"))
    first.write_bytes(first.read_bytes()[:200])
    second.write_bytes(b"")
    data = bytearray(third.read_bytes())
    data[len(data) // 2] ^= 0xFF
    third.write_bytes(data)
    again = Backend(image)
    assert same(segment(image, again), expected)
    assert again.calls == 5 * 6 - 6


def test_work_of_another_identity_is_not_taken(image, cache) -> None:
    with pytest.raises(KeyboardInterrupt), pytest.warns(HespotexWarning, match="interrupted"):
        segment(image, Backend(image, stop_at=22))
    other = Backend(image)
    segment(image, other, name="other")
    assert other.calls == 5 * 6
    assert cache.exists()


def test_short_work_is_neither_kept_nor_identified(image, tmp_path) -> None:
    def identity() -> str:
        raise AssertionError("the slide was looked at for nothing")

    def interrupted() -> None:
        with KeptRuns(identity) as kept:
            list(
                iter_nuclei(
                    slide_of(image),
                    Backend(image, stop_at=9),
                    mpp=0.5,
                    halo_px=80,
                    block_px=64,
                    n_jobs=1,
                    kept=kept,
                    progress_bar=False,
                )
            )

    with hx.settings.override(cache_dir=tmp_path), pytest.raises(KeyboardInterrupt):
        interrupted()  # any warning would be an error
    assert not (tmp_path / "nuclei").exists()


def test_a_cache_that_cannot_be_written_ends_nothing(image, cache) -> None:
    cache.parent.write_text("in the way")
    with pytest.warns(HespotexWarning, match="is not kept"):
        found = segment(image, Backend(image))
    assert len(found) > 50
