from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.transformations import Affine, Identity, Scale, set_transformation

import hespotex as hx
from hespotex.data import partial
from hespotex.encoders import EncoderInfo, TileEncoder, _base
from hespotex.errors import (
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    ScaleError,
)
from hespotex.image import fingerprint

from ..conftest import stored


class Thumbnail(TileEncoder):
    """The tile itself, 8 × 8 px: features are what the encoder saw."""

    info = EncoderInfo(name="thumbnail", n_features=192)
    name, tile_px, n_features = "thumbnail", 8, 192

    def __init__(
        self, *, tile_um: float | None = None, mpp: float | None = None, fail_after: int | None = None
    ) -> None:
        self.set_size(tile_um, mpp, default_um=32.0)
        self.fail_after, self.seen = fail_after, 0

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um, "steps": [1, 2]}

    def encode(self, tiles, device):
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(tiles)
        return tiles.reshape(len(tiles), -1).astype(np.float32)


KEY = "X_thumbnail"


def smooth(height: int = 600, width: int = 500) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 100 * np.sin(x / 25), 127 + 100 * np.cos(y / 30), (x + y) / 5]).astype(np.uint8)


def embedded(sdata, **options) -> pd.DataFrame:
    values = hx.pp.embed(sdata, Thumbnail(), copy=True, **options)
    return pd.DataFrame(values, index=sdata["table"].obs["spot_id"].to_numpy()).sort_index()


def test_what_is_written(plain_section):
    sdata = plain_section(centres=[[100, 100], [20, 300], [300, 200]])
    before = sdata["table"].X.copy()
    hx.pp.embed(sdata, Thumbnail())
    table = sdata["table"]
    assert table.obsm[KEY].shape == (3, 192)
    assert table.obsm[KEY].dtype == np.float32
    padded = dict(zip(table.obs["spot_id"], table.obs["thumbnail_padded"], strict=True))
    assert padded == {"s0": False, "s1": True, "s2": False}
    record = table.uns["hespotex"][KEY]
    assert record["encoder"] == {"name": "thumbnail", "tile_um": 32.0, "steps": [1, 2]}
    assert record["spot_radius_um"] == pytest.approx(10.0)
    np.testing.assert_array_equal(table.X, before)
    assert set(sdata.tables) == {"table"}


def test_copy_writes_nothing(plain_section):
    sdata = plain_section()
    values = hx.pp.embed(sdata, Thumbnail(), copy=True)
    assert values.shape == (12, 192)
    assert KEY not in sdata["table"].obsm
    assert "hespotex" not in sdata["table"].uns
    assert list(sdata["table"].obs) == ["region", "spot_id"]


ROTATED = Affine(np.array([[0.6, -0.8, 300], [0.8, 0.6, -40], [0, 0, 1]]), ("x", "y"), ("x", "y"))
FLIPPED = Affine(np.array([[-1, 0, 500], [0, 1, 0], [0, 0, 1]]), ("x", "y"), ("x", "y"))


@pytest.mark.parametrize("change", [ROTATED, FLIPPED, Scale([3, 3], axes=("x", "y"))])
def test_the_same_tiles_from_a_section_that_was_moved(plain_section, change):
    """Turned, mirrored or scaled in its coordinate system; µm stay what they were."""
    centres = np.random.default_rng(3).uniform(100, 400, (8, 2))
    plain = plain_section(smooth(), centres=centres)
    moved = plain_section(smooth(), centres=centres, to_global=change, mpp=None)
    for element in (moved["image"], moved["spots"]):
        set_transformation(element, Scale([0.5, 0.5], axes=("x", "y")), "microns")
    # Identity on both sides of "microns", whatever "global" is
    pd.testing.assert_frame_equal(embedded(moved), embedded(plain))


def test_the_same_tiles_from_a_crop(plain_section):
    centres = np.random.default_rng(3).uniform(200, 380, (8, 2))
    plain = plain_section(smooth(), centres=centres, scale_factors=[2])
    crop = plain.query.bounding_box(
        axes=("x", "y"), min_coordinate=[96, 104], max_coordinate=[480, 504], target_coordinate_system="global"
    )
    difference = (embedded(crop) - embedded(plain)).abs().to_numpy()
    assert difference.max() <= 2


def test_the_same_tiles_from_several_scales(plain_section):
    centres = np.random.default_rng(3).uniform(100, 400, (8, 2))
    single = embedded(plain_section(smooth(), centres=centres))
    multi = embedded(plain_section(smooth(), centres=centres, scale_factors=[2, 2]))
    assert (single - multi).abs().to_numpy().max() <= 4


