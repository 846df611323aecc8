from __future__ import annotations

import numpy as np
import pytest
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Affine, Identity, get_transformation

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres, shape_positions
from hespotex.errors import GeometryError, ImageFormatError, ScaleError

TURNED = Affine(np.array([[0, -2, 900], [2, 0, 0], [0, 0, 1]]), ("x", "y"), ("x", "y"))


def test_image_and_what_lies_on_it_get_microns(plain_section):
    centres = np.array([[100.0, 200.0], [300.0, 250.0]])
    sdata = plain_section(mpp=None, centres=centres, to_global=TURNED)
    sdata["mask"] = Labels2DModel.parse(np.zeros((60, 50), int), dims=("y", "x"), transformations={"global": TURNED})
    sdata["far"] = Labels2DModel.parse(
        np.zeros((6, 5), int), dims=("y", "x"), transformations={"elsewhere": Identity()}
    )
    hx.pp.set_scale(sdata, mpp=0.25)
    slide = resolve_slide(sdata)
    assert slide.mpp == pytest.approx(0.25)
    np.testing.assert_allclose(shape_centres(sdata, "spots", slide), centres, atol=1e-6)
    np.testing.assert_allclose(shape_positions(sdata, "spots")[0], centres / 4, atol=1e-6)
    assert "microns" in get_transformation(sdata["mask"], get_all=True)
    assert "microns" not in get_transformation(sdata["far"], get_all=True)


def test_scale_can_be_set_again(plain_section):
    sdata = plain_section(mpp=0.5)
    centres = shape_centres(sdata, "spots", resolve_slide(sdata))
    hx.pp.set_scale(sdata, mpp=0.7)
    assert resolve_slide(sdata).mpp == pytest.approx(0.7)
    np.testing.assert_allclose(shape_centres(sdata, "spots", resolve_slide(sdata)), centres, atol=1e-6)


def test_scale_by_the_pitch_of_the_spots(plain_section):
    x, y = np.meshgrid(np.arange(4), np.arange(4))
    sdata = plain_section(mpp=None, centres=np.column_stack([x.ravel(), y.ravel()]) * 80.0 + 100)
    hx.pp.set_scale(sdata, pitch_um=200)
    assert get_transformation(sdata["image"], "microns").to_affine_matrix(("x",), ("x",))[0, 0] == pytest.approx(2.5)


def test_arguments(plain_section):
    sdata = plain_section(mpp=None)
    for options in ({}, {"mpp": 0.5, "pitch_um": 100}, {"mpp": 0.0}, {"pitch_um": np.nan}):
        with pytest.raises(ScaleError):
            hx.pp.set_scale(sdata, **options)
    with pytest.raises(GeometryError, match="no square or hexagonal"):
        hx.pp.set_scale(sdata, pitch_um=100)
    grey = plain_section(np.zeros((1, 90, 90), np.uint8), mpp=None, centres=[[40, 40]])
    with pytest.raises(ImageFormatError):
        hx.pp.set_scale(grey, mpp=0.5)
    assert "microns" not in get_transformation(sdata["image"], get_all=True)
