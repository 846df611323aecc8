"""Tissue and tiles on a painted slide."""

from __future__ import annotations

import numpy as np
import pytest
from geopandas import GeoDataFrame
from shapely import box
from spatialdata.models import Labels2DModel, ShapesModel
from spatialdata.transformations import Affine, Scale, get_transformation

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres, shape_geometries, shape_radius
from hespotex.data.lattice import detect_lattice
from hespotex.errors import DataValueError, GeometryError, MissingKeyError

from ..conftest import stored

TURNED = Affine(np.array([[0, -1, 900], [1, 0, 0], [0, 0, 1]]), ("x", "y"), ("x", "y"))


@pytest.fixture
def slide_with_tissue(plain_section):
    """A disk of 400 px radius (2 µm/px: 800 µm) on lilac glass."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:1000, :1200]
    disk = (x - 700) ** 2 + (y - 500) ** 2 < 400**2
    pixels = np.where(disk[None], np.reshape((150, 90, 160), (3, 1, 1)), np.reshape((233, 216, 232), (3, 1, 1)))
    pixels = (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)

    def make(**options):
        return plain_section(pixels, mpp=2.0, table=False, centres=[[700, 500]], **options)

    return make


@pytest.mark.parametrize("options", [{}, {"scale_factors": [2, 2]}, {"to_global": TURNED}])
def test_tissue_is_outlined(slide_with_tissue, options):
    sdata = slide_with_tissue(**options)
    hx.pp.detect_tissue(sdata)
    slide = resolve_slide(sdata)
    outline = shape_geometries(sdata, "tissue", slide).iloc[0]
    assert len(sdata["tissue"]) == 1
    assert outline.centroid.coords[0] == pytest.approx((700, 500), abs=5)
    assert outline.area == pytest.approx(np.pi * 400**2, rel=0.05)
    assert sdata["tissue"]["area_um2"].iloc[0] == pytest.approx(outline.area * slide.mpp**2, rel=1e-6)
    assert set(get_transformation(sdata["tissue"], get_all=True)) == set(
        get_transformation(sdata["image"], get_all=True)
    )


def test_outlines_can_be_returned(slide_with_tissue):
    sdata = slide_with_tissue()
    assert len(hx.pp.detect_tissue(sdata, copy=True)) == 1
    assert "tissue" not in sdata.shapes


def test_a_slide_without_tissue(plain_section):
    bare = plain_section(np.full((3, 600, 600), 240, np.uint8), mpp=2.0)
    with pytest.raises(GeometryError, match="no stained tissue"):
        hx.pp.detect_tissue(bare)
    with pytest.raises(MissingKeyError, match="detect_tissue"):
        hx.pp.make_tiles(bare)
    with pytest.raises(DataValueError, match="negative"):
        hx.pp.detect_tissue(bare, min_area_um2=-1)


@pytest.mark.parametrize("lattice", ["square", "hex"])
def test_tiles_lie_on_the_lattice_in_tissue(slide_with_tissue, lattice):
    sdata = slide_with_tissue(to_global=Scale([3, 3], axes=("x", "y")))
    hx.pp.set_scale(sdata, mpp=2.0)
    hx.pp.detect_tissue(sdata)
    hx.pp.make_tiles(sdata, diameter_um=55, pitch_um=100, lattice=lattice)
    slide, tiles = resolve_slide(sdata), sdata["tiles"]
    centres = shape_centres(sdata, "tiles", slide)
    found = detect_lattice(slide.microns(centres))
    assert found.kind == lattice
    assert found.pitch == pytest.approx(100)
    assert shape_radius(sdata, "tiles", slide) == pytest.approx(27.5)
    assert (np.hypot(*(centres - (700, 500)).T) < 420).all()
    density = len(tiles) * 100**2 * (1 if lattice == "square" else np.sqrt(3) / 2)
    assert density == pytest.approx(np.pi * 800**2, rel=0.1)
    assert tiles["tile_id"].tolist() == tiles.index.tolist() == list(range(len(tiles)))


def test_tissue_of_other_tools(slide_with_tissue):
    sdata = slide_with_tissue()
    expected = ShapesModel.parse(
        GeoDataFrame(geometry=[box(300, 200, 700, 600)]),
        transformations=get_transformation(sdata["image"], get_all=True),
    )
    sdata["tissues"] = expected
    named = hx.pp.make_tiles(sdata, copy=True)
    del sdata.shapes["tissues"]
    mask = np.zeros((500, 600), int)
    mask[100:300, 150:350] = 7
    half = {name: Affine(matrix, ("x", "y"), ("x", "y")) for name, matrix in _doubled(sdata).items()}
    sdata["image_tissue"] = Labels2DModel.parse(mask, dims=("y", "x"), transformations=half)
    masked = hx.pp.make_tiles(sdata, copy=True)
    assert len(named) == 4 * 4
    assert masked.geometry.geom_equals(named.geometry).all()


def _doubled(sdata) -> dict[str, np.ndarray]:
    """Transformations of the image, for an element of half its resolution."""
    known = get_transformation(sdata["image"], get_all=True)
    return {name: t.to_affine_matrix(("x", "y"), ("x", "y")) @ np.diag([2, 2, 1]) for name, t in known.items()}


def test_tiles_under_a_table_are_not_replaced(slide_with_tissue):
    sdata = slide_with_tissue()
    hx.pp.detect_tissue(sdata)
    hx.pp.make_tiles(sdata, pitch_um=300)
    hx.pp.make_tiles(sdata, pitch_um=200)
    hx.pp.embed(sdata, "morphology", shapes_key="tiles")
    hx.pp.make_tiles(sdata, pitch_um=200)
    with pytest.raises(GeometryError, match="morphology_tiles"):
        hx.pp.make_tiles(sdata, pitch_um=300)
    hx.pp.make_tiles(sdata, pitch_um=300, key_added="coarse")


def test_what_others_made_is_not_replaced(slide_with_tissue):
    sdata = slide_with_tissue()
    hx.pp.detect_tissue(sdata)
    hx.pp.detect_tissue(sdata)
    for step, names in ((hx.pp.detect_tissue, ("spots", "image", "Spots")), (hx.pp.make_tiles, ("tissue", "image"))):
        for name in names:
            before = stored(sdata)
            with pytest.raises(DataValueError, match=rf"key_added='{name}' would replace .* did not make"):
                step(sdata, key_added=name)
            assert stored(sdata) == before


def test_a_slide_smaller_than_a_tile(slide_with_tissue):
    """The tile is what does not fit, whatever the pitch."""
    sdata = slide_with_tissue()
    slide = resolve_slide(sdata)
    too_large = min(slide.shape) * slide.mpp + 1
    before = set(sdata.shapes)
    height, width = slide.shape
    with pytest.raises(
        GeometryError, match=f"smaller than one tile: {width} x {height} px .*set_scale.*lower diameter_um"
    ):
        hx.pp.make_tiles(sdata, diameter_um=too_large, pitch_um=50)
    assert set(sdata.shapes) == before


def test_arguments(slide_with_tissue):
    sdata = slide_with_tissue()
    hx.pp.detect_tissue(sdata)
    for options in ({"pitch_um": 0}, {"diameter_um": -1}, {"lattice": "tri"}):
        with pytest.raises(DataValueError):
            hx.pp.make_tiles(sdata, **options)
    with pytest.raises(MissingKeyError, match="'nope'"):
        hx.pp.make_tiles(sdata, shapes_key="nope")
    with pytest.raises(GeometryError, match="no tile"):
        hx.pp.make_tiles(sdata, pitch_um=50_000)


def test_a_lattice_too_fine_for_memory_is_refused(slide_with_tissue):
    sdata = slide_with_tissue()
    with pytest.raises(DataValueError, match=r"pitch_um=0\.001: a lattice over the slide would have .* places"):
        hx.pp.make_tiles(sdata, pitch_um=0.001)
