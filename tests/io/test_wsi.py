"""Whole slides: formats, levels, laziness, and every way in which a file can be broken."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.errors import DataValueError, HespotexWarning, ImageFormatError, MissingDependencyError, ScaleError
from hespotex.image.files import open_picture
from hespotex.image.files._cache import halve
from hespotex.image.files._slices import span
from hespotex.io._open import open_slide

from .slides import blocks, plain_pyramid, slide_writer, write_scn


def levels_of(sdata) -> list:
    image = sdata["image"]
    return [level["image"] for level in image.children.values()] if hasattr(image, "children") else [image]


def rgb(level) -> np.ndarray:
    return np.moveaxis(np.asarray(level), 0, -1)


def mpp_of(sdata) -> float:
    return float(get_transformation(sdata["image"], "microns").scale[0])


@pytest.fixture
def own_cache(tmp_path: Path):
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"


@pytest.fixture(scope="module")
def slides() -> Any:
    return slide_writer()


@pytest.fixture(scope="module")
def written(slides: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A slide of each kind that the benchmarks write."""
    folder = tmp_path_factory.mktemp("written")
    return {
        maker: slides.write_slide(folder / name, (1500, 2301), mpp=0.25, maker=maker, levels=3, tile_px=tile, seed=3)
        for maker, name, tile in (("plain", "plain.tif", 256), ("aperio", "aperio.svs", 240))
    }


# formats


@pytest.mark.parametrize("maker", ["plain", "aperio"])
def test_written_slides_open_in_every_library_with_the_same_pixels(written: dict[str, Path], maker: str) -> None:
    path = written[maker]
    sizes = [(1500, 2301), (750, 1150), (375, 575)]
    with tifffile.TiffFile(path) as tiff:
        stored = [level.asarray() for level in tiff.series[0].levels]
    sdata = hx.io.read_wsi(path)
    assert mpp_of(sdata) == pytest.approx(0.25)
    assert [level.shape[1:] for level in levels_of(sdata)] == sizes
    assert all(np.array_equal(rgb(level), pixels) for level, pixels in zip(levels_of(sdata), stored, strict=True))
    for library, opened in (("openslide", openslide.OpenSlide(path)), ("tiffslide", tiffslide.TiffSlide(path))):
        with opened:
            assert [size[::-1] for size in opened.level_dimensions] == sizes
            assert float(opened.properties[f"{library}.mpp-x"]) == pytest.approx(0.25)
            pixels = np.asarray(opened.read_region((0, 0), 0, opened.dimensions))[..., :3]
            assert np.array_equal(pixels, stored[0]), library
    assert [level.downsample for level in resolve_slide(sdata).levels] == [1, 2, 4, 8]


def test_written_slides_are_tissue_on_glass(written: dict[str, Path], slides: Any, tmp_path: Path) -> None:
    sdata = hx.io.read_wsi(written["plain"])
    image = rgb(levels_of(sdata)[0])
    stained = image.min(axis=2) < 215
    assert 0.35 < stained.mean() < 0.75
    coarse = rgb(levels_of(sdata)[1])
    halved = np.moveaxis(halve(np.moveaxis(image, -1, 0)), 0, -1)[:750, :1150]
    assert np.abs(coarse.astype(int) - halved).mean() < 6  # each coded by JPEG once
    again = slides.write_slide(tmp_path / "again.tif", (1500, 2301), mpp=0.25, levels=3, seed=3)
    assert again.read_bytes() == written["plain"].read_bytes()


def test_ome_tiff_with_levels_in_sub_ifds(tmp_path: Path) -> None:
    pixels = blocks(1100, 1300)
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(
            pixels,
            photometric="rgb",
            tile=(128, 128),
            subifds=1,
            metadata={"axes": "YXS", "PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3},
        )
        tiff.write(pixels[::2, ::2], photometric="rgb", tile=(128, 128), subfiletype=1)
    sdata = hx.io.read_wsi(path)
    assert mpp_of(sdata) == pytest.approx(0.3)
    assert all(np.array_equal(rgb(level), pixels[::f, ::f]) for level, f in zip(levels_of(sdata), (1, 2), strict=True))


def test_ome_tiff_with_a_page_per_channel(tmp_path: Path) -> None:
    pixels = blocks(300, 400)
    path = tmp_path / "slide.ome.tif"
    tifffile.imwrite(
        path, np.moveaxis(pixels, -1, 0), ome=True, photometric="minisblack", tile=(128, 128), metadata={"axes": "CYX"}
    )
    assert np.array_equal(rgb(levels_of(hx.io.read_wsi(path, mpp=1.0))[0]), pixels)


@pytest.mark.parametrize("photometric", ["ycbcr", "cielab", "separated", "miniswhite"])
@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 50, "compression": "lzw"}])
def test_colours_other_than_rgb_are_refused(tmp_path: Path, photometric: str, options: dict[str, Any]) -> None:
    path = tmp_path / "slide.tif"
    channels = 4 if photometric == "separated" else 3
    pixels = np.full((100, 120, channels), 255, np.uint8)
    tifffile.imwrite(path, pixels, photometric=photometric, planarconfig="contig", metadata=None, **options)
    with pytest.raises(ImageFormatError, match=rf"holds colours as {photometric.upper()} .*convert\('RGB'\)"):
        open_picture(path)


