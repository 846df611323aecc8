from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd

import hespotex as hx
from hespotex.data import partial
from hespotex.data.geometry import resolve_slide, shape_centres
from hespotex.encoders import EncoderInfo, TileEncoder, _base
from hespotex.errors import DataTypeError, DataValueError, HespotexWarning, MissingKeyError
from hespotex.segmentation._outline import FEATURES

from ..conftest import fresh, stored


class Thumbnail(TileEncoder):
    """What the encoder saw, 8 × 8 px."""

    info = EncoderInfo(name="thumbnail", n_features=192)
    name, tile_px, n_features = "thumbnail", 8, 192

    def __init__(self, *, tile_um: float | None = None, mpp: float | None = None, fail_after: int | None = None):
        self.set_size(tile_um, mpp, default_um=8.0)
        self.fail_after, self.seen = fail_after, 0

    def params(self):
        return {"name": self.name, "tile_um": self.tile_um}

    def encode(self, tiles, device):
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(tiles)
        return tiles.reshape(len(tiles), -1).astype(np.float32)


@pytest.fixture(scope="module")
def _with_nuclei():
    sdata = hx.datasets.synthetic(size_px=400, pitch_um=40.0, diameter_um=40.0, n_genes=20, seed=2)
    hx.pp.segment_nuclei(sdata, n_jobs=1, raster=False)
    return sdata


@pytest.fixture
def sdata(_with_nuclei):
    return fresh(_with_nuclei)


@pytest.fixture
def foreign(sdata):
    """The same nuclei as outlines of another tool, without a table."""
    cells = sdata["nuclei"][["geometry"]].set_axis([f"cell_{i}" for i in range(len(sdata["nuclei"]))])
    for name in ("nuclei", "nuclei_features"):
        del sdata[name]
    sdata["cells"] = cells
    return sdata


def test_features_and_shape_numbers_are_kept_with_the_nuclei(sdata):
    assert hx.pp.embed_nuclei(sdata) is None
    table = sdata["nuclei_features"]
    record = table.uns["hespotex"]["X_morphology"]
    assert (record["tile_um"], record["encoder"]["context_um"]) == (16.0, 48.0)
    assert record["created_by"] == "hespotex.pp.embed"
    assert table.obsm["X_morphology"].dtype == np.float32
    assert np.isfinite(table.obsm["X_morphology"]).all()
    np.testing.assert_array_equal(table.obsm["X_morphometrics"], table.X)
    assert list(table.uns["hespotex"]["X_morphometrics"]["features"]) == list(FEATURES)
    assert "morphology_padded" in table.obs
    assert "X_morphology" not in sdata["table"].obsm


def test_it_is_embed_at_the_nuclei(sdata):
    features = hx.pp.embed_nuclei(sdata, "rgb", tile_um=10, copy=True)
    np.testing.assert_array_equal(features, hx.pp.embed(sdata, "rgb", shapes_key="nuclei", tile_um=10, copy=True))
    assert features.shape == (len(sdata["nuclei"]), 3)
    assert set(sdata["nuclei_features"].obsm) == {"spatial"}


def test_crops_are_the_pixels_around_the_centroid(sdata):
    hx.pp.embed_nuclei(sdata, "crops", morphometrics=False)
    crops = sdata["nuclei_features"].obsm["X_crops"].reshape(-1, 28, 28, 3)
    centres = shape_centres(sdata, "nuclei", resolve_slide(sdata))
    image = np.asarray(sdata["image"]).transpose(1, 2, 0)
    inner = np.flatnonzero(np.abs(centres - 200).max(axis=1) < 150)[:10]
    for row in inner:
        x, y = np.rint(centres[row] - 14).astype(int)
        near = image[y : y + 28, x : x + 28].astype(float)
        assert np.abs(crops[row] - near).mean() < 15  # but for a fraction of a pixel
    assert "X_morphometrics" not in sdata["nuclei_features"].obsm


def test_what_is_there_is_not_computed_again(sdata):
    hx.pp.embed_nuclei(sdata, Thumbnail())
    hx.pp.embed_nuclei(sdata, Thumbnail(fail_after=0))
    hx.pp.embed_nuclei(sdata, Thumbnail(), masked=True)
    hx.pp.embed_nuclei(sdata, Thumbnail(fail_after=0), masked=True)
    assert {"X_thumbnail", "X_thumbnail_masked"} <= set(sdata["nuclei_features"].obsm)


@pytest.mark.parametrize("masked", [False, True])
def test_interrupted_work_goes_on(sdata, monkeypatch, tmp_path, masked):
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)
    monkeypatch.setattr(_base, "_TILES_PER_RUN", 4)
    before = stored(sdata)
    expected = hx.pp.embed_nuclei(sdata, Thumbnail(), masked=masked, copy=True)
    with hx.settings.override(cache_dir=tmp_path, batch_size=4):
        with pytest.warns(HespotexWarning, match="interrupted after 8"), pytest.raises(KeyboardInterrupt):
            hx.pp.embed_nuclei(sdata, Thumbnail(fail_after=8), masked=masked)
        assert stored(sdata) == before
        encoder = Thumbnail()
        hx.pp.embed_nuclei(sdata, encoder, masked=masked)
    assert encoder.seen == len(expected) - 8
    key = "X_thumbnail_masked" if masked else "X_thumbnail"
    np.testing.assert_array_equal(sdata["nuclei_features"].obsm[key], expected)


@pytest.mark.parametrize(("encoder", "masked"), [("morphology", False), ("crops", True)])
def test_a_cluster_gives_the_same(sdata, cluster, encoder, masked):
    local = hx.pp.embed_nuclei(sdata, encoder, masked=masked, batch_size=4, copy=True)
    remote = hx.pp.embed_nuclei(sdata, encoder, masked=masked, batch_size=4, copy=True, client=cluster)
    np.testing.assert_array_equal(remote, local)


