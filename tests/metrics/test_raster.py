from __future__ import annotations

import numpy as np
import pytest

from hespotex.errors import DataValueError
from hespotex.metrics import raster_rmse, raster_ssim


@pytest.fixture
def maps():
    """A truth, a prediction of other level and amplitude, and a mask with a hole."""
    rng = np.random.default_rng(0)
    row, column = np.indices((24, 20))
    truth = (2 + np.sin(row / 3) + np.cos(column / 4))[..., None] + 0.3 * rng.uniform(size=(24, 20, 3))
    predicted = 0.5 * truth + 0.2 * rng.uniform(size=truth.shape) + 1
    mask = (row - 12) ** 2 + (column - 10) ** 2 < 90
    mask[10:12, 8:11] = False
    return truth, predicted, mask


@pytest.mark.data
def test_equals_the_scores_recorded_from_the_published_code(data_dir):
    file = data_dir / "golden" / "histex" / "metrics.npz"
    if not file.is_file():
        pytest.skip(f"{data_dir} holds no golden/histex")
    recorded = np.load(file)
    truth, mask = np.clip(recorded["truth"], 0, None), recorded["mask"]
    predicted = recorded["prediction"][: truth.shape[0], : truth.shape[1]]
    np.testing.assert_allclose(raster_rmse(truth, predicted, mask, extent="image"), recorded["rmse"], rtol=1e-9)
    # The published mean leaves out the border where no whole window lies.
    np.testing.assert_allclose(raster_ssim(truth, predicted, mask, extent="image"), recorded["ssim"], rtol=1e-9)


@pytest.mark.parametrize("extent", ["mask", "image"])
def test_checklist_17_identical_maps_and_affine_rescaling(maps, extent):
    truth, predicted, mask = maps
    np.testing.assert_allclose(raster_ssim(truth, truth, mask, extent=extent), 1)
    np.testing.assert_allclose(raster_rmse(truth, truth, mask, extent=extent), 0, atol=1e-15)
    slope, level = np.array([2.0, 0.1, 30.0]), np.array([-1.0, 0.0, 7.0])
    for score in (raster_ssim, raster_rmse):
        expected = score(truth, predicted, mask, extent=extent)
        np.testing.assert_allclose(score(truth, slope * predicted + level, mask, extent=extent), expected, rtol=1e-9)
        np.testing.assert_allclose(score(slope * truth + level, predicted, mask, extent=extent), expected, rtol=1e-9)


def test_without_scaling_level_and_amplitude_count(maps):
    truth, predicted, mask = maps
    np.testing.assert_allclose(raster_rmse(truth, truth + 2, mask, scale=False), 2)
    assert (raster_ssim(truth, truth + 2, mask, scale=False) < 0.9).all()
    expected = np.sqrt(((truth - predicted)[mask] ** 2).mean(axis=0))
    np.testing.assert_allclose(raster_rmse(truth, predicted, mask, scale=False), expected)


def test_what_lies_outside_the_mask_does_not_count(maps):
    truth, predicted, mask = maps
    blank = predicted.copy()
    blank[~mask] = np.nan
    bright = truth.copy()
    bright[~mask] = 100
    for score in (raster_ssim, raster_rmse):
        np.testing.assert_array_equal(score(bright, blank, mask), score(truth, predicted, mask))


def test_a_large_background_raises_the_published_score_alone(maps):
    truth, _, mask = maps
    noise = np.random.default_rng(1).uniform(size=truth.shape)
    wide = [np.pad(each, ((20, 20), (20, 20), (0, 0))) for each in (truth, noise)]
    padded = np.pad(mask, 20)
    np.testing.assert_allclose(raster_ssim(*wide, padded), raster_ssim(truth, noise, mask), rtol=0.3)
    assert (raster_ssim(*wide, padded, extent="image") > raster_ssim(*wide, padded) + 0.3).all()


def test_constant_truth_is_undefined(maps):
    truth, predicted, mask = maps
    truth[..., 1] = 3.0
    for score in (raster_ssim, raster_rmse):
        assert np.isnan(score(truth, predicted, mask)).tolist() == [False, True, False]


def test_bad_input_is_an_error(maps):
    truth, predicted, mask = maps
    with pytest.raises(DataValueError, match="alike"):
        raster_ssim(truth, predicted[:-1])
    with pytest.raises(DataValueError, match="mask has shape"):
        raster_rmse(truth, predicted, mask[1:])
    with pytest.raises(DataValueError, match="no cell"):
        raster_rmse(truth, predicted, np.zeros_like(mask))
    with pytest.raises(DataValueError, match="extent='all'"):
        raster_rmse(truth, predicted, mask, extent="all")
    with pytest.raises(DataValueError, match="predicted has values"):
        raster_ssim(truth, np.where(mask[..., None], np.nan, predicted), mask)
    with pytest.raises(DataValueError, match="fewer than a window's 7"):
        raster_ssim(truth[:5], predicted[:5])
    with pytest.raises(DataValueError, match="whole window"):
        raster_ssim(truth, predicted, np.arange(24)[:, None] + np.zeros((24, 20)) < 3)
