from __future__ import annotations

import numpy as np
import pytest
import shapely

from hespotex.segmentation._outline import measure_regions
from hespotex.segmentation._packed import PackedRegions

from ._scenes import discs, lattice


@pytest.fixture(scope="module")
def regions():
    image, truth = discs((200, 260), lattice((200, 260), 26), 8)
    return measure_regions(truth, image, 0.5, origin=(-30, 7000))


def test_packing_loses_nothing(regions) -> None:
    packed = PackedRegions.pack(regions)
    assert len(packed) == len(regions)
    assert shapely.equals_exact(packed.polygons(), regions.polygons, 0).all()
    masks = list(packed.masks(np.arange(len(packed))))
    assert all(np.array_equal(one, other) for one, other in zip(masks, regions.masks, strict=True))
    for name in ("names", "boxes", "centroids", "features"):
        assert np.array_equal(getattr(packed, name), getattr(regions, name))


def test_a_nucleus_takes_hundreds_of_bytes(regions) -> None:
    packed = PackedRegions.pack(regions)
    assert sum(array.nbytes for array in packed.arrays().values()) / len(packed) < 400


def test_taking_and_joining_are_those_of_lists(regions) -> None:
    packed = PackedRegions.pack(regions)
    rows = np.random.default_rng(0).permutation(len(packed))
    halves = [packed.take(rows[:20]), packed.take(rows[20:20]), packed.take(rows[20:])]
    joined = PackedRegions.concatenate(halves)
    for name, array in packed.take(rows).arrays().items():
        assert np.array_equal(array, joined.arrays()[name]), name
    assert shapely.equals_exact(joined.polygons(), regions.polygons[rows], 0).all()
    assert shapely.equals_exact(packed.polygons(rows[:5]), regions.polygons[rows[:5]], 0).all()
    assert np.array_equal(next(joined.masks(np.array([3]))), regions.masks[rows[3]])


def test_none_is_a_number_of_regions() -> None:
    empty = PackedRegions.empty()
    assert len(empty) == len(empty.polygons()) == len(PackedRegions.concatenate([])) == 0
    assert len(PackedRegions.concatenate([empty, empty])) == 0


def test_arrays_that_do_not_fit_are_refused(regions) -> None:
    arrays = PackedRegions.pack(regions).arrays()
    assert len(PackedRegions.from_arrays(arrays)) == len(regions)
    for name, array in arrays.items():
        if name != "names":
            with pytest.raises(ValueError, match="do not fit"):
                PackedRegions.from_arrays({**arrays, name: array[:-1]})
    with pytest.raises(KeyError):
        PackedRegions.from_arrays({"names": arrays["names"]})
