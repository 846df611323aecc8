"""LazySlide's objects go into every function as they are, and what LazySlide found is used."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hespotex as hx
from hespotex.data.geometry import find_image_key, resolve_slide, shape_centres
from hespotex.errors import DataValueError, ImageFormatError, MissingKeyError, ScaleError

from ..conftest import stored
from .slides import blocks, plain_pyramid, slide_writer

wsidata = pytest.importorskip("wsidata")
OpenSlideReader = pytest.importorskip("wsidata.reader.openslide").OpenSlideReader


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 1,200 x 1,400 px at 0.5 µm/px, three levels."""
    return slide_writer().write_slide(tmp_path_factory.mktemp("slide") / "b1.svs", (1400, 1200), maker="aperio", seed=1)


@pytest.fixture
def wsi(slide_file: Path):
    opened = wsidata.open_wsi(slide_file, store=None)
    yield opened
    opened.close()


def pixels_of(slide) -> list[np.ndarray]:
    return [np.asarray(level.array) for level in slide.levels]


def square(left: float, top: float, side: float) -> Any:
    from shapely.geometry import box

    return box(left, top, left + side, top + side)


def add_tiles(wsi, corners: list[tuple[float, float]], side: float = 128.0) -> None:
    """Tissue and tiles as LazySlide leaves them."""
    import geopandas as gpd
    from spatialdata.models import ShapesModel

    wsi.shapes["tissues"] = ShapesModel.parse(gpd.GeoDataFrame({"tissue_id": [0]}, geometry=[square(100, 100, 900)]))
    frame = gpd.GeoDataFrame(
        {"tile_id": np.arange(len(corners)), "tissue_id": 0}, geometry=[square(*corner, side) for corner in corners]
    )
    wsi.shapes["tiles"] = ShapesModel.parse(frame)
    spec = {"height": side, "width": side, "mpp": 0.5, "tissue_name": "tissues"}
    wsi.attrs["tile_spec"] = {"tiles": spec}


CORNERS = [(200.0, 300.0), (328.0, 300.0), (456.0, 300.0), (600.0, 700.0), (700.0, 900.0)]


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
@pytest.mark.parametrize("attach", [False, True])
def test_its_slide_is_that_of_read_wsi(slide_file: Path, reader: str, attach: bool) -> None:
    wsi = wsidata.open_wsi(slide_file, store=None, reader=reader, attach_images=attach, attach_thumbnail=attach)
    before = stored(wsi)
    slide, expected = resolve_slide(wsi), resolve_slide(hx.io.read_wsi(slide_file))
    assert (slide.key, slide.mpp, slide.shape) == ("wsi", expected.mpp, expected.shape)
    assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
    assert all(np.array_equal(own, other) for own, other in zip(pixels_of(slide), pixels_of(expected), strict=True))
    assert stored(wsi) == before
    wsi.close()


def test_nothing_is_decoded_or_kept_to_open_it(wsi) -> None:
    with slide_writer().decoded_tiles() as counts:
        slide = resolve_slide(wsi)
        assert not counts
        np.asarray(slide.levels[0].array[:, :10, :10])
    assert list(counts) == [(0, row, column) for row in range(4) for column in range(4)]
    assert not list(wsi.images)


def test_tissue_and_tiles_of_lazyslide_are_used(wsi) -> None:
    add_tiles(wsi, CORNERS)
    centres = shape_centres(wsi, "tiles", resolve_slide(wsi))
    assert centres.tolist() == [[x + 64, y + 64] for x, y in CORNERS]
    hx.pp.embed(wsi, "morphology")
    table = wsi["morphology_tiles"]
    assert table.obs["tile_id"].tolist() == list(range(5))
    assert np.isfinite(table.obsm["X_morphology"]).all()
    before = table.obsm["X_morphology"]
    del wsi["morphology_tiles"]
    own = hx.io.read_wsi(wsi.reader.file)
    own["tiles"] = wsi["tiles"]
    hx.pp.embed(own, "morphology")
    assert np.array_equal(own["morphology_tiles"].obsm["X_morphology"], before)
    laid = hx.pp.make_tiles(wsi, pitch_um=50, copy=True)  # in LazySlide's "tissues"
    assert len(laid) == 81


def test_a_table_of_features_is_where_an_embedding_goes(wsi) -> None:
    """LazySlide names the column of regions ``library_id``, and that of ids ``tile_id``."""
    from anndata import AnnData
    from spatialdata.models import TableModel

    add_tiles(wsi, CORNERS)
    features = AnnData(np.arange(10, dtype=np.float32).reshape(5, 2))
    features.obs["library_id"] = "tiles"
    features.obs["library_id"] = features.obs["library_id"].astype("category")
    features.obs["tile_id"] = np.arange(5)
    wsi["net_tiles"] = TableModel.parse(features, region="tiles", region_key="library_id", instance_key="tile_id")
    hx.pp.embed(wsi, "rgb")
    assert wsi["net_tiles"].obsm["X_rgb"].shape[0] == 5
    assert list(wsi.tables) == ["net_tiles"]
    assert np.array_equal(wsi["net_tiles"].X, features.X)


