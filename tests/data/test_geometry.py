from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata import read_zarr
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, set_transformation

import hespotex as hx
from hespotex.data.geometry import (
    Slide,
    check_on_image,
    resolve_slide,
    shape_centres,
    shape_geometries,
    shape_positions,
    shape_radius,
)
from hespotex.data.pyramid import Level, level_factor
from hespotex.errors import (
    AmbiguousKeyError,
    DataTypeError,
    GeometryError,
    HespotexWarning,
    ImageFormatError,
    MissingKeyError,
    ScaleError,
)


def affine(*rows: tuple[float, float, float]) -> Affine:
    return Affine(np.array([*rows, (0, 0, 1)]), input_axes=("x", "y"), output_axes=("x", "y"))


ROTATED = affine((0.6, -0.8, 300), (0.8, 0.6, -40))
FLIPPED = affine((-1, 0, 500), (0, 1, 0))
STRETCHED = Scale([2.5, 2.5], axes=("x", "y"))


@pytest.mark.parametrize("to_global", [Identity(), ROTATED, FLIPPED, STRETCHED, Translation([7, -3], axes=("x", "y"))])
@pytest.mark.parametrize("scale_factors", [None, [2, 2]])
def test_positions_are_those_of_the_pixels_whatever_the_common_transformation(plain_section, to_global, scale_factors):
    centres = np.array([[100.25, 200.5], [300.0, 90.75]])
    sdata = plain_section(centres=centres, to_global=to_global, scale_factors=scale_factors)
    slide = resolve_slide(sdata)
    np.testing.assert_allclose(shape_centres(sdata, "spots", slide), centres, atol=1e-6)
    linear = to_global.to_affine_matrix(("x", "y"), ("x", "y"))[:2, :2]
    assert slide.mpp == pytest.approx(0.5 * np.sqrt(abs(np.linalg.det(linear))))
    assert shape_radius(sdata, "spots", slide) == pytest.approx(20 * slide.mpp)
    microns, system = shape_positions(sdata, "spots")
    assert system == "microns"
    np.testing.assert_allclose(slide.microns(centres), microns, atol=1e-6)


def test_shapes_stored_in_another_frame_than_the_image(plain_section):
    sdata = plain_section()
    to_pixels = affine((0, 2, 5), (-2, 0, 400))
    systems = {"global": to_pixels, "microns": Sequence([to_pixels, Scale([0.5, 0.5], axes=("x", "y"))])}
    sdata["own"] = ShapesModel.parse(np.array([[10.0, 20.0]]), geometry=0, radius=3, transformations=systems)
    slide = resolve_slide(sdata)
    np.testing.assert_allclose(shape_centres(sdata, "own", slide), [[45, 380]])
    assert shape_radius(sdata, "own", slide) == pytest.approx(3.0)
    outline = shape_geometries(sdata, "own", slide).iloc[0]
    assert outline.bounds == pytest.approx((39, 374, 51, 386), abs=0.1)


def test_cropping_moves_the_origin_and_keeps_microns(plain_section):
    sdata = plain_section(centres=[[200.0, 300.0]], scale_factors=[2])
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[101, 203], max_coordinate=[401, 503], target_coordinate_system="global"
    )
    slide, whole = resolve_slide(crop), resolve_slide(sdata)
    centre = shape_centres(crop, "spots", slide)
    np.testing.assert_allclose(centre, [[99, 97]])
    np.testing.assert_allclose(slide.microns(centre), whole.microns(np.array([[200.0, 300.0]])))
    assert slide.mpp == whole.mpp == 0.5


def test_polygons_have_centroids_and_half_a_side(plain_section):
    from geopandas import GeoDataFrame
    from shapely import box

    sdata = plain_section()
    systems = {"global": Identity()}
    sdata["bins"] = ShapesModel.parse(
        GeoDataFrame(geometry=[box(0, 0, 16, 16), box(16, 0, 32, 16)]), transformations=systems
    )
    slide = resolve_slide(sdata)
    np.testing.assert_allclose(shape_centres(sdata, "bins", slide), [[8, 8], [24, 8]])
    assert shape_radius(sdata, "bins", slide) == pytest.approx(4.0)


def test_scale_is_one_number_within_three_percent(plain_section):
    sdata = plain_section()
    set_transformation(sdata["image"], Scale([0.50, 0.51], axes=("x", "y")), "microns")
    assert resolve_slide(sdata).mpp == pytest.approx(np.sqrt(0.5 * 0.51))
    set_transformation(sdata["image"], Scale([0.50, 0.52], axes=("x", "y")), "microns")
    with pytest.raises(ScaleError, match=r"0\.52.*0\.5"):
        resolve_slide(sdata)


def test_an_unknown_scale_is_an_error_that_names_calls_which_take_one(plain_section):
    sdata = plain_section(mpp=None)
    with pytest.raises(ScaleError, match=r"hx\.pp\.set_scale\(sdata, mpp=.*hx\.tl\.predict\(\.\.\., mpp="):
        resolve_slide(sdata)
    for function in (hx.pp.set_scale, hx.tl.predict):
        assert "mpp" in inspect.signature(function).parameters


