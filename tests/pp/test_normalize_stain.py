"""Stain normalisation of slides."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from geopandas import GeoDataFrame
from shapely import box
from spatialdata.models import ShapesModel
from spatialdata.transformations import Scale, get_transformation

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.errors import AmbiguousKeyError, DataTypeError, DataValueError, GeometryError, MissingKeyError
from hespotex.image.fingerprint import fingerprint

from ..conftest import stored
from ..image.test_stain import BLUE, PINK, tissue

SIDE = 600


def painted(dyes, strength=1.0, seed=0):
    """A square of tissue of 400 px on glass, (3, 600, 600)."""
    pixels = np.full((SIDE, SIDE, 3), 245, np.uint8)
    # dyes vary from 4 px to 4 px: at one pixel each, 1 µm/px would mix them
    blocks = tissue(dyes, strength, 10_000, seed).reshape(100, 100, 3)
    blocks = np.random.default_rng(seed).permutation(blocks.reshape(-1, 3)).reshape(100, 100, 3)
    pixels[100:500, 100:500] = blocks.repeat(4, axis=0).repeat(4, axis=1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@pytest.fixture
def slides(plain_section):
    """Makers of a slide to be normalised and of its reference."""
    centres = np.random.default_rng(0).uniform(150, 450, (12, 2))

    def make(dyes=BLUE, strength=1.0, **options):
        return plain_section(painted(dyes, strength), mpp=1.0, centres=centres, **options)

    return make


def values(image, level="scale0"):
    return image.values if hasattr(image, "values") and not hasattr(image, "children") else image[level]["image"].values


def record(sdata, key="image_normalized"):
    return sdata.attrs["hespotex"]["stain"][key]


@pytest.mark.parametrize("method", [None, "vahadane", "reinhard"])
def test_colours_become_those_of_the_reference(slides, method):
    own, reference = slides(BLUE), slides(PINK)
    hx.pp.normalize_stain(own, method, reference=reference)
    wanted, before = values(reference["image"]), values(own["image"])
    after = values(own["image_normalized"])
    inside = (slice(None), slice(110, 490), slice(110, 490))
    means = [pixels[inside].reshape(3, -1).mean(axis=1) for pixels in (wanted, before, after)]
    assert np.abs(means[2] - means[0]).max() < 0.5 * np.abs(means[1] - means[0]).max()
    assert np.abs(after[:, :90].astype(int) - 245).max() <= 12
    assert record(own)["method"] == (method or "macenko")
    assert record(own)["n_pixels"] > 10_000
    assert np.array_equal(values(own["image"]), painted(BLUE))


def test_levels_chunks_and_transformations_come_along(slides):
    own, reference = (
        slides(BLUE, scale_factors=[2, 2], to_global=Scale([1.5, 1.5], axes=("x", "y")), chunks=128),
        slides(PINK),
    )
    hx.pp.normalize_stain(own, reference=reference)
    image, new = own["image"], own["image_normalized"]
    assert list(new.children) == list(image.children)
    for level in image.children:
        old_level, new_level = image[level]["image"], new[level]["image"]
        assert new_level.shape == old_level.shape
        assert new_level.data.chunks[1:] == old_level.data.chunks[1:]
        assert np.array_equal(new_level.coords["x"], old_level.coords["x"])
    assert str(get_transformation(new, get_all=True)) == str(get_transformation(image, get_all=True))
    old_slide, new_slide = (resolve_slide(own, image_key=key) for key in ("image", "image_normalized"))
    assert new_slide.mpp == old_slide.mpp
    assert [level.downsample for level in new_slide.levels] == [level.downsample for level in old_slide.levels]
    sd.transformations.remove_transformation(new, "microns")
    assert "microns" in get_transformation(image, get_all=True)


def test_only_the_chunks_that_are_read_are_computed(slides):
    import dask.array as da
    from spatialdata.models import Image2DModel

    own, reference = slides(BLUE), slides(PINK)
    tissue = hx.pp.detect_tissue(own, copy=True)
    hx.pp.normalize_stain(own, reference=reference)
    saved = record(own)
    read = []

    def note(pixels, block_info=None):
        read.append(block_info[0]["chunk-location"])
        return pixels

    lazy = da.from_array(painted(BLUE), chunks=(3, 100, 100)).map_blocks(
        note, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    seen = sd.SpatialData(
        images={
            "image": Image2DModel.parse(
                lazy, dims=("c", "y", "x"), transformations=get_transformation(own["image"], get_all=True)
            )
        },
        shapes={"tissue": tissue},
    )
    hx.pp.normalize_stain(seen, reference=saved)
    read.clear()
    corner = seen["image_normalized"][:, :100, :100].values
    assert read == [(0, 0, 0)]
    assert np.array_equal(corner, values(own["image_normalized"])[:, :100, :100])


def test_chunks_do_not_matter(slides):
    reference = slides(PINK)
    results = []
    for chunks in (64, 177, 600):
        own = slides(BLUE, chunks=chunks)
        hx.pp.normalize_stain(own, reference=reference)
        results.append((record(own), values(own["image_normalized"])))
    for other, pixels in results[1:]:
        assert other == results[0][0]
        assert np.array_equal(pixels, results[0][1])


def test_a_stored_reference_stands_for_the_slide(slides, tmp_path):
    train, test, other = slides(PINK), slides(BLUE), slides(BLUE)
    hx.pp.normalize_stain(test, "vahadane", reference=train, options={"lambda1": 0.05})
    test.write(tmp_path / "test.zarr")
    back = sd.read_zarr(tmp_path / "test.zarr")
    assert record(back) == record(test)
    assert np.array_equal(values(back["image_normalized"]), values(test["image_normalized"]))
    hx.pp.normalize_stain(other, reference=record(back))
    assert np.array_equal(values(other["image_normalized"]), values(test["image_normalized"]))
    assert record(other)["options"] == {"lambda1": 0.05}
    by_part = hx.pp.normalize_stain(other, reference=record(back)["reference"], options={"lambda1": 0.05}, copy=True)
    assert np.array_equal(values(by_part), values(test["image_normalized"]))


def test_the_reference_is_fitted_on_its_own_tissue_alone(slides, plain_section):
    train = slides(PINK)
    hx.pp.normalize_stain(slides(BLUE), reference=train)
    first, second = slides(BLUE), slides(BLUE, strength=0.6)
    glass = painted(PINK)
    glass[:, :50] = np.array([150, 230, 240]).reshape(3, 1, 1)  # beside the tissue
    dirty = plain_section(glass, mpp=1.0)
    dirty["tissue"] = hx.pp.detect_tissue(train, copy=True)
    hx.pp.normalize_stain(first, reference=train)
    hx.pp.normalize_stain(second, reference=dirty)
    assert record(first)["reference"] == record(second)["reference"]
    assert record(first)["own"] != record(second)["own"]


def test_an_image_of_the_object_itself_may_be_the_reference(slides):
    own = slides(BLUE)
    hx.pp.normalize_stain(own, reference="image")
    assert np.abs(values(own["image_normalized"]).astype(int) - painted(BLUE)).max() <= 1
    assert record(own)["reference_name"] == "image"


def test_the_result_is_made_anew_and_nothing_else_is_replaced(slides):
    own, reference = slides(BLUE), slides(PINK)
    hx.pp.normalize_stain(own, reference=reference)
    hx.pp.normalize_stain(own, "reinhard", reference=reference)
    assert record(own)["method"] == "reinhard"
    for key, message in [("spots", "did not make"), ("image", "did not make"), ("a b", "cannot be stored")]:
        with pytest.raises(DataValueError, match=message):
            hx.pp.normalize_stain(own, reference=reference, key_added=key)


def test_copy_leaves_the_object_alone(slides):
    own, reference = slides(BLUE), slides(PINK)
    before = stored(own), stored(reference)
    image = hx.pp.normalize_stain(own, reference=reference, copy=True)
    assert (stored(own), stored(reference)) == before
    hx.pp.normalize_stain(own, reference=reference)
    assert np.array_equal(values(image), values(own["image_normalized"]))


def test_the_new_image_is_embedded_as_another(slides):
    own, reference = slides(BLUE), slides(PINK)
    hx.pp.normalize_stain(own, reference=reference)
    centres = np.array([[300.0, 300.0]])
    prints = [fingerprint(resolve_slide(own, image_key=key), centres) for key in ("image", "image_normalized")]
    assert prints[0] != prints[1]
    with pytest.raises(AmbiguousKeyError, match="image_normalized"):
        hx.pp.embed(own, "rgb", tile_um=64)
    plain = hx.pp.embed(own, "rgb", tile_um=64, image_key="image", copy=True)
    changed = hx.pp.embed(own, "rgb", tile_um=64, image_key="image_normalized", copy=True)
    assert np.isfinite(changed).all()
    assert np.abs(plain - changed).max() > 1e-3


def test_slides_without_a_stain(slides, plain_section):
    reference = slides(PINK)
    blank = plain_section(np.full((3, SIDE, SIDE), 245, np.uint8), mpp=1.0)
    with pytest.raises(GeometryError, match="no stained tissue"):
        hx.pp.normalize_stain(blank, reference=reference)
    blank["tissue"] = hx.pp.detect_tissue(reference, copy=True)
    before = stored(blank)
    with pytest.raises(DataValueError, match="image 'image': only 0 stained pixels"):
        hx.pp.normalize_stain(blank, reference=reference)
    with pytest.raises(DataValueError, match="image 'image': only 0 stained pixels"):
        hx.pp.normalize_stain(reference, reference=blank)
    assert stored(blank) == before


def test_bad_arguments(slides):
    own, reference = slides(BLUE), slides(PINK)
    with pytest.raises(DataValueError, match="method='he' is unknown"):
        hx.pp.normalize_stain(own, "he", reference=reference)
    with pytest.raises(MissingKeyError, match="'other' is not among the images"):
        hx.pp.normalize_stain(own, reference="other")
    with pytest.raises(MissingKeyError, match="'other' is not among the shapes"):
        hx.pp.normalize_stain(own, reference=reference, shapes_key="other")
    with pytest.raises(DataTypeError, match="reference must be"):
        hx.pp.normalize_stain(own, reference=7)
    hx.pp.normalize_stain(own, reference=reference)
    with pytest.raises(DataValueError, match="fitted by 'macenko'"):
        hx.pp.normalize_stain(reference, "reinhard", reference=record(own))


@pytest.fixture(scope="module")
def breast(her2st_dir):
    return hx.datasets.her2st("C2", her2st_dir)


@pytest.mark.data
@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_two_real_slides_come_closer(data_dir, breast, method):
    """Skin scanned in Pittsburgh is given the stain of breast from Stockholm."""
    skin = hx.io.read_image(data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs")
    hx.pp.normalize_stain(skin, method, reference=breast)
    image = {key: values(skin[key]) for key in ("image", "image_normalized")}
    glass = image["image"].min(axis=0) > 240
    assert np.abs(image["image_normalized"][:, glass].astype(int) - image["image"][:, glass]).max() <= 20
    wanted = values(breast["image"], "scale3")
    wanted, *means = (pixels[:, pixels.min(axis=0) < 200].mean(axis=1) for pixels in (wanted, *image.values()))
    gap = [np.abs(mean - wanted).mean() for mean in means]
    assert gap[1] < 0.6 * gap[0]


@pytest.mark.data
def test_a_tinted_slide_of_one_dye_is_refused_with_advice(data_dir):
    brain = hx.io.read_image(data_dir / "visium_mouse_brain_crop" / "visium_crop.jpg", mpp=0.73)
    brain["tissue"] = ShapesModel.parse(GeoDataFrame(geometry=[box(0, 0, 950, 1717)]))
    with pytest.raises(DataValueError, match="image 'image': method='macenko': eosin.*method='reinhard'"):
        hx.pp.normalize_stain(brain, reference="image")
    hx.pp.normalize_stain(brain, "reinhard", reference="image")


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_the_slide_of_lazyslide_is_taken_unchanged(data_dir):
    wsidata = pytest.importorskip("wsidata")
    path = data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs"
    slide, plain = wsidata.open_wsi(path, store=None), hx.io.read_image(path)
    for sdata in (slide, plain, slide):  # once more: the result is not taken for a second slide
        hx.pp.normalize_stain(sdata, reference=plain)
    assert resolve_slide(slide, image_key="wsi_normalized").mpp == pytest.approx(0.499)
    pixels = [values(sdata[key]) for sdata, key in ((slide, "wsi_normalized"), (plain, "image_normalized"))]
    assert np.array_equal(*pixels)