def test_every_step_takes_it_and_it_is_written_and_opened_again(slide_file: Path, tmp_path: Path, patients) -> None:
    for sdata in patients[:2]:
        hx.pp.embed(sdata, "morphology")
    model = hx.tl.train(patients[:2], "ridge")
    wsi = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    hx.pp.detect_tissue(wsi)
    hx.pp.make_tiles(wsi, pitch_um=100, diameter_um=55)
    hx.pp.segment_nuclei(wsi)
    assert len(wsi["nuclei"]) > 100
    hx.tl.predict(wsi, model)
    own = hx.io.read_wsi(slide_file)
    own["tiles"] = wsi["tiles"]
    hx.tl.predict(own, model)
    predicted = np.asarray(wsi["ridge_tiles"].X)
    assert predicted.shape == (len(wsi["tiles"]), len(model.genes))
    assert np.array_equal(predicted, np.asarray(own["ridge_tiles"].X))
    wsi.write()
    wsi.close()
    again = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    assert not list(again.images)
    hx.tl.predict(again, model, key_added="second")
    assert np.array_equal(again["second_tiles"].X, predicted)
    again.close()


def test_all_that_is_found_on_it_is_written_over_a_store_and_persisted(
    slide_file: Path, tmp_path: Path, section
) -> None:
    """A raster of nuclei and a lazy image are among it."""
    wsi = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    wsi.write()
    add_tiles(wsi, CORNERS)
    hx.pp.segment_nuclei(wsi)
    hx.pp.qc(wsi)
    hx.pp.normalize_stain(wsi, reference=section)
    labels, pixels = wsi["nuclei_labels"].values, wsi["wsi_normalized"]["scale1"]["image"].values
    wsi.write()
    hx.pp.embed(wsi, "rgb", image_key="wsi_normalized")
    hx.io.persist(wsi)
    wsi.close()
    again = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    assert np.array_equal(again["nuclei_labels"].values, labels)
    assert np.array_equal(again["wsi_normalized"]["scale1"]["image"].values, pixels)
    assert {"nuclei_features", "rgb_tiles"} <= set(again.tables)
    assert again["tiles"]["qc_pass"].dtype == bool
    assert set(again.attrs["hespotex"]) == {"qc", "stain"}
    again.close()


def test_a_prediction_on_it_is_drawn_over_the_slide(wsi, patients) -> None:
    from matplotlib import pyplot as plt

    for sdata in patients[:2]:
        hx.pp.embed(sdata, "rgb")
    add_tiles(wsi, CORNERS)
    model = hx.tl.train(patients[:2], "ridge", embedding_key="X_rgb")
    hx.tl.predict(wsi, model)
    hx.pl.spatial(wsi, model.genes[0], key="ridge")
    (image,) = [drawn for ax in plt.gcf().axes for drawn in ax.images][:1]
    assert np.ptp(np.asarray(image.get_array())[..., :3]) > 0.2
    plt.close("all")


def test_the_scale_is_what_the_user_set_else_what_the_file_states(slide_file: Path, tmp_path: Path) -> None:
    wsi = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    add_tiles(wsi, CORNERS)
    assert resolve_slide(wsi).mpp == pytest.approx(0.5)
    wsi.set_mpp(0.25)
    assert resolve_slide(wsi).mpp == 0.25
    hx.pp.set_scale(wsi, mpp=0.4)
    assert wsi.properties.mpp == 0.4
    assert resolve_slide(wsi).mpp == 0.4
    wsi.write()
    again = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    assert resolve_slide(again).mpp == 0.4
    assert shape_centres(again, "tiles", resolve_slide(again))[0].tolist() == [264, 364]


def test_an_unknown_scale_is_an_error_until_it_is_set(tmp_path: Path) -> None:
    plain_pyramid(tmp_path / "slide.tif", blocks(600, 700), mpp=None)
    wsi = wsidata.open_wsi(tmp_path / "slide.tif", store=None)
    with pytest.raises(ScaleError, match=r"pixel size of image 'wsi' is unknown.*set_scale"):
        resolve_slide(wsi)
    hx.pp.set_scale(wsi, mpp=0.5)
    assert resolve_slide(wsi).mpp == 0.5


def test_scales_of_x_and_y_must_agree(tmp_path: Path) -> None:
    """wsidata keeps one of them."""
    plain_pyramid(
        tmp_path / "slide.tif", blocks(600, 700), mpp=None, resolution=(20_000, 15_000), resolutionunit="CENTIMETER"
    )
    wsi = wsidata.open_wsi(tmp_path / "slide.tif", store=None)
    with pytest.raises(ScaleError, match="in x and"):
        resolve_slide(wsi)
    wsi.set_mpp(0.58)
    assert resolve_slide(wsi).mpp == 0.58