def test_ycbcr_is_read_where_the_decoder_turns_it_into_rgb(tmp_path: Path) -> None:
    pixels = np.kron(blocks(8, 8), np.ones((32, 32, 1), np.uint8))
    path = tmp_path / "slide.tif"
    options = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    tifffile.imwrite(path, pixels, tile=(64, 64), **options)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    assert np.array_equal(rgb(open_picture(path).levels[0]), expected)
    tifffile.imwrite(tmp_path / "strips.tif", pixels, rowsperstrip=64, **options)
    assert np.array_equal(rgb(open_picture(tmp_path / "strips.tif").levels[0]), expected)
    planes = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(path, planes, photometric="ycbcr", planarconfig="separate", tile=(64, 64), compression="jpeg")
    with pytest.raises(ImageFormatError, match="YCBCR"):
        open_picture(path)
    tifffile.imwrite(path, pixels, photometric="ycbcr", tile=(64, 64), compression="jpeg2000", metadata=None)
    with pytest.raises(ImageFormatError, match="YCBCR .compression JPEG2000"):
        open_picture(path)


def test_the_slide_is_the_largest_image_and_has_its_own_scale(tmp_path: Path) -> None:
    thumbnail, pixels = blocks(60, 80), blocks(600, 900, seed=1)
    path = tmp_path / "slide.tif"
    for strips in ({"tile": (256, 256)}, {"rowsperstrip": 64}):
        with tifffile.TiffWriter(path) as tiff:
            common = {"photometric": "rgb", "resolutionunit": "CENTIMETER"}
            tiff.write(thumbnail, resolution=(2500, 2500), **common)
            tiff.write(pixels, resolution=(20_000, 20_000), **strips, **common)
        with warnings.catch_warnings():
            warnings.simplefilter("error", HespotexWarning)
            sdata = hx.io.read_wsi(path)
        assert mpp_of(sdata) == pytest.approx(0.5)
        assert np.array_equal(rgb(levels_of(sdata)[0]), pixels)
    level = pickle.loads(pickle.dumps(open_picture(path).levels[0]))
    assert np.array_equal(rgb(level.compute()), pixels)


@pytest.mark.parametrize("macro_px", [300, 1200])  # a macro image may be larger than a small scan
def test_ome_tiff_whose_macro_image_comes_first(tmp_path: Path, macro_px: int) -> None:
    pixels = blocks(600, 900)
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, image, mpp in (("macro image", blocks(macro_px, macro_px), 8.0), ("Macrophages", pixels, 0.3)):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            levels = {"subifds": 1} if image is pixels else {}
            tiff.write(image, photometric="rgb", tile=(128, 128), metadata=metadata, **levels)
        tiff.write(pixels[::2, ::2], photometric="rgb", tile=(128, 128), subfiletype=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HespotexWarning)
        sdata = hx.io.read_wsi(path)
    assert mpp_of(sdata) == pytest.approx(0.3)
    assert all(np.array_equal(rgb(level), pixels[::f, ::f]) for level, f in zip(levels_of(sdata), (1, 2), strict=True))


def test_several_sections_in_a_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "sections.tif"
    sections = [blocks(600, 900), blocks(700, 900, seed=1), blocks(300, 300, seed=2)]
    with tifffile.TiffWriter(path) as tiff:
        for section in sections:
            tiff.write(section, photometric="rgb", tile=(256, 256))
    with pytest.warns(
        HespotexWarning, match="series 1 of 900 x 700 px is read, and not series 0 of 900 x 600 px"
    ) as told:
        sdata = hx.io.read_wsi(path, mpp=1.0)
    assert [warning.filename for warning in told] == [__file__]
    assert np.array_equal(rgb(levels_of(sdata)[0]), sections[1])
    other = tmp_path / "other.tif"  # as the warning says
    tifffile.imwrite(other, tifffile.imread(path, series=0), photometric="rgb", tile=(512, 512))
    assert np.array_equal(rgb(open_picture(other).levels[0]), sections[0])


def test_sections_of_one_size_are_a_stack_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "sections.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(blocks(60, 60), photometric="rgb", metadata=None)
        for seed in range(2):
            tiff.write(blocks(600, 900, seed=seed), photometric="rgb", tile=(256, 256), metadata=None)
    with pytest.raises(
        ImageFormatError, match=r"axes 'IYXS' of shape \(2, 600, 900, 3\).*Take one of its images.*key=1\)"
    ):
        open_picture(path)