def visium(n_rows: int = 6, n_columns: int = 12, pitch_px: float = 137.0) -> tuple[np.ndarray, pd.DataFrame]:
    row, column = np.meshgrid(np.arange(n_rows), np.arange(n_columns), indexing="ij")
    used = (row + column) % 2 == 0
    row, column = row[used], column[used]
    xy = np.column_stack([100 + column * pitch_px / 2, 100 + row * pitch_px * np.sqrt(3) / 2])
    return xy, pd.DataFrame({"array_row": row, "array_col": column})


def test_visium_spots_give_the_scale(plain_section):
    centres, array = visium()
    sdata = plain_section(np.zeros((3, 900, 1100), np.uint8), mpp=None, centres=centres)
    table = sdata["table"]
    order = [int(name[1:]) for name in table.obs["spot_id"]]
    for column in array:
        table.obs[column] = array[column].to_numpy()[order]
    assert resolve_slide(sdata).mpp == pytest.approx(100 / 137)


def test_a_square_array_is_not_taken_for_visium(plain_section):
    x, y = np.meshgrid(np.arange(5), np.arange(5))
    sdata = plain_section(mpp=None, centres=np.column_stack([x.ravel(), y.ravel()]) * 60.0 + 100)
    order = [int(name[1:]) for name in sdata["table"].obs["spot_id"]]
    sdata["table"].obs["array_row"] = y.ravel()[order]
    sdata["table"].obs["array_col"] = x.ravel()[order]
    with pytest.raises(ScaleError):
        resolve_slide(sdata)


def test_previews_are_warned_about(plain_section):
    with pytest.warns(HespotexWarning, match="preview"):
        resolve_slide(plain_section(mpp=3.2))


def test_image_is_the_only_one_or_named(plain_section):
    sdata = plain_section()
    with pytest.raises(MissingKeyError, match="image"):
        resolve_slide(sdata, image_key="other")
    for name in ("v_hires_image", "v_full_image"):
        sdata[name] = sdata["image"]
    with pytest.raises(AmbiguousKeyError, match="image_key='v_full_image'"):
        resolve_slide(sdata)
    assert resolve_slide(sdata, image_key="v_full_image").key == "v_full_image"
    for name in list(sdata.images):
        del sdata.images[name]
    with pytest.raises(MissingKeyError, match="no image"):
        resolve_slide(sdata)
    with pytest.raises(DataTypeError, match="SpatialData"):
        resolve_slide(sdata["table"])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 50, 50), np.uint8), "1 channel;"),
        (np.zeros((4, 50, 50), np.uint8), "alpha"),
        (np.zeros((5, 50, 50), np.uint8), "5 channels"),
        (np.zeros((3, 50, 50), np.float32), r"\* 255"),
        (np.zeros((3, 50, 50), np.uint16), "16 bit"),
    ],
)
def test_only_8_bit_rgb(plain_section, pixels, message):
    sdata = plain_section()
    del sdata.images["image"]
    sdata["image"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    with pytest.raises(ImageFormatError, match=message):
        resolve_slide(sdata)


def test_unconnected_and_contradicting_systems(plain_section):
    sdata = plain_section()
    slide = resolve_slide(sdata)
    set_transformation(sdata["spots"], {"elsewhere": Identity()}, set_all=True)
    with pytest.raises(GeometryError, match="share no coordinate system"):
        shape_centres(sdata, "spots", slide)
    set_transformation(
        sdata["spots"],
        {"microns": Scale([0.5, 0.5], axes=("x", "y")), "global": Translation([90, 0], axes=("x", "y"))},
        set_all=True,
    )
    with pytest.raises(GeometryError, match="90 px apart"):
        shape_centres(sdata, "spots", slide)


def test_shapes_outside_the_image_are_counted(plain_section):
    sdata = plain_section()
    slide = resolve_slide(sdata)
    check_on_image(slide, np.array([[0.0, 0.0], [499.9, 599.9]]), "spots")
    with pytest.raises(GeometryError, match="1 of 2 spots"):
        check_on_image(slide, np.array([[0.0, 0.0], [500.0, 1.0]]), "spots")


@pytest.mark.parametrize(
    ("full", "size", "factor"),
    [
        ((9911, 9274), (4955, 4637), 2),  # dropped
        ((9911, 9274), (620, 580), 16),  # kept
        ((1000, 1000), (333, 333), 3),
        ((1040, 700), (16, 10), 64),  # 65 would fit, too
        ((1000, 1000), (400, 400), None),
        ((1000, 1000), (500, 250), None),
        ((5, 5), (5, 5), 1),
    ],
)
def test_a_level_is_a_whole_number_coarser(full, size, factor):
    assert level_factor(full, size) == factor


def mark_of(level: Level) -> list[float]:
    """Centre (x, y) of what is bright, in pixels of level 0."""
    weight = level.array[0].compute().astype(float)
    y, x = np.indices(weight.shape) + 0.5
    return [float((axis * weight).sum() / weight.sum()) * level.downsample for axis in (x, y)]


@pytest.mark.parametrize("height", [2048, 2051])
def test_levels_lie_on_each_other_although_spatialdata_drops_the_first_rows_of_odd_sizes(
    plain_section, height, tmp_path
):
    pixels = np.zeros((3, height, 1031), np.uint8)
    pixels[:, 2008:2040, 1000:1016] = 255
    sdata = plain_section(pixels, scale_factors=[2, 2, 2])
    sdata.write(tmp_path / "s.zarr")
    for each in (sdata, read_zarr(tmp_path / "s.zarr")):
        levels = resolve_slide(each).levels
        assert [level.downsample for level in levels] == [1, 2, 4, 8]
        for level in levels:
            assert mark_of(level) == pytest.approx([1008, 2024], abs=0.01)


def test_computed_levels_are_means_however_the_image_is_chunked(plain_section):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 613, 517), dtype=np.uint8)
    levels = resolve_slide(plain_section(pixels, scale_factors=[2, 2], chunks=50)).levels
    for level, factor in zip(levels[1:3], (2, 4), strict=True):
        height, width = 613 // factor, 517 // factor
        squares = pixels[:, : height * factor, : width * factor].reshape(3, height, factor, width, factor)
        assert np.abs(level.array.compute() - squares.mean((2, 4))).max() <= 0.5
        assert max(level.array.chunks[1]) <= 50 // factor + 2  # no more is read at once than before


