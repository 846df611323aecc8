"""The two bands against those recorded from the published program; statements 11 and 20 of its checklist."""

from __future__ import annotations

import numpy as np
import pytest

from hespotex.annotation.bands import (
    area_resize,
    bands,
    meta_expression,
    paint_squares,
    pool_largest,
    published_gene_band,
    published_image_band,
)
from hespotex.errors import DataValueError

CASES = ("small_min", "large_mean", "minumi1")


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_bands_are_the_recorded_ones(tesla, tesla_image, case):
    recorded, imputed = tesla(f"annotation_{case}"), tesla("imputation_default")
    shape = recorded["img_band"].shape
    image = published_image_band(tesla_image, recorded["binary"], shape)
    np.testing.assert_allclose(image, recorded["img_band"], atol=1e-12)
    meta = meta_expression(
        imputed["expression"][:, recorded["genes"]], int(recorded["num_required"]), str(recorded["pooling"])
    )
    gene = published_gene_band(
        meta,
        imputed["superpixel_xy"],
        int(imputed["res"]),
        recorded["binary"],
        shape,
        min_umi=int(recorded["min_UMI"]),
    )
    np.testing.assert_allclose(gene, recorded["gene_band"], atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_checklist_11_min_pooling_is_the_mth_largest_scaled_marker(m):
    expression = np.random.default_rng(0).exponential(size=(30, 4)) * [1, 10, 100, 0.1]
    low, high = expression.min(axis=0), expression.max(axis=0)
    ranked = np.sort((expression - low) / (high - low), axis=1)[:, ::-1]
    np.testing.assert_allclose(meta_expression(expression, m), ranked[:, m - 1])
    np.testing.assert_allclose(meta_expression(expression, m, "mean"), ranked[:, :m].mean(axis=1))


def test_checklist_20_no_umi_asked_for_leaves_the_gene_band_as_it_is():
    rng = np.random.default_rng(0)
    points = np.stack(np.meshgrid(np.arange(4, 40, 4), np.arange(4, 40, 4)), axis=-1).reshape(-1, 2)
    meta, tissue = rng.uniform(0.01, 1, len(points)), np.ones((40, 40), dtype=bool)
    plain = area_resize(paint_squares(points, 4, tissue.shape, meta), (20, 20))
    band = published_gene_band(meta, points, 4, tissue, (20, 20), min_umi=0)
    np.testing.assert_allclose(band, plain / plain.max())
    # The published cut acts on scaled values, and erases most of them.
    erased = published_gene_band(meta, points, 4, tissue, (20, 20), min_umi=1)
    assert (erased > 0).mean() < 0.5 * (band > 0).mean()


def test_the_cut_acts_on_expression_before_it_is_scaled():
    expression = np.array([[0.5, 8.0], [0.8, 2.0], [3.0, 0.0]])
    assert meta_expression(expression, least=0.6).tolist() == [1.0, 0.8 / 3, 1.0]


def test_bands_on_a_grid_with_holes():
    grid = np.array([[2, 5], [2, 6], [3, 5]])
    made = bands(np.array([[0.1] * 3, [0.5] * 3, [0.9] * 3]), np.array([0.0, 0.5, 2.0]), grid)
    np.testing.assert_allclose(made.image[..., 0], [[0, 0.5], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(made.image[..., 1], [[0, 0.25], [1, 0]])
    assert made.tissue.tolist() == [[True, True], [True, False]]


def test_resizing_keeps_the_mean():
    image = np.random.default_rng(0).uniform(size=(31, 22))
    small = area_resize(image, (7, 9))
    assert small.mean() == pytest.approx(image.mean())
    np.testing.assert_allclose(area_resize(image, image.shape), image)
    np.testing.assert_allclose(area_resize(image[:30], (15, 11))[2, 3], image[4:6, 6:8].mean())
    with pytest.raises(DataValueError, match="larger"):
        area_resize(image, (40, 9))


def test_squares_cover_what_the_published_ones_do():
    canvas = paint_squares(np.array([[5, 5], [1, 9]]), 5, (10, 10))
    assert np.argwhere(canvas[:, 5])[:, 0].tolist() == [2, 3, 4, 5, 6]  # int(2.5) to int(7.5) - 1
    assert canvas[:, 9].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]  # cut at the border


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: meta_expression(np.array([[0.0, 1.0], [0.0, 2.0]])), r"columns \[0\]"),
        (lambda: meta_expression(np.array([[0.0, 1.0], [0.0, 2.0]]), least=5.0), r"columns \[0, 1\]"),
        (lambda: pool_largest(np.ones((2, 3)), 4), "num_required=4"),
        (lambda: pool_largest(np.ones((2, 3)), 1, "max"), "pooling='max'"),
        (lambda: bands(np.ones((2, 3)), np.array([0.0, 1.0]), np.array([[0, 0], [0, 1]])), "image band"),
        (lambda: bands(np.eye(3)[:2], np.array([0.0, np.nan]), np.array([[0, 0], [0, 1]])), "NaN"),
        (lambda: bands(np.eye(3)[:2], np.array([1.0, 1.0]), np.array([[0, 0], [0, 1]])), "gene band"),
    ],
)
def test_bands_that_divide_nothing(call, message):
    with pytest.raises(DataValueError, match=message):
        call()