def test_leica_slide_through_openslide(tmp_path: Path) -> None:
    pixels = blocks(1100, 1400)
    path = tmp_path / "slide.scn"
    write_scn(path, pixels, mpp=0.5, left=320, top=192)
    assert openslide.OpenSlide.detect_format(path) == "leica"
    sdata = hx.io.read_wsi(path)
    assert mpp_of(sdata) == pytest.approx(0.5)
    finest, coarse = levels_of(sdata)
    assert finest.shape == (3, 1100 + 2 * 192, 1400 + 2 * 320)
    whole = np.full((*finest.shape[1:], 3), 255, np.uint8)  # glass that was not scanned is white
    whole[192 : 192 + 1100, 320 : 320 + 1400] = pixels
    assert np.array_equal(rgb(finest), whole)
    assert np.array_equal(rgb(coarse)[96:646, 160:860], pixels[::2, ::2])
    assert [level.downsample for level in resolve_slide(sdata).levels] == [1, 2, 4, 8]


@pytest.mark.parametrize("factors", [(1,), (1, 4), (1, 4, 16), (1, 3, 9)])
def test_features_do_not_depend_on_the_levels_that_a_scanner_stores(tmp_path: Path, factors: tuple[int, ...]) -> None:
    pixels = blocks(1152, 1440)

    def features(stored: tuple[int, ...]) -> np.ndarray:
        path = tmp_path / f"{len(stored)}-{stored[-1]}.tif"
        with tifffile.TiffWriter(path) as file:
            for factor in stored:
                squares = pixels.reshape(1152 // factor, factor, 1440 // factor, factor, 3)
                level = np.floor(squares.mean((1, 3)) + 0.5).astype(np.uint8)
                file.write(level, tile=(256, 256), photometric="rgb", subfiletype=int(factor > 1), metadata=None)
        slide = resolve_slide(hx.io.read_wsi(path, mpp=0.5))
        centres = np.array([[400.0, 400], [1000, 700]])
        encoder = hx.encoders.create("morphology", tile_um=100)
        found = np.empty((2, encoder.n_features), np.float32)
        for rows, values in encoder.embed(slide, centres, batch_size=8, device="cpu", progress_bar=False):
            found[rows] = values
        return found

    # a level of fours that was averaged at once, and not by halves, is rounded once and not twice
    np.testing.assert_allclose(features(factors), features((1, 2, 4)), atol=0 if 4 not in factors else 1e-3)


class _OpenSlideStub:
    """The part of openslide's interface that is used, for a format of which there is no file here."""

    level_dimensions = ((2501, 1999), (1250, 999), (625, 499), (300, 200))
    level_downsamples = (1.0, 2.0009005, 4.0040060, 8.4)
    properties = {
        "openslide.mpp-x": "0.23",
        "openslide.mpp-y": "0.2301",
        "openslide.objective-power": "40",
        "openslide.background-color": "FF0080",
        "openslide.level[0].tile-width": "256",
        "openslide.level[0].tile-height": "240",
    }
    regions: list[Any]
    broken = False

    def __init__(self, path: Path) -> None:
        type(self).regions = []

    def set_cache(self, cache: Any) -> None: ...

    def read_region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        from PIL import Image

        if self.broken:
            raise openslide.OpenSlideError("Restart marker not found in expected place")
        self.regions.append((corner, level, size))
        width, height = size
        pixels = np.zeros((height, width, 4), np.uint8)
        step = self.level_downsamples[level]
        pixels[..., 0] = ((corner[0] / step + np.arange(width) + 0.5)[None] // 16).astype(int) % 256
        pixels[..., 1] = ((corner[1] / step + np.arange(height) + 0.5)[:, None] // 16).astype(int) % 256
        pixels[..., 3] = 255
        pixels[:4, :, 3] = 0
        pixels[4:8, :, 3] = 51
        return Image.fromarray(pixels)


@pytest.fixture
def mirax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is taken for a MIRAX slide."""
    monkeypatch.setattr(openslide, "OpenSlide", _OpenSlideStub)
    path = tmp_path / "slide.mrxs"
    path.write_bytes(b"\xff\xd8\xff a preview, by the way")
    return path


def test_what_only_openslide_reads_goes_there(mirax: Path) -> None:
    sdata = hx.io.read_wsi(mirax)
    assert mpp_of(sdata) == pytest.approx(0.23005, rel=1e-3)
    levels = levels_of(sdata)
    assert [level.shape[1:] for level in levels] == [(1999, 2501), (999, 1250), (499, 625)]  # the last is no fraction
    assert levels[0].data.chunks[1:] == ((960, 960, 79), (1024, 1024, 453))  # whole tiles
    block = rgb(levels[0][:, 960:1000, 1024:1100])
    assert _OpenSlideStub.regions == [((1024, 960), 0, (1024, 960))]
    assert block[20, 20].tolist() == [(1024 + 20) // 16, (960 + 20) // 16, 0]
    assert block[0, 0].tolist() == [255, 0, 128]  # nothing there: the background
    assert block[5, 20].tolist() == [
        (65 * 51 + 255 * 204 + 127) // 255,
        (60 * 51 + 127) // 255,
        (128 * 204 + 127) // 255,
    ]
    coarse = rgb(levels[2])
    assert coarse[300, 400].tolist() == [400 // 16, 300 // 16, 0]


def test_a_lazy_slide_of_openslide_travels(mirax: Path) -> None:
    level = levels_of(hx.io.read_wsi(mirax))[1].data
    copy = pickle.loads(pickle.dumps(level))
    assert np.array_equal(copy.compute(), level.compute())
    assert level.name == levels_of(hx.io.read_wsi(mirax))[1].data.name


def test_damage_that_openslide_meets_while_reading(mirax: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = levels_of(hx.io.read_wsi(mirax))[0].data
    with monkeypatch.context() as patch:
        patch.setattr(_OpenSlideStub, "broken", True)
        with pytest.raises(ImageFormatError, match=r"slide\.mrxs.*x=1024, y=960 of level 0.*Restart marker"):
            level.blocks[0, 1, 1].compute(scheduler="threads")
    assert level.blocks[0, 1, 1].compute().shape == (3, 960, 1024)  # an OpenSlide that failed once is not used again


def test_mirax_without_its_folder_and_its_folder_without_the_file(tmp_path: Path) -> None:
    (tmp_path / "slide.mrxs").write_bytes(b"anything")
    with pytest.raises(ImageFormatError, match=r"a folder 'slide' beside it, which is not there"):
        hx.io.read_wsi(tmp_path / "slide.mrxs")
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "Slidedat.ini").write_text("[GENERAL]\n")
    with pytest.raises(DataValueError, match=r"whose own file is 'slide\.mrxs': pass that"):
        hx.io.read_wsi(tmp_path / "slide")
    with pytest.raises(ImageFormatError, match=r"slide\.mrxs"):
        hx.io.read_wsi(tmp_path / "slide.mrxs")


def test_without_openslide_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scn(tmp_path / "slide.scn", blocks(600, 600), mpp=0.5, left=32, top=32)
    (tmp_path / "slide.mrxs").write_bytes(b"anything")
    (tmp_path / "notes.txt").write_bytes(b"hello")
    plain_pyramid(tmp_path / "slide.tif", blocks(600, 600))
    monkeypatch.setitem(sys.modules, "openslide", None)
    for name, maker in (("slide.scn", "Leica"), ("slide.mrxs", r"\.mrxs")):
        with pytest.raises(MissingDependencyError, match=rf"{maker}.*hespotex\[wsi\]"):
            hx.io.read_wsi(tmp_path / name)
    with pytest.raises(ImageFormatError, match="neither TIFF, JPEG nor PNG"):
        hx.io.read_wsi(tmp_path / "notes.txt")
    assert hx.io.read_wsi(tmp_path / "slide.tif")


@pytest.mark.parametrize("flag", ["is_ndpi", "is_bif", "is_philips"])
def test_tiffs_of_other_layouts_are_left_to_openslide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    plain_pyramid(tmp_path / "slide.tif", blocks(600, 600))
    opened = []
    monkeypatch.setattr(tifffile.TiffFile, flag, True, raising=False)
    monkeypatch.setattr(
        "hespotex.image.files._picture.openslide_levels", lambda path, what: opened.append(what) or ([], None, None)
    )
    open_picture(tmp_path / "slide.tif")
    assert len(opened) == 1


# levels and laziness


def test_levels_that_do_not_lie_on_the_finest_are_not_used(tmp_path: Path, own_cache: Path) -> None:
    pixels = blocks(2100, 2300)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        common = {"photometric": "rgb", "tile": (256, 256), "metadata": None}
        tiff.write(pixels, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **common)
        tiff.write(np.full((840, 920, 3), 7, np.uint8), subfiletype=1, **common)  # 2.5 px to one
    sdata = hx.io.read_wsi(tmp_path / "slide.tif")
    sizes = [level.shape[1:] for level in levels_of(sdata)]
    assert sizes == [(2100, 2300), (1050, 1150), (525, 575)]  # made by ourselves, as for a slide of one level
    assert np.array_equal(levels_of(sdata)[1].values, halve(np.moveaxis(pixels, -1, 0)))
    assert own_cache.exists()


@pytest.mark.parametrize("also_fine", [True, False])
def test_tiles_left_out_are_glass_and_a_broken_off_level_is_not_used(tmp_path: Path, also_fine: bool) -> None:
    """A sparse file leaves out glass on all levels; a writer that broke off leaves out tissue on the coarse ones."""
    path = tmp_path / "slide.tif"
    pixels = blocks(1024, 1024)
    plain_pyramid(path, pixels, levels=2)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        fine, coarse = tiff.series[0].levels[0].keyframe, tiff.series[0].levels[1].keyframe
        emptied = [(coarse, [0])] + ([(fine, [0, 1, 4, 5])] if also_fine else [])
        for page, tiles in emptied:
            counts = list(page.databytecounts)
            for tile in tiles:
                counts[tile] = 0
            page.tags["TileByteCounts"].overwrite(counts)
    levels = levels_of(hx.io.read_wsi(path))
    assert len(levels) == (2 if also_fine else 1)
    if also_fine:
        pixels = pixels.copy()
        pixels[:512, :512] = 255
    for level, expected in zip(levels, (pixels, pixels[::2, ::2]), strict=False):
        assert np.array_equal(rgb(level), expected)


def test_a_slide_of_one_level_gets_coarser_ones_in_bounded_memory(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hespotex.image.files._tiff import TiffLevel

    pixels = blocks(4100, 2100)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=1)
    read = []
    original = TiffLevel.__getitem__
    monkeypatch.setattr(TiffLevel, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    sdata = hx.io.read_wsi(tmp_path / "slide.tif")
    assert [level.shape[1:] for level in levels_of(sdata)] == [(4100, 2100), (2050, 1050), (1025, 525), (513, 263)]
    assert len(read) == 6
    assert all((rows.stop - rows.start, columns.stop - columns.start) <= (2048, 2048) for _, rows, columns in read)
    expected = np.moveaxis(pixels, -1, 0)
    for level in levels_of(sdata)[1:]:
        expected = halve(expected)
        assert np.array_equal(level.values, expected)


def test_a_slide_smaller_than_a_chunk(tmp_path: Path) -> None:
    pixels = blocks(70, 50)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=1, tile=256)
    sdata = hx.io.read_wsi(tmp_path / "slide.tif")
    (level,) = levels_of(sdata)
    assert np.array_equal(rgb(level), pixels)
    assert resolve_slide(sdata).shape == (70, 50)


@pytest.mark.parametrize(("tile", "chunk"), [(240, 960), (256, 1024), (512, 1024), (2048, 2048)])
def test_chunks_are_whole_tiles(tmp_path: Path, tile: int, chunk: int) -> None:
    plain_pyramid(tmp_path / "slide.tif", np.zeros((2500, 2200, 3), np.uint8), levels=1, tile=tile)
    chunks = open_picture(tmp_path / "slide.tif").levels[0].chunks
    assert {side for sides in chunks[1:] for side in sides[:-1]} == {chunk}


def test_each_tile_of_the_file_is_decoded_once(written: dict[str, Path], slides: Any) -> None:
    sdata = hx.io.read_wsi(written["aperio"])
    with slides.decoded_tiles() as counts:
        dask.compute(*(level.data for level in levels_of(sdata)), scheduler="threads")
    n_tiles = sum(-(-height // 240) * -(-width // 240) for height, width in ((1500, 2301), (750, 1150), (375, 575)))
    assert len(counts) == n_tiles
    assert set(counts.values()) == {1}
    with slides.decoded_tiles() as counts:
        hx.pp.detect_tissue(sdata)
    assert {level for level, _, _ in counts} == {2}  # the coarsest is enough
    assert set(counts.values()) == {1}


def test_embedding_decodes_no_tile_twice(written: dict[str, Path], slides: Any) -> None:
    from hespotex.image.stream import iter_tiles

    slide = resolve_slide(hx.io.read_wsi(written["plain"]))
    centres = np.random.default_rng(0).uniform(100, [2200, 1400], (150, 2))
    with slides.decoded_tiles() as counts:
        n_tiles = sum(
            len(batch.rows) for batch in iter_tiles(slide, centres, tile_um=32, tile_px=128, progress_bar=False)
        )
    assert n_tiles == 150
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("key", [np.s_[:, ::7, 5:900:3], np.s_[1, 300, ::-2], np.s_[0:2, 10:10, :], np.s_[:, -1, 3]])
def test_lazy_levels_are_indexed_as_arrays_are(tmp_path: Path, key: Any) -> None:
    pixels = blocks(700, 1100)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=1)
    level = open_picture(tmp_path / "slide.tif").levels[0]
    assert np.array_equal(level[key].compute(), np.moveaxis(pixels, -1, 0)[key])


def test_span_of_an_index() -> None:
    values = np.arange(17)
    for index in (slice(2, 15, 4), slice(None, None, -3), slice(5, 5), slice(-4, None), -2, 0):
        first, stop, inner = span(index, 17)
        assert np.array_equal(values[first:stop][inner], values[index])
    with pytest.raises(IndexError):
        span(17, 17)


def test_threads_share_a_slide(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=1, tile=64)
    level = open_picture(tmp_path / "slide.tif").levels[0]
    corners = np.random.default_rng(1).integers(0, 1300, (64, 2))
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda c: level[:, c[0] : c[0] + 150, c[1] : c[1] + 150].compute(), corners))
    for (y, x), crop in zip(corners, crops, strict=True):
        assert np.array_equal(np.moveaxis(crop, 0, -1), pixels[y : y + 150, x : x + 150])


def test_a_lazy_slide_is_read_by_another_process_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = blocks(600, 700)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=2)
    monkeypatch.chdir(tmp_path)
    level = levels_of(hx.io.read_wsi("slide.tif"))[1].data
    (tmp_path / "level.pkl").write_bytes(pickle.dumps(level))
    (tmp_path / "elsewhere").mkdir()
    code = "import pickle, sys; print(int(pickle.load(open(sys.argv[1], 'rb')).sum().compute()))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "level.pkl")],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == int(pixels[::2, ::2].astype(np.int64).sum())


def test_a_file_is_opened_once_however_often_a_lazy_slide_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.tif"
    plain_pyramid(path, blocks(300, 300), levels=1)
    sent = pickle.dumps(open_picture(path).levels[0])
    opened = []
    original = tifffile.TiffFile.__init__
    monkeypatch.setattr(
        tifffile.TiffFile, "__init__", lambda self, *args, **kws: opened.append(args) or original(self, *args, **kws)
    )
    first = [pickle.loads(sent).compute() for _ in range(3)][-1]
    assert len(opened) == 1
    plain_pyramid(path, blocks(300, 300, seed=1), levels=1)
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(pickle.loads(sent).compute(), first)  # another file by now
    assert len(opened) == 2


def test_coarse_levels_may_be_strips(tmp_path: Path, slides: Any) -> None:
    pixels = blocks(1100, 1300)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        tiff.write(pixels, photometric="rgb", tile=(256, 256), metadata=None)
        tiff.write(
            pixels[::2, ::2], photometric="rgb", rowsperstrip=50, compression="lzw", subfiletype=1, metadata=None
        )
    levels = open_picture(tmp_path / "slide.tif").levels
    with slides.decoded_tiles() as counts:
        assert np.array_equal(rgb(levels[1].compute()), pixels[::2, ::2])
    assert counts == {(1, row, 0): 1 for row in range(11)}


def test_early_jpeg_2000_of_aperio_is_left_to_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = blocks(600, 600)
    opened = []
    monkeypatch.setattr(
        "hespotex.image.files._picture.openslide_levels", lambda path, what: opened.append(what) or ([], None, None)
    )
    for code, name in ((33003, "ycbcr.svs"), (33005, "rgb.svs")):
        path = tmp_path / name
        tifffile.imwrite(
            path,
            pixels,
            photometric="rgb",
            tile=(256, 256),
            compression=33005,
            compressionargs={"reversible": True, "level": 0},
            metadata=None,
        )
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tiff.pages.first.tags["Compression"].overwrite(code)
    open_picture(tmp_path / "ycbcr.svs")
    assert opened == ["a slide of Aperio (JPEG 2000 in YCbCr)"]
    assert np.array_equal(rgb(open_picture(tmp_path / "rgb.svs").levels[0]), pixels)


def test_names_of_lazy_levels_are_those_of_the_file(tmp_path: Path) -> None:
    plain_pyramid(tmp_path / "slide.tif", blocks(300, 300), levels=2)
    first, again = (open_picture(tmp_path / "slide.tif").levels for _ in range(2))
    assert [level.name for level in first] == [level.name for level in again]
    assert first[0].name != first[1].name
    plain_pyramid(tmp_path / "slide.tif", blocks(300, 300, seed=1), levels=2)
    os.utime(tmp_path / "slide.tif", ns=(1, 1))
    assert open_picture(tmp_path / "slide.tif").levels[0].name != first[0].name


def test_a_slide_survives_writing_and_reading(tmp_path: Path) -> None:
    import spatialdata as sd

    pixels = blocks(1100, 1100)
    plain_pyramid(tmp_path / "slide.tif", pixels, levels=2)
    hx.io.read_wsi(tmp_path / "slide.tif", name="b7", patient="p1").write(tmp_path / "slide.zarr")
    (tmp_path / "slide.tif").unlink()
    back = sd.read_zarr(tmp_path / "slide.zarr")
    assert np.array_equal(rgb(levels_of(back)[0]), pixels)
    assert back.attrs["hespotex"] == {"name": "b7", "patient": "p1"}
    assert resolve_slide(back).mpp == 0.5


# the scale


def test_a_missing_mpp_is_an_error_with_a_hint(tmp_path: Path) -> None:
    description = "Aperio Image Library v11.2.1\r\n300x300 [0,0 300x300] (256x256) JPEG/RGB Q=30|AppMag = 40"
    tifffile.imwrite(
        tmp_path / "slide.svs",
        blocks(300, 300),
        photometric="rgb",
        tile=(256, 256),
        description=description,
        metadata=None,
    )
    with pytest.raises(ScaleError, match=r"slide\.svs does not state.*objective is 40x.*0\.25 µm/px.*pass mpp="):
        hx.io.read_wsi(tmp_path / "slide.svs")
    assert mpp_of(hx.io.read_wsi(tmp_path / "slide.svs", mpp=0.25)) == 0.25
    plain_pyramid(tmp_path / "slide.tif", blocks(300, 300), mpp=None)
    with pytest.raises(ScaleError, match=r"slide\.tif does not state its µm per pixel; pass mpp="):
        hx.io.read_wsi(tmp_path / "slide.tif")


def test_the_limit_to_scales_of_x_and_y_is_the_same_both_ways() -> None:
    from hespotex.image.files import isotropic

    assert isotropic(0.5, 0.5145, "slide") == isotropic(0.5145, 0.5, "slide") == pytest.approx(0.5072, abs=1e-4)
    for sides in ((0.5, 0.5153), (0.5153, 0.5)):
        with pytest.raises(ScaleError, match="may differ by at most 3%"):
            isotropic(*sides, "slide")


@pytest.mark.parametrize("mpp", ["0.4.9", "0", ".", "nan"])
def test_nonsense_for_a_scale_is_none(tmp_path: Path, mpp: str) -> None:
    description = f"Aperio Image Library v11.2.1\r\n300x300 [0,0 300x300] (256x256) JPEG/RGB Q=30|MPP = {mpp}"
    tifffile.imwrite(
        tmp_path / "slide.svs",
        blocks(300, 300),
        photometric="rgb",
        tile=(256, 256),
        description=description,
        metadata=None,
    )
    with pytest.raises(ScaleError, match="does not state"):
        hx.io.read_wsi(tmp_path / "slide.svs")


def test_scales_of_x_and_y_must_agree(mirax: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_OpenSlideStub.properties, "openslide.mpp-y", "0.5")
    with pytest.raises(ScaleError, match=r"0\.23 µm/px in x and 0\.5 in y"):
        hx.io.read_wsi(mirax)
    with pytest.warns(HespotexWarning, match=r"0\.23 \(x\) and 0\.5 \(y\)"):
        assert mpp_of(hx.io.read_wsi(mirax, mpp=0.3)) == 0.3


# broken files


def test_files_that_are_no_slide(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    with pytest.raises(ImageFormatError, match=r"'empty\.svs' is empty"):
        hx.io.read_wsi(tmp_path / "empty.svs")
    (tmp_path / "text.svs").write_text("this is not a slide")
    with pytest.raises(ImageFormatError, match=r"'text\.svs' is neither"):
        hx.io.read_wsi(tmp_path / "text.svs")
    (tmp_path / "head.tif").write_bytes(b"II*\x00" + b"\x00" * 60)
    with pytest.raises(ImageFormatError, match=r"head\.tif"):
        hx.io.read_wsi(tmp_path / "head.tif")
    with pytest.raises(DataValueError, match="there is no file"):
        hx.io.read_wsi(tmp_path / "none.svs")
    with pytest.raises(DataValueError, match="is a folder, not a file"):
        hx.io.read_wsi(tmp_path)
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(DataValueError, match=r"spatialdata\.read_zarr"):
        hx.io.read_wsi(tmp_path / "store.zarr")
    (tmp_path / "folder.tif").mkdir()
    for name in ("folder.tif", "."):
        with pytest.raises(DataValueError, match="is a plain folder; give the slide's file in it"):
            open_slide(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slide.tif"
    plain_pyramid(path, blocks(64, 64))
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == path.name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # rights do not bind the superuser, who may run the tests
    with pytest.raises(DataValueError, match="cannot be read .Permission denied."):
        hx.io.read_wsi(path)


@pytest.mark.parametrize("share", [0.999, 0.8, 0.4, 0.05, 0.001])
def test_a_truncated_slide_is_refused_when_it_is_opened(tmp_path: Path, written: dict[str, Path], share: float) -> None:
    """Of a slide written front to back, the coarse levels are what is missing first."""
    content = written["plain"].read_bytes()
    (tmp_path / "slide.tif").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ImageFormatError, match=r"slide\.tif"):
        hx.io.read_wsi(tmp_path / "slide.tif")


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("damage", ["zeros", "noise", "half", "hole"])
def test_a_damaged_tile_is_named_when_it_is_decoded(
    tmp_path: Path, written: dict[str, Path], level: int, damage: str
) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(written["plain"].read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[level].keyframe
        across = -(-page.imagewidth // 256)
        row, column = page.imagelength // 256 // 2, across - 1
        offset, length = page.dataoffsets[row * across + column], page.databytecounts[row * across + column]
    start, stop = {"half": (length // 2, length), "hole": (length // 3, length // 3 + 2000)}.get(damage, (0, length))
    assert stop <= length - (damage == "hole") * 2
    with path.open("r+b") as file:
        file.seek(offset + start)
        size = stop - start
        file.write(np.random.default_rng(0).bytes(size) if damage == "noise" else bytes(size))
    sdata = hx.io.read_wsi(path)  # opens: nothing is decoded yet
    place = rf"'slide\.tif' is damaged: the tile at x={column * 256}, y={row * 256} of level {level} cannot be decoded"
    image = levels_of(sdata)[level]
    with pytest.raises(ImageFormatError, match=place) as caught:
        image.data.compute(scheduler="threads")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # workers send it home
    if level < 2:
        assert image.data[:, :200, :200].compute().shape == (3, 200, 200)  # the rest can be read


@pytest.mark.parametrize("side", [16, 64, 256])
def test_glass_of_one_colour_is_not_taken_for_damage(tmp_path: Path, side: int) -> None:
    """With tables of its own, such a tile is coded as little but zeros."""
    pixels = np.full((256, 256, 3), 241, np.uint8)
    path = tmp_path / "slide.tif"
    options = {"compression": "jpeg", "compressionargs": {"optimize": True}, "subsampling": (1, 1), "metadata": None}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(side, side), **options)
    if side == 256:
        assert bytes(760) in path.read_bytes()
    assert np.abs(rgb(open_picture(path).levels[0]).astype(int) - 241).max() <= 2


def test_damage_met_while_streaming_leaves_the_object_as_it_was(tmp_path: Path, written: dict[str, Path]) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(written["plain"].read_bytes())
    sdata = hx.io.read_wsi(path)
    hx.pp.detect_tissue(sdata, min_area_um2=5000)
    hx.pp.make_tiles(sdata, pitch_um=30, diameter_um=30)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[0].keyframe
        start, stop = page.dataoffsets[0], page.dataoffsets[-1]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))
    before = sorted(name for _, name, _ in sdata.gen_elements())
    with pytest.raises(ImageFormatError, match=r"'slide\.tif' is damaged.*level 0"):
        hx.pp.embed(sdata, "morphology")
    assert sorted(name for _, name, _ in sdata.gen_elements()) == before


@pytest.mark.parametrize("kind", ["tiles", "strips"])
def test_flipped_bits_never_show_as_another_error(tmp_path: Path, own_cache: Path, kind: str) -> None:
    """Whatever is damaged, header or pixels, opening and reading the slide work or say that it is damaged."""
    path = tmp_path / "slide.tif"
    if kind == "tiles":
        plain_pyramid(path, blocks(300, 260), levels=2)
    else:
        tifffile.imwrite(path, blocks(300, 260), photometric="rgb", compression="lzw", rowsperstrip=32, metadata=None)
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        headers = [
            start + byte for page in tiff.pages for start in [page.offset] for byte in range(2 + 12 * len(page.tags))
        ]
    rng = np.random.default_rng(0)
    refused = []
    for number in range(120):
        damaged = bytearray(content)
        damaged[rng.choice(headers) if number % 4 else rng.integers(8, len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            for level in open_picture(path).levels:
                level.blocks[0, 0, 0].compute(scheduler="synchronous")
        except ImageFormatError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("slide.tif" in message for message in refused)


def test_a_strip_larger_than_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, blocks(300, 260), photometric="rgb", compression="lzw", rowsperstrip=32, metadata=None)

    def exhausted(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", exhausted)
    with pytest.raises(ImageFormatError, match=r"'slide\.tif' holds a strip or tile that does not fit into memory"):
        open_picture(path)


def test_a_slide_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    plain_pyramid(tmp_path / "slide.tif", blocks(300, 300), levels=1)
    level = open_picture(tmp_path / "slide.tif").levels[0]
    (tmp_path / "slide.tif").unlink()
    with pytest.raises(ImageFormatError, match=r"'slide\.tif' cannot be read any more"):
        level.compute()


@pytest.mark.data
def test_the_real_slide_has_the_pixels_that_openslide_gives(data_dir: Path) -> None:
    path = data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs"
    sdata = hx.io.read_wsi(path)
    assert mpp_of(sdata) == pytest.approx(0.499)
    assert [level.shape[1:] for level in levels_of(sdata)] == [(2967, 2220), (1484, 1110), (742, 555)]
    assert levels_of(sdata)[0].data.chunks[1:] == ((960, 960, 960, 87), (960, 960, 300))
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    assert np.array_equal(rgb(levels_of(sdata)[0]), pixels)