def test_levels_that_lie_on_the_finest_are_read_as_stored(plain_section):
    sdata = plain_section(np.zeros((3, 600, 520), np.uint8), scale_factors=[2, 2, 2])
    for name in ("scale1", "scale2", "scale3"):
        sdata["image"][name]["image"][:] = int(name[-1])
    assert [int(level.array.max().compute()) for level in resolve_slide(sdata).levels] == [0, 1, 2, 3]
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[4, 8], max_coordinate=[400, 400], target_coordinate_system="global"
    )
    assert [int(level.array.max().compute()) for level in resolve_slide(crop).levels] == [0, 0, 0, 0]


def test_stretched_and_shifted_levels_are_not_read(plain_section):
    from xarray import DataTree

    sdata = plain_section(np.zeros((3, 600, 520), np.uint8), scale_factors=[{"x": 2, "y": 3}])
    sdata["image"]["scale1"]["image"][:] = 255
    assert all(level.array.max().compute() == 0 for level in resolve_slide(sdata).levels)
    pixels = np.zeros((3, 600, 520), np.uint8)
    pixels[:, 400:420, 300:320] = 255
    sdata = plain_section(pixels, scale_factors=[2])
    levels = {name: level["image"].to_dataset(name="image") for name, level in sdata["image"].items()}
    shifted = levels["scale1"].assign_coords(x=levels["scale1"].x + 3)
    sdata["image"] = DataTree.from_dict({"scale0": levels["scale0"], "scale1": shifted.roll(x=7)})
    assert mark_of(resolve_slide(sdata).levels[1]) == [310, 410]


@pytest.mark.parametrize("stored", [(), (4, 4), (3, 3), (2, 2, 2, 2)])
def test_the_first_halvings_are_there_whatever_levels_are_stored(plain_section, stored):
    """So that slides of all scanners are read alike: texture depends on the level that it is computed from."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 864, 1296), dtype=np.uint8)
    section = plain_section(pixels, scale_factors=list(stored) or None, chunks=50)
    levels = {level.downsample: level.array.compute() for level in resolve_slide(section).levels}
    there = np.cumprod([1, *stored]).tolist()
    assert list(levels) == [1, 2, 4, 8, *(factor for factor in there if factor > 8)]
    for factor in (2, 4, 8):
        if factor in there:
            expected = sd.get_pyramid_levels(section["image"], n=there.index(factor)).values
        else:
            halves = levels[factor // 2].reshape(3, 864 // factor, 2, 1296 // factor, 2)
            expected = np.floor(halves.mean((2, 4)) + 0.5)
        np.testing.assert_array_equal(levels[factor], expected)


def test_an_image_of_a_few_pixels_is_halved_as_often_as_it_can_be(plain_section):
    section = plain_section(np.zeros((3, 3, 5), np.uint8), centres=[[1, 1]])
    assert [level.downsample for level in resolve_slide(section).levels] == [1, 2]


def test_level_is_chosen_by_resolution():
    levels = tuple(Level(array=np.zeros((3, 64 // f, 64 // f), np.uint8), downsample=float(f)) for f in (1, 4, 16))
    slide = Slide("image", levels, 0.25, np.diag([0.25, 0.25, 1]))
    chosen = {mpp: slide.level_for(mpp).downsample for mpp in (0.125, 0.25, 0.5, 0.98, 0.995, 1.0, 3.9, 4.0, 100.0)}
    assert chosen == {0.125: 1, 0.25: 1, 0.5: 1, 0.98: 1, 0.995: 4, 1.0: 4, 3.9: 4, 4.0: 16, 100.0: 16}
    with pytest.raises(ScaleError, match="enlarge it 2.5-fold"):
        slide.level_for(0.1)