def test_slides_of_other_readers_are_read_through_them(tmp_path: Path) -> None:
    """A format that neither tifffile nor openslide knows."""
    from hespotex.image.files import RegionLevel

    pixels = blocks(1100, 1300)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=2)

    class Other(OpenSlideReader):
        name = "other"

    wsi = wsidata.WSIData(reader=Other(tmp_path / "slide.tif"))
    slide = resolve_slide(wsi)
    assert slide.mpp == 0.5
    for level, factor in zip(slide.levels[:2], (1, 2), strict=True):
        assert np.array_equal(np.moveaxis(np.asarray(level.array), 0, -1), pixels[::factor, ::factor])
    assert any(isinstance(value, RegionLevel) for value in slide.levels[0].array.dask.values())


def test_damage_that_another_reader_meets_is_named(tmp_path: Path) -> None:
    class Broken(OpenSlideReader):
        name = "broken"

        def get_region(self, *place: Any, **options: Any) -> np.ndarray:
            raise LookupError("no such stripe")

    plain_pyramid(tmp_path / "slide.tif", blocks(1100, 1300), levels=2)
    slide = resolve_slide(wsidata.WSIData(reader=Broken(tmp_path / "slide.tif")))
    with pytest.raises(ImageFormatError, match=r"slide\.tif.*x=1024, y=0 of level 0.*no such stripe"):
        slide.levels[0].array.blocks[0, 0, 1].compute()


def test_its_lazy_levels_travel(wsi) -> None:
    level = resolve_slide(wsi).levels[1].array
    assert np.array_equal(pickle.loads(pickle.dumps(level)).compute(), level.compute())


def test_another_image_of_it_is_taken_by_name(wsi) -> None:
    from spatialdata.models import Image2DModel

    wsi.images["stained"] = Image2DModel.parse(np.full((3, 1400, 1200), 9, np.uint8), dims=("c", "y", "x"))
    assert find_image_key(wsi) == "wsi"
    slide = resolve_slide(wsi, image_key="stained")
    assert slide.mpp == pytest.approx(0.5)  # as large as the slide: its pixels
    assert (np.asarray(slide.levels[0].array) == 9).all()
    with pytest.raises(MissingKeyError, match="none"):
        find_image_key(wsi, "none")


def test_one_made_from_our_own_object(slide_file: Path) -> None:
    own = hx.io.read_wsi(slide_file)
    wsi = wsidata.open_wsi(own, image_key="image")
    assert find_image_key(wsi) == "image"
    slide, expected = resolve_slide(wsi), resolve_slide(own)
    assert (slide.key, slide.mpp) == ("image", expected.mpp)
    add_tiles(wsi, CORNERS)
    hx.pp.embed(wsi, "rgb")
    assert wsi["rgb_tiles"].n_obs == 5


def test_a_slide_that_is_gone(tmp_path: Path) -> None:
    plain_pyramid(tmp_path / "slide.tif", blocks(600, 700))
    wsi = wsidata.open_wsi(tmp_path / "slide.tif", store=None)
    (tmp_path / "slide.tif").unlink()
    with pytest.raises(DataValueError, match=r"the slide of this WSIData is gone.*slide\.tif"):
        resolve_slide(wsi)


def test_a_store_without_its_slide_says_how_to_open_it(slide_file: Path, tmp_path: Path) -> None:
    import spatialdata as sd

    wsi = wsidata.open_wsi(slide_file, store=str(tmp_path / "b1.zarr"))
    add_tiles(wsi, CORNERS)
    wsi.write()
    with pytest.raises(MissingKeyError, match=r"wsidata\.open_wsi"):
        resolve_slide(sd.read_zarr(tmp_path / "b1.zarr"))


@pytest.mark.data
def test_the_real_slide_from_lazyslide_to_genes(data_dir: Path, tmp_path: Path, patients) -> None:
    lazyslide = pytest.importorskip("lazyslide")
    source = data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs"
    shutil.copy(source, tmp_path / "cmu.svs")  # the store lies beside it
    wsi = wsidata.open_wsi(tmp_path / "cmu.svs")
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, 128, mpp=0.5)
    hx.pp.embed(wsi, "morphology")
    table = wsi["morphology_tiles"]
    assert table.n_obs == len(wsi["tiles"]) > 50
    assert np.isfinite(table.obsm["X_morphology"]).all()
    for sdata in patients[:2]:
        hx.pp.embed(sdata, "morphology")
    model = hx.tl.train(patients[:2], "ridge")
    hx.tl.predict(wsi, model)
    assert wsi["ridge_tiles"].shape == (table.n_obs, len(model.genes))
    assert len(hx.pp.make_tiles(wsi, copy=True)) > 5  # in its "tissues"
    wsi.write()
    again = wsidata.open_wsi(tmp_path / "cmu.svs")
    assert {"morphology_tiles", "ridge_tiles"} <= set(again.tables)
    assert resolve_slide(again).mpp == pytest.approx(0.499)
    assert lazyslide.pp.tile_tissues(again, 256, mpp=0.5, key_added="large") is None
    hx.pp.embed(again, "rgb", shapes_key="large")
    assert again["rgb_large"].n_obs == len(again["large"])