def test_masked_tiles_are_grey_outside_the_outline(sdata):
    """8 px of 1 µm: the middle of a pixel lies inside or outside."""
    from shapely import Point

    plain = hx.pp.embed_nuclei(sdata, Thumbnail(), copy=True).reshape(-1, 8, 8, 3)
    masked = hx.pp.embed_nuclei(sdata, Thumbnail(), masked=True, copy=True).reshape(-1, 8, 8, 3)
    outlines = sdata["nuclei"].geometry.to_numpy()
    for row in range(0, len(plain), 7):
        centre = np.array(outlines[row].centroid.coords[0])
        for y, x in np.ndindex(8, 8):
            point = Point(*(centre + (np.array([x, y]) + 0.5 - 4) / 0.5))
            if outlines[row].exterior.distance(point) < 0.05:
                continue
            expected = plain[row, y, x] if outlines[row].contains(point) else 128
            np.testing.assert_array_equal(masked[row, y, x], np.broadcast_to(expected, 3))


def test_masks_follow_the_outlines(sdata):
    """Wider outlines around the same centroids make other features."""
    disc = sdata["nuclei"].geometry.centroid
    sdata["nuclei"]["geometry"] = disc.buffer(4)
    hx.pp.embed_nuclei(sdata, Thumbnail(), masked=True)
    narrow = sdata["nuclei_features"].obsm["X_thumbnail_masked"].copy()
    sdata["nuclei"]["geometry"] = disc.buffer(7)
    hx.pp.embed_nuclei(sdata, Thumbnail(), masked=True)
    wide = sdata["nuclei_features"].obsm["X_thumbnail_masked"]
    assert ((wide != 128).mean() / (narrow != 128).mean()) > 1.5


def test_nuclei_of_another_tool_get_a_table(foreign):
    hx.pp.embed_nuclei(foreign, "rgb", shapes_key="cells")
    table = foreign["cells_features"]
    assert table.obs_names[0] == "cell_0"
    assert table.uns["spatialdata_attrs"]["region"] == "cells"
    assert table.uns["hespotex"]["table"] == "nuclei"
    assert table.obsm["X_morphometrics"].shape == (table.n_obs, 7)
    np.testing.assert_array_equal(table.obsm["X_morphometrics"], table.X)
    assert list(table.var_names) == list(FEATURES[:7])
    hx.pp.embed_nuclei(foreign, Thumbnail(), shapes_key="cells", masked=True)
    assert {"X_rgb", "X_thumbnail_masked"} <= set(table.obsm)
    assert set(foreign.tables) == {"table", "cells_features"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_stored_and_read_back(foreign, tmp_path):
    hx.pp.embed_nuclei(foreign, Thumbnail(), shapes_key="cells")
    foreign.write(tmp_path / "section.zarr")
    back = sd.read_zarr(tmp_path / "section.zarr")
    hx.pp.embed_nuclei(back, Thumbnail(fail_after=0), shapes_key="cells")
    np.testing.assert_array_equal(
        back["cells_features"].obsm["X_thumbnail"], foreign["cells_features"].obsm["X_thumbnail"]
    )


def test_a_prediction_for_the_nuclei_is_no_place_for_features(sdata, foreign):
    from hespotex.data.tables import mark_table

    hx.pp.embed_nuclei(foreign, "rgb", shapes_key="cells")
    prediction = foreign["cells_features"].copy()
    mark_table(prediction, "prediction")
    foreign["predicted_cells"] = prediction
    hx.pp.embed_nuclei(foreign, Thumbnail(), shapes_key="cells")
    assert "X_thumbnail" in foreign["cells_features"].obsm
    del foreign["cells_features"]
    hx.pp.embed_nuclei(foreign, Thumbnail(), shapes_key="cells")
    assert "X_thumbnail" in foreign["cells_features"].obsm
    assert "X_thumbnail" not in foreign["predicted_cells"].obsm


def test_errors_say_what_to_do_and_leave_the_object_alone(sdata, section):
    before = stored(sdata)
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.segment_nuclei\(sdata\)"):
        hx.pp.embed_nuclei(section)
    with pytest.raises(MissingKeyError, match="'nope'"):
        hx.pp.embed_nuclei(sdata, shapes_key="nope")
    with pytest.raises(MissingKeyError, match="'nope'"):
        hx.pp.embed_nuclei(sdata, table_key="nope")
    with pytest.raises(DataTypeError, match="SpatialData"):
        hx.pp.embed_nuclei(sdata["table"])
    with pytest.raises(DataValueError, match="one tile at a time"):
        hx.pp.embed_nuclei(sdata, masked=True)
    with pytest.raises(DataValueError, match="batch_size=0"):
        hx.pp.embed_nuclei(sdata, batch_size=0)
    with pytest.raises(DataTypeError, match="colour"):
        hx.pp.embed_nuclei(sdata, colour=True)
    assert stored(sdata) == before
    sdata["nuclei_features"].obsm["X_morphometrics"] = np.ones((sdata["nuclei_features"].n_obs, 2))
    with pytest.raises(DataValueError, match="did not make"):
        hx.pp.embed_nuclei(sdata, Thumbnail(fail_after=0))
    hx.pp.embed_nuclei(sdata, Thumbnail(), morphometrics=False)


def test_empty_shapes(foreign):
    foreign["cells"].drop(index=foreign["cells"].index, inplace=True)
    with pytest.raises(MissingKeyError, match="empty"):
        hx.pp.embed_nuclei(foreign, shapes_key="cells")
