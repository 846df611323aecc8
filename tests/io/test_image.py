from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning, ImageFormatError, ScaleError
from hespotex.image.files._cache import halve
from hespotex.io._image import isotropic, open_picture


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def top(sdata) -> np.ndarray:
    image = sdata["image"]
    return np.moveaxis(np.asarray(image["scale0"]["image"] if hasattr(image, "children") else image), 0, -1)


@pytest.fixture
def own_cache(tmp_path: Path):
    with hx.settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"


def test_halve_is_the_rounded_mean_of_each_box() -> None:
    pixels = np.array([[[0, 1, 9], [1, 1, 9], [9, 9, 9]]], dtype=np.uint8)
    assert halve(pixels).tolist() == [[[1, 9], [9, 9]]]  # 3/4; the odd row and column count twice
    assert halve(np.full((3, 4, 6), 255, np.uint8)).tolist() == np.full((3, 2, 3), 255).tolist()


@pytest.mark.parametrize("kind", ["png", "stripped.tif", "tiled.tif", "planar.tif"])
def test_every_lossless_format_gives_the_same_pyramid(tmp_path: Path, kind: str) -> None:
    pixels = noise(1301, 2309)
    path = tmp_path / f"slide.{kind}"
    if kind == "png":
        Image.fromarray(pixels).save(path, compress_level=0)
    elif kind == "planar.tif":
        tifffile.imwrite(path, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate", tile=(256, 256))
    else:
        tile = {"tile": (256, 256)} if kind.startswith("tiled") else {"rowsperstrip": 64}
        tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", **tile)
    sdata = hx.io.read_image(path, mpp=0.5)
    levels = [level["image"] for level in sdata["image"].children.values()]
    assert [level.shape for level in levels] == [(3, 1301, 2309), (3, 651, 1155), (3, 326, 578)]
    assert all(level.dtype == np.uint8 and list(level.c.values) == ["r", "g", "b"] for level in levels)
    assert np.array_equal(top(sdata), pixels)
    expected = np.moveaxis(pixels, -1, 0)
    for level in levels[1:]:
        expected = halve(expected)
        assert np.array_equal(level.values, expected)
    # coordinates of all levels are those of the finest: pixel centres
    assert levels[0].x.values[:2].tolist() == [0.5, 1.5]
    assert levels[1].x.values[:2].tolist() == [1.0, 3.0]
    assert levels[2].y.values[-1] == 325.5 * 4


@pytest.mark.parametrize("kind", ["stripped.tif", "tiled.tif", "array"])
def test_a_mark_near_the_far_corner_lies_there_at_every_level(tmp_path: Path, kind: str) -> None:
    """Odd sizes: were the ratio of sizes the size of a pixel, the mark would be a pixel of the level off."""
    from hespotex.data.geometry import resolve_slide
    from hespotex.io._assemble import build_slide

    pixels = np.zeros((4111, 2074, 3), np.uint8)
    x, y = 2056, 4096  # a pixel of every level
    pixels[y : y + 8, x : x + 8] = 255
    if kind == "array":
        sdata = build_slide(open_picture(pixels).levels, 0.5, {})
    else:
        tile = {"tile": (256, 256)} if kind == "tiled.tif" else {"rowsperstrip": 64}
        tifffile.imwrite(tmp_path / kind, pixels, photometric="rgb", compression="zlib", **tile)
        sdata = hx.io.read_image(tmp_path / kind, mpp=0.5)
    stored = [level["image"] for level in sdata["image"].children.values()]
    slide = resolve_slide(sdata)
    assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
    for level, array in zip(slide.levels, stored, strict=True):
        weight = array.isel(c=0).astype(float).compute()
        for found in (
            (float((weight * array.x).sum() / weight.sum()), float((weight * array.y).sum() / weight.sum())),
            (np.argwhere(weight.values > 0)[:, ::-1].mean(0) + 0.5) * level.downsample,
        ):
            assert tuple(found) == pytest.approx((x + 4, y + 4), abs=1e-6)


def test_image_is_lazy_and_a_crop_reads_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiled.tif"
    tifffile.imwrite(path, noise(3000, 3000), photometric="rgb", tile=(512, 512))
    sdata = hx.io.read_image(path, mpp=0.5)
    from hespotex.image.files._tiff import TiffLevel

    read = []
    original = TiffLevel.__getitem__
    monkeypatch.setattr(TiffLevel, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    sdata["image"]["scale0"]["image"][:, :100, :100].compute()
    assert len(read) == 1


def test_jpeg_is_decoded_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slide.jpg"
    Image.fromarray(noise(1500, 900)).save(path, quality=95, dpi=(72, 72))
    first = top(hx.io.read_image(path, mpp=1.0))
    assert np.array_equal(first, np.asarray(Image.open(path)))
    monkeypatch.setattr("hespotex.image.files._picture.decode_jpeg", None)
    path.rename(tmp_path / "other.jpg")  # the content names the cache, not the path
    assert np.array_equal(top(hx.io.read_image(tmp_path / "other.jpg", mpp=1.0)), first)
    assert [folder.name[-4:] for folder in (own_cache / "images").iterdir()] != [".tmp"]


@pytest.mark.parametrize("what", ["all", "one chunk"])
def test_a_cache_deleted_while_in_use_is_an_error_and_not_black(tmp_path: Path, own_cache: Path, what: str) -> None:
    pixels = np.zeros((1100, 1100, 3), np.uint8)  # black chunks are written, too
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    sdata = hx.io.read_image(tmp_path / "slide.png", mpp=1.0)
    assert (top(sdata) == 0).all()
    if what == "all":
        shutil.rmtree(own_cache)
    else:
        next(own_cache.glob("images/*/level0/c/0/1/1")).unlink()
    for image in (sdata["image"], pickle.loads(pickle.dumps(sdata["image"]))):
        with pytest.raises(DataValueError, match=r"settings\.cache_dir.*[Rr]ead the image again"):
            image["scale0"]["image"].compute()
    shutil.rmtree(own_cache, ignore_errors=True)
    assert (top(hx.io.read_image(tmp_path / "slide.png", mpp=1.0)) == pixels).all()


def test_pyramids_of_an_older_layout_are_not_used(tmp_path: Path, own_cache: Path) -> None:
    from hespotex.image.files._cache import sha256

    Image.fromarray(noise(40, 30)).save(tmp_path / "slide.png")
    (own_cache / "images" / sha256(tmp_path / "slide.png")).mkdir(parents=True)
    assert np.array_equal(top(hx.io.read_image(tmp_path / "slide.png", mpp=1.0)), noise(40, 30))


def test_interrupted_decoding_leaves_no_half_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.png"
    pixels = noise(2100, 1200)
    Image.fromarray(pixels).save(path, compress_level=0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hespotex.image.files._cache._reduce", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hx.io.read_image(path, mpp=1.0)
    assert list((own_cache / "images").iterdir()) == []
    assert np.array_equal(top(hx.io.read_image(path, mpp=1.0)), pixels)


def test_images_beyond_pillows_limit_are_read_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert top(hx.io.read_image(path, mpp=1.0)).shape == (64, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_bright_pixel_lies_where_it_was_put(tmp_path: Path) -> None:
    pixels = np.zeros((50, 80, 3), np.uint8)
    pixels[7, 33] = (10, 20, 30)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16))
    image = hx.io.read_image(tmp_path / "a.tif", mpp=0.25)["image"]
    assert image.sel(x=33.5, y=7.5).values.tolist() == [10, 20, 30]
    matrix = get_transformation(image, "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    assert (matrix @ [33.5, 7.5, 1]).tolist() == [8.375, 1.875, 1]


def test_pyramid_of_the_file_is_used(tmp_path: Path, own_cache: Path) -> None:
    pixels = noise(2200, 2600)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tiff:
        common = {"photometric": "rgb", "tile": (256, 256)}
        tiff.write(pixels, subifds=1, **common)
        tiff.write(np.full((550, 650, 3), 7, np.uint8), subfiletype=1, **common)
    image = hx.io.read_image(tmp_path / "pyramid.tif", mpp=0.5)["image"]
    assert [level["image"].shape for level in image.children.values()] == [(3, 2200, 2600), (3, 550, 650)]
    assert (image["scale1"]["image"].values == 7).all()
    assert not own_cache.exists()


def test_lazy_tiff_survives_pickling(tmp_path: Path) -> None:
    pixels = noise(300, 400)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64))
    level = open_picture(tmp_path / "a.tif").levels[0]
    level.compute()
    assert np.array_equal(np.moveaxis(pickle.loads(pickle.dumps(level)).compute(), 0, -1), pixels)


@pytest.mark.parametrize(
    ("write", "mpp"),
    [
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5),
        ({"description": "Aperio Image Library v1|AppMag = 20|MPP = 0.4990|Left = 2"}, 0.499),
        ({"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm",
                                    "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}}, 0.25),
    ],
)  # fmt: skip
def test_mpp_is_read_from_the_tiff(tmp_path: Path, write: dict, mpp: float) -> None:
    path = tmp_path / ("a.ome.tif" if write.get("ome") else "a.tif")
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", tile=(32, 32), **write)
    scale = get_transformation(hx.io.read_image(path)["image"], "microns")
    assert scale.scale.tolist() == pytest.approx([mpp, mpp])


def test_meaningless_dpi_is_no_scale(tmp_path: Path) -> None:
    Image.fromarray(noise(32, 32)).save(tmp_path / "a.jpg", dpi=(72, 72))
    tifffile.imwrite(tmp_path / "a.tif", noise(32, 32), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    for name in ("a.jpg", "a.tif"):
        with pytest.raises(ScaleError, match="mpp"):
            hx.io.read_image(tmp_path / name)


def test_scales_of_x_and_y_must_agree(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise(32, 32), photometric="rgb", resolution=(20_000, 21_000), resolutionunit="CENTIMETER"
    )
    with pytest.raises(ScaleError, match="in x"):
        hx.io.read_image(tmp_path / "a.tif")
    with pytest.warns(HespotexWarning, match=r"0\.5 \(x\) and 0\.4762 \(y\)"):  # whoever knows better may say so
        assert hx.io.read_image(tmp_path / "a.tif", mpp=1.0)
    assert isotropic(1.0, 1.02, "test") == pytest.approx(1.02**0.5)
    with pytest.raises(ScaleError):
        isotropic(1.0, 0.96, "test")


def test_given_mpp_wins_with_a_warning(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise(32, 32), photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER"
    )
    with pytest.warns(HespotexWarning, match="0.5"):
        sdata = hx.io.read_image(tmp_path / "a.tif", mpp=1.0)
    assert get_transformation(sdata["image"], "microns").scale[0] == 1.0


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan")])
def test_mpp_must_be_positive(tmp_path: Path, mpp: float) -> None:
    Image.fromarray(noise(32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ScaleError, match="mpp"):
        hx.io.read_image(tmp_path / "a.png", mpp=mpp)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_opaque_alpha_is_dropped_and_a_transparent_one_refused(tmp_path: Path, suffix: str) -> None:
    pixels = noise(40, 30, 4)
    pixels[..., 3] = 255
    opaque, holes = tmp_path / f"opaque.{suffix}", tmp_path / f"holes.{suffix}"
    Image.fromarray(pixels).save(opaque)
    assert np.array_equal(top(hx.io.read_image(opaque, mpp=1.0)), pixels[..., :3])
    pixels[3, 4, 3] = 0
    Image.fromarray(pixels).save(holes)
    with pytest.raises(ImageFormatError, match="transparent"):
        hx.io.read_image(holes, mpp=1.0)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey.png", noise(20, 20)[..., 0]),
        ("grey.jpg", noise(20, 20)[..., 0]),
        ("grey.tif", noise(20, 20)[..., 0]),
        ("float.tif", noise(20, 20).astype(np.float32)),
        ("deep.tif", noise(20, 20).astype(np.uint16)),
        ("deep.png", noise(20, 20)[..., 0].astype(np.uint16)),
    ],
)
def test_what_is_not_8_bit_rgb_is_refused(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    path = tmp_path / name
    if name.endswith("tif"):
        tifffile.imwrite(path, pixels, photometric="minisblack" if pixels.ndim == 2 else "rgb")
    else:
        Image.fromarray(pixels).save(path)
    with pytest.raises(ImageFormatError, match="8-bit RGB"):
        hx.io.read_image(path, mpp=1.0)


def test_cmyk_and_palette_are_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 20)).convert("CMYK").save(tmp_path / "a.jpg")
    Image.fromarray(noise(20, 20)).convert("P").save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        with pytest.raises(ImageFormatError, match="convert"):
            hx.io.read_image(tmp_path / name, mpp=1.0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(200, 200)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageFormatError):
        hx.io.read_image(path, mpp=1.0)


@pytest.mark.parametrize("place", [18, 22, 24, 25, 30])  # width, height, depth, colour, checksum
def test_a_png_with_a_damaged_header_is_called_damaged(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(20, 20)).save(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 49
    path.write_bytes(content)
    with pytest.raises(ImageFormatError, match=r"'a\.png' is a damaged PNG"):
        hx.io.read_image(path, mpp=1.0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"hello")
    with pytest.raises(ImageFormatError, match="neither"):
        hx.io.read_image(tmp_path / "a.jpg", mpp=1.0)
    with pytest.raises(DataValueError, match="no file"):
        hx.io.read_image(tmp_path / "none.jpg", mpp=1.0)
    with pytest.raises(DataTypeError, match="path"):
        open_picture(3)  # type: ignore[arg-type]


def test_slide_of_a_scanner(data_dir: Path) -> None:
    sdata = hx.io.read_image(data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs")
    assert sdata["image"]["scale0"]["image"].shape == (3, 2967, 2220)
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(0.499)
    assert top(sdata)[1000:1010, 1000:1010].mean() > 50
    assert sdata.attrs["hespotex"] == {"name": "CMU-1-Small-Region", "patient": None}
