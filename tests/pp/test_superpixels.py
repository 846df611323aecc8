"""A grid of cells on tissue."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from geopandas import GeoDataFrame
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import DataValueError, GeometryError, MissingKeyError, ScaleError


def slide(outline, size_px=400, mpp=0.5):
    sdata = hx.datasets.synthetic(size_px=size_px, mpp=mpp, with_expression=False, seed=1)
    sdata["tissue"] = ShapesModel.parse(
        GeoDataFrame(geometry=[outline]), transformations=get_transformation(sdata["image"], get_all=True)
    )
    return sdata


def test_cells_cover_the_tissue_and_nothing_else():
    outline = shapely.Point(190, 210).buffer(150)
    sdata = slide(outline)
    hx.pp.superpixels(sdata)
    cells = sdata["superpixels"]
    assert cells.union_all().difference(outline.buffer(1e-6)).area == pytest.approx(0, abs=1e-6)
    assert cells.area.sum() == pytest.approx(outline.area, rel=2e-3)  # slivers are left out
    assert cells.area.max() == pytest.approx(16**2)
    assert (cells.area > 0.05 * 16**2).all()
    assert list(cells["superpixel_id"]) == list(cells.index) == list(range(len(cells)))


def test_rows_and_columns_are_places_on_the_grid():
    sdata = slide(shapely.box(0, 0, 400, 400))
    hx.pp.superpixels(sdata, 20)
    cells = sdata["superpixels"]
    assert len(cells) == 100
    np.testing.assert_allclose(cells.bounds[["minx", "miny"]], cells[["col", "row"]] * 40.0)
    assert (cells["size_um"] == 20).all()


def test_the_grid_does_not_depend_on_the_tissue():
    whole, part = slide(shapely.box(0, 0, 400, 400)), slide(shapely.box(160, 96, 400, 400))
    for sdata in (whole, part):
        hx.pp.superpixels(sdata)
    at = whole["superpixels"].set_index(["row", "col"])
    for (row, column), cell in part["superpixels"].set_index(["row", "col"]).iterrows():
        assert cell.geometry.equals(at.loc[(row, column)].geometry)


def test_tissue_that_leaves_lines_where_it_touches_cells_is_taken_as_areas():
    touching = shapely.MultiPolygon([shapely.box(0, 0, 16, 32), shapely.Polygon([(16, 16), (32, 16), (32, 24)])])
    sdata = slide(touching)
    hx.pp.superpixels(sdata)
    assert set(sdata["superpixels"].geom_type) <= {"Polygon", "MultiPolygon"}


@pytest.mark.filterwarnings("ignore:image .* has 5 µm:hespotex.errors.HespotexWarning")
def test_an_image_too_coarse_is_refused_with_the_size_it_allows():
    sdata = slide(shapely.box(0, 0, 400, 400), mpp=5.0)
    with pytest.raises(ScaleError, match=r"smallest cells it allows are size_um=10"):
        hx.pp.superpixels(sdata, 8)
    hx.pp.superpixels(sdata, 10)


def test_missing_or_misplaced_tissue_is_named():
    bare = hx.datasets.synthetic(size_px=400, with_expression=False)
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.detect_tissue"):
        hx.pp.superpixels(bare)
    with pytest.raises(GeometryError, match="does not lie on image"):
        hx.pp.superpixels(slide(shapely.box(900, 900, 950, 950)))
    with pytest.raises(GeometryError, match="no cell of 100 µm"):
        hx.pp.superpixels(slide(shapely.box(10, 10, 12, 12)), 100)
    with pytest.raises(DataValueError, match="size_um"):
        hx.pp.superpixels(bare, -1)


def test_what_others_made_is_not_replaced():
    sdata = slide(shapely.box(0, 0, 400, 400))
    sdata["superpixels"] = sdata["tissue"]
    with pytest.raises(DataValueError, match="superpixels did not make"):
        hx.pp.superpixels(sdata)
    cells = hx.pp.superpixels(sdata, copy=True)
    assert len(cells) == 625


def test_cells_under_a_table_are_not_exchanged():
    sdata = slide(shapely.box(0, 0, 400, 400))
    hx.pp.superpixels(sdata, 20)
    hx.pp.embed(sdata, "morphology", shapes_key="superpixels", tile_um=40, progress_bar=False)
    hx.pp.superpixels(sdata, 20)  # the same again
    with pytest.raises(GeometryError, match="would fit the new ones no more"):
        hx.pp.superpixels(sdata, 10)


@pytest.mark.parametrize(("encoder", "cells"), [("rgb", 1), ("morphology", 2)])
def test_tiles_of_superpixels_follow_their_size(section, encoder, cells):
    hx.pp.detect_tissue(section)
    hx.pp.superpixels(section, 20)
    found = hx.pp.embed(section, encoder, shapes_key="superpixels", copy=True, progress_bar=False)
    expected = hx.pp.embed(
        section, encoder, shapes_key="superpixels", tile_um=20 * cells, copy=True, progress_bar=False
    )
    np.testing.assert_array_equal(found, expected)
    at_spots = hx.pp.embed(section, encoder, shapes_key="spots", copy=True, progress_bar=False)
    own = hx.encoders.create(encoder).tile_um
    again = hx.pp.embed(section, encoder, shapes_key="spots", tile_um=own, copy=True, progress_bar=False)
    np.testing.assert_array_equal(at_spots, again)
