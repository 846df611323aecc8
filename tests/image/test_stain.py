"""Maps of colours between stains of known dyes."""

from __future__ import annotations

import json
import pickle

import dask.array as da
import numpy as np
import pytest

from hespotex.errors import DataTypeError, DataValueError
from hespotex.image.stain import StainFit, fit_stain_to, stain_map, stained

PINK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
BLUE = np.array([[0.75, 0.60, 0.28], [0.25, 0.90, 0.35]])


def tissue(dyes: np.ndarray, strength: float, n: int = 20_000, seed: int = 0) -> np.ndarray:
    """Pixels (n, 3) of two dyes in random amounts, many of them of one dye only."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.25 * strength, (n, 2)) + 0.15
    amounts[: n // 3, 0] *= 0.02
    amounts[n // 3 : 2 * n // 3, 1] *= 0.02
    dyes = dyes / np.linalg.norm(dyes, axis=1, keepdims=True)
    return np.rint(256 * np.exp(-amounts @ dyes) - 1).clip(0, 255).astype(np.uint8)


def angle(first: np.ndarray, second: np.ndarray) -> float:
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def as_image(pixels: np.ndarray, height: int = 100) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(height, -1, 3).transpose(2, 0, 1))


@pytest.mark.parametrize(("method", "within"), [("macenko", 3), ("vahadane", 12)])
def test_the_dyes_are_found(method, within):
    fit = fit_stain_to(tissue(PINK, 1.0), method)
    assert angle(fit.values["matrix"][:, 0], PINK[0]) < within
    assert angle(fit.values["matrix"][:, 1], PINK[1]) < within


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_the_same_amounts_in_other_dyes_are_taken_to_the_reference(method):
    """Both slides hold the same tissue, so that the wanted pixels are known."""
    own, wanted = tissue(BLUE, 1.0), tissue(PINK, 1.0)
    mapped = stain_map(fit_stain_to(own, method), fit_stain_to(wanted, method))(as_image(own))
    before = np.abs(own.astype(int) - wanted).mean()
    after = np.abs(mapped.astype(int) - as_image(wanted).astype(int)).mean()
    assert after < (0.2 if method == "macenko" else 0.7) * before


def test_strength_is_matched_unless_only_colours_are_wanted():
    own, wanted = fit_stain_to(tissue(PINK, 0.5), "macenko"), fit_stain_to(tissue(PINK, 1.0), "macenko")
    image = as_image(tissue(PINK, 0.5))
    mean = {"own": image.mean(), "wanted": tissue(PINK, 1.0).mean()}
    assert stain_map(own, wanted)(image).mean() == pytest.approx(mean["wanted"], abs=10)
    assert stain_map(own, wanted, match_strength=False)(image).mean() == pytest.approx(mean["own"], abs=3)
    assert mean["own"] - mean["wanted"] > 20


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_a_stain_taken_to_itself_changes_nothing(method):
    fit = fit_stain_to(tissue(PINK, 1.0), method)
    image = as_image(tissue(PINK, 1.0, seed=1))
    assert np.abs(stain_map(fit, fit)(image).astype(int) - image).max() <= 1


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_glass_stays_glass(method):
    glass = np.full((3, 20, 30), 245, np.uint8)
    mapped = stain_map(fit_stain_to(tissue(BLUE, 1.0), method), fit_stain_to(tissue(PINK, 1.5), method))(glass)
    assert np.abs(mapped.astype(int) - 245).max() <= 12


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_the_map_is_squidpys(method):
    """squidpy's own normalisation of an image that is all tissue, which fits on all of it."""
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel
    from squidpy.experimental import im

    own, wanted = as_image(tissue(BLUE, 1.0)), as_image(tissue(PINK, 1.3))
    sdata = SpatialData(
        images={name: Image2DModel.parse(pixels, dims=("c", "y", "x")) for name, pixels in (("a", own), ("b", wanted))},
        labels={"all": Labels2DModel.parse(np.ones(own.shape[1:], np.uint8), dims=("y", "x"))},
    )
    reference = im.fit_stain_reference(sdata, "b", method=method, tissue_mask_key="all")
    expected = im.normalize_stains(sdata, "a", reference, tissue_mask_key="all", inplace=False).values
    fits = [fit_stain_to(np.moveaxis(pixels, 0, -1).reshape(-1, 3), method) for pixels in (own, wanted)]
    mapped = stain_map(*fits, match_strength=False)(own)
    difference = np.abs(mapped.astype(int) - expected.astype(int))
    if method == "reinhard":  # ours leaves glass as it is, and changes pale pixels less
        difference = difference[:, own.min(axis=0) < 200]
    assert difference.max() <= 1