def test_the_same_tiles_from_an_image_of_another_pixel_size(plain_section):
    centres = np.random.default_rng(3).uniform(100, 400, (8, 2))
    fine = embedded(plain_section(smooth(), centres=centres))
    y, x = np.mgrid[:300, :250] * 2 + 0.5
    half = np.stack([127 + 100 * np.sin(x / 25), 127 + 100 * np.cos(y / 30), (x + y) / 5]).astype(np.uint8)
    coarse = embedded(plain_section(half, centres=centres / 2, mpp=1.0))
    assert (fine - coarse).abs().to_numpy().max() <= 4


def test_nothing_is_done_twice(plain_section):
    sdata = plain_section()
    hx.pp.embed(sdata, Thumbnail())
    again = Thumbnail(fail_after=0)
    hx.pp.embed(sdata, again)
    np.testing.assert_array_equal(hx.pp.embed(sdata, again, copy=True), sdata["table"].obsm[KEY])
    other = Thumbnail(tile_um=64)
    hx.pp.embed(sdata, other)
    assert other.seen == 12


@pytest.mark.parametrize("change", ["image", "painted", "painted pyramid", "painted, larger", "places", "scale"])
def test_changed_input_is_embedded_anew(plain_section, change, monkeypatch):
    options = {"scale_factors": [2, 2]} if change == "painted pyramid" else {}
    if change == "painted, larger":
        monkeypatch.setattr(fingerprint, "OVERVIEW_PX", 10_000)
    sdata = plain_section(smooth(), **options)
    hx.pp.embed(sdata, Thumbnail())
    if change == "image":
        sdata["image"] = sdata["image"].copy(data=255 - sdata["image"].data)
    elif change.startswith("painted"):
        pixels = smooth()
        pixels[:, :50, :50] = 255  # where no tile lies: the samples alone do not see it
        sdata["image"] = plain_section(pixels, **options)["image"]
    elif change == "places":
        sdata["spots"].geometry = sdata["spots"].geometry.translate(3, 0)
    else:
        hx.pp.set_scale(sdata, mpp=0.6)
    encoder = Thumbnail()
    hx.pp.embed(sdata, encoder)
    assert encoder.seen == 12


def test_interrupted_work_goes_on(plain_section, monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    monkeypatch.setattr(_base, "_TILES_PER_RUN", 4)
    sdata, reference = plain_section(), plain_section()
    with hx.settings.override(cache_dir=tmp_path, batch_size=4):
        with pytest.warns(HespotexWarning, match="interrupted after 8 of 12"), pytest.raises(KeyboardInterrupt):
            hx.pp.embed(sdata, Thumbnail(fail_after=8))
        assert KEY not in sdata["table"].obsm
        encoder = Thumbnail()
        hx.pp.embed(sdata, encoder)
        assert encoder.seen == 4
        assert not list(tmp_path.rglob("*.npz"))
        hx.pp.embed(reference, Thumbnail())
    np.testing.assert_array_equal(sdata["table"].obsm[KEY], reference["table"].obsm[KEY])


def test_tiles_without_a_table_get_one(plain_section):
    sdata = plain_section(table=False)
    sdata["tiles"] = sdata["spots"].reset_index(drop=True)
    set_transformation(sdata["tiles"], {"global": Identity()}, set_all=True)
    hx.pp.embed(sdata, Thumbnail())
    table = sdata["thumbnail_tiles"]
    assert table.obsm[KEY].shape == (12, 192)
    assert table.obs["tile_id"].tolist() == list(range(12))
    assert table.uns["spatialdata_attrs"]["region"] == "tiles"
    hx.pp.embed(sdata, Thumbnail(tile_um=64), key_added="X_wide")
    assert set(sdata.tables) == {"thumbnail_tiles"}
    assert {KEY, "X_wide"} <= set(sdata["thumbnail_tiles"].obsm)
    assert {"thumbnail_padded", "wide_padded"} <= set(sdata["thumbnail_tiles"].obs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_stored_and_read_back_it_is_still_the_same(plain_section, tmp_path):
    sdata = plain_section()
    hx.pp.embed(sdata, Thumbnail())
    sdata.write(tmp_path / "section.zarr")
    back = sd.read_zarr(tmp_path / "section.zarr")
    np.testing.assert_array_equal(back["table"].obsm[KEY], sdata["table"].obsm[KEY])
    hx.pp.embed(back, Thumbnail(fail_after=0))


def test_several_regions_have_their_own_images(plain_section):
    a, b = plain_section(smooth(), centres=[[100, 100], [200, 300]]), plain_section(centres=[[150, 100], [250, 350]])
    both = sd.concatenate({"a": a, "b": b}, concatenate_tables=True)
    with pytest.raises(MissingKeyError, match="spots-b"):
        hx.pp.embed(both, Thumbnail(), image_key={"spots-a": "image-a"})
    values = hx.pp.embed(both, Thumbnail(), image_key={"spots-a": "image-a", "spots-b": "image-b"}, copy=True)
    single = np.vstack([hx.pp.embed(a, Thumbnail(), copy=True), hx.pp.embed(b, Thumbnail(), copy=True)])
    np.testing.assert_array_equal(values, single)
    np.testing.assert_array_equal(hx.pp.embed(both, Thumbnail(), copy=True), single)
    # the shapes name the table, and a table is embedded whole
    np.testing.assert_array_equal(hx.pp.embed(both, Thumbnail(), shapes_key="spots-a", copy=True), single)


def test_errors_leave_the_object_untouched(plain_section):
    outside = plain_section(centres=[[100, 100], [700, 100]])
    with pytest.raises(GeometryError, match="1 of 2"):
        hx.pp.embed(outside, Thumbnail())
    numbers = plain_section(ids=range(12))
    numbers["table"].obs["spot_id"] = numbers["table"].obs["spot_id"].astype(str)
    with pytest.raises(GeometryError, match="astype"):
        hx.pp.embed(numbers, Thumbnail())
    coarse = plain_section(mpp=10.0)
    with pytest.warns(HespotexWarning, match="preview"), pytest.raises(ScaleError, match="enlarge"):
        hx.pp.embed(coarse, Thumbnail())
    with pytest.raises(ScaleError, match="set_scale"):
        hx.pp.embed(plain_section(mpp=None), Thumbnail())
    for sdata in (outside, numbers, coarse):
        assert KEY not in sdata["table"].obsm
        assert "hespotex" not in sdata["table"].uns


@pytest.mark.parametrize("table", [True, False])
def test_interrupted_writing_leaves_nothing(plain_section, monkeypatch, table):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hespotex.pp._embed.spot_radius", interrupted)
    sdata = plain_section(table=table)
    before = stored(sdata)
    with pytest.raises(KeyboardInterrupt):
        hx.pp.embed(sdata, Thumbnail(), shapes_key="spots")
    assert stored(sdata) == before


def test_features_and_flags_of_others_are_not_replaced(plain_section):
    sdata = plain_section()
    sdata["table"].obsm[KEY] = np.ones((12, 3))
    with pytest.raises(DataValueError, match=r"obsm\['X_thumbnail'\].*did not make"):
        hx.pp.embed(sdata, Thumbnail(fail_after=0))
    sdata["table"].obs["other_padded"] = 0
    with pytest.raises(DataValueError, match=r"obs\['other_padded'\]"):
        hx.pp.embed(sdata, Thumbnail(fail_after=0), key_added="X_other")
    hx.pp.embed(sdata, Thumbnail(), key_added="X_own")
    hx.pp.embed(sdata, Thumbnail(tile_um=64), key_added="X_own")


def test_arguments(plain_section):
    sdata = plain_section()
    with pytest.raises(DataValueError, match="made already"):
        hx.pp.embed(sdata, Thumbnail(), tile_um=20)
    with pytest.raises(DataValueError, match="batch_size=0"):
        hx.pp.embed(sdata, Thumbnail(), batch_size=0)
    with pytest.raises(DataTypeError, match="a name, an Encoder, a torch.nn.Module or a function"):
        hx.pp.embed(sdata, 3)
    with pytest.raises(DataTypeError, match="SpatialData"):
        hx.pp.embed(sdata["table"], Thumbnail())
    with pytest.raises(MissingKeyError, match="'nope'"):
        hx.pp.embed(sdata, Thumbnail(), shapes_key="nope")


def test_features_must_be_finite_and_complete(plain_section):
    class Broken(Thumbnail):
        def encode(self, tiles, device):
            return np.full((len(tiles), 192), np.nan, np.float32)

    class Lazy(Thumbnail):
        def embed(self, *arguments, **options):
            yield np.array([0]), np.zeros((1, 192), np.float32)

    sdata = plain_section()
    with pytest.raises(DataValueError, match="NaN"):
        hx.pp.embed(sdata, Broken())
    with pytest.raises(DataValueError, match="left out 12"):
        hx.pp.embed(sdata, Lazy())
    assert KEY not in sdata["table"].obsm