def test_any_cut_gives_the_same_pixels():
    colours = stain_map(fit_stain_to(tissue(BLUE, 1.0), "reinhard"), fit_stain_to(tissue(PINK, 1.0), "reinhard"))
    image = as_image(tissue(BLUE, 1.0, seed=2))
    whole = colours(image)
    for chunks in ((3, 7, 11), (3, 100, 200), (3, 33, 200)):
        lazy = da.from_array(image, chunks=chunks).map_blocks(colours, dtype=np.uint8)
        assert np.array_equal(lazy.compute(scheduler="synchronous"), whole)
    assert np.array_equal(pickle.loads(pickle.dumps(colours))(image), whole)


def test_a_record_gives_the_same_map():
    own, wanted = fit_stain_to(tissue(BLUE, 1.0), "macenko"), fit_stain_to(tissue(PINK, 1.0), "macenko")
    again = StainFit.from_record(json.loads(json.dumps(wanted.to_record())))
    image = as_image(tissue(BLUE, 1.0))
    assert np.array_equal(stain_map(own, again)(image), stain_map(own, wanted)(image))


def test_what_is_no_stain_is_refused():
    with pytest.raises(DataValueError, match="'he' is unknown; possible: 'macenko'"):
        fit_stain_to(tissue(PINK, 1.0), "he")
    with pytest.raises(DataValueError, match="only 40 stained pixels"):
        fit_stain_to(tissue(PINK, 1.0)[:40], "macenko")
    with pytest.raises(DataValueError, match="one colour"):
        fit_stain_to(np.full((2000, 3), 120, np.uint8), "reinhard")
    green = np.array([[0.9, 0.2, 0.6], [0.8, 0.1, 0.75]])
    with pytest.raises(DataValueError, match="method='macenko'.*canonical"):
        fit_stain_to(tissue(green, 1.0), "macenko")
    with pytest.raises(DataValueError, match="lambda9"):
        fit_stain_to(tissue(PINK, 1.0), "macenko", {"lambda9": 1})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"method": "macenko"}, "has \\('matrix', 'maxima', 'white'\\)"),
        ({"method": "reinhard", "mean": [0, 0], "std": [1, 1, 1]}, "'mean' must be \\(3,\\)"),
        ({"method": "reinhard", "mean": [0, 0, 0], "std": [1, -1, 1]}, "'std' must be positive"),
        ({"method": "reinhard", "mean": [0, 0, "x"], "std": [1, 1, 1]}, "numbers"),
        ({"method": "macenko", "matrix": np.ones((3, 3)).tolist(), "maxima": [1, 1], "white": [255] * 3}, "differ"),
    ],
)
def test_a_record_that_is_none_is_refused(record, message):
    with pytest.raises(DataValueError, match=message):
        StainFit.from_record(record)
    with pytest.raises(DataTypeError, match="holds 'method'"):
        StainFit.from_record({"a": 1})


def test_glass_and_masked_pixels_are_not_stained():
    pixels = np.array([[250, 248, 250], [239, 223, 234], [0, 0, 0], [200, 150, 190]], np.uint8)
    assert stained(pixels).tolist() == [[200, 150, 190]]
