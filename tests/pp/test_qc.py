"""Defects painted into slides are found where they are."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres
from hespotex.errors import DataValueError, GeometryError, HespotexWarning, MissingKeyError
from hespotex.io._assemble import transformations

from ..conftest import stored
from ..image.test_quality import tissue
from .defects import paint

CHECKS = ["focus", "pen", "blank", "fold"]
DEFECT = {"blur": "focus", "green": "pen", "blue": "pen", "black": "pen", "blank": "blank", "fold": "fold"}
SIDE, COUNT = 96, 6  # 36 tiles of 96 µm


def mosaic() -> tuple[np.ndarray, np.ndarray]:
    """Tissue of 36 tiles at 1 µm/px, (3, 576, 576), and the centres of the tiles."""
    tiles = tissue(COUNT**2, SIDE)
    pixels = tiles.reshape(COUNT, COUNT, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(COUNT * SIDE, COUNT * SIDE, 3)
    grid = (np.arange(COUNT) + 0.5) * SIDE
    return np.ascontiguousarray(pixels), np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)


@pytest.fixture
def slide(plain_section):
    """Maker of a slide with defects in some of its tiles."""

    def make(defects=None, **options):
        pixels, centres = mosaic()
        for row, defect in (defects or {}).items():
            paint(pixels, centres[row], SIDE, 1.0, defect)
        options = {"mpp": 1.0, "radius": SIDE / 2, "centres": centres, "ids": range(len(centres))} | options
        return plain_section(np.moveaxis(pixels, -1, 0).copy(), **options)

    return make


PLACES = {7: "blur", 10: "green", 14: "blue", 21: "black", 25: "blank", 28: "fold"}


def test_each_defect_is_found_where_it_is(slide):
    sdata = slide(PLACES)
    hx.pp.qc(sdata)
    obs = sdata["table"].obs.set_index("spot_id")
    for row, defect in PLACES.items():
        failing = {
            "focus": obs.loc[row, "qc_focus"] < 0.3,
            "pen": obs.loc[row, "qc_pen"] > 0.02,
            "blank": obs.loc[row, "qc_blank"] > 0.75,
            "fold": obs.loc[row, "qc_fold"] > 0.1,
        }
        assert failing[DEFECT[defect]], defect
    assert set(obs.index[~obs["qc_pass"]]) == set(PLACES)
    record = sdata["table"].uns["hespotex"]["qc"]
    assert record["created_by"] == "hespotex.pp.qc"
    assert record["limits"] == {"focus": 0.3, "pen": 0.02, "blank": 0.75, "fold": 0.1}
    assert record["failed"]["image"]["any"] == pytest.approx(len(PLACES) / COUNT**2)
    assert record["failed"]["image"]["pen"] == pytest.approx(3 / COUNT**2)


def test_chunks_levels_and_order_do_not_matter(slide):
    rng = np.random.default_rng(3)
    first = hx.pp.qc(slide(PLACES), copy=True, metrics=["entropy"])
    for options in ({"chunks": 97}, {"chunks": 256, "scale_factors": [2, 2]}):
        pd.testing.assert_frame_equal(hx.pp.qc(slide(PLACES, **options), copy=True, metrics=["entropy"]), first)
    shuffled = slide(PLACES)
    shuffled["table"] = shuffled["table"][rng.permutation(shuffled["table"].n_obs)].copy()
    shuffled["spots"] = shuffled["spots"].sample(frac=1, random_state=0)
    other = hx.pp.qc(shuffled, copy=True, metrics=["entropy"])
    pd.testing.assert_frame_equal(other.loc[first.index], first)


@pytest.mark.parametrize("mpp", [1.0, 0.7])
def test_the_border_of_the_image_is_no_detail(plain_section, mpp):
    from scipy import ndimage

    pixels, _ = mosaic()
    blurred = ndimage.gaussian_filter(pixels.astype(np.float32), (3 / mpp, 3 / mpp, 0)).astype(np.uint8)
    size = COUNT * SIDE
    at_border = np.array([[5, 200], [300, 4], [size - 6, 300], [250, size - 1], [3, size - 3], [size - 2, 2]])
    for image, passes in ((pixels, True), (blurred, False)):
        sdata = plain_section(
            np.moveaxis(image, -1, 0).copy(), mpp=mpp, radius=SIDE / 2, centres=at_border, ids=range(len(at_border))
        )
        scores = hx.pp.qc(sdata, copy=True)
        assert ((scores["qc_focus"] > 0.3) == passes).all()


def test_tiles_without_a_table_carry_their_scores(slide, tmp_path):
    sdata = slide(PLACES, table=False)
    sdata["tissue"] = _all_tissue(sdata)
    hx.pp.make_tiles(sdata, diameter_um=96, pitch_um=96)
    hx.pp.qc(sdata)
    tiles = sdata["tiles"]
    assert set(tiles.columns) >= {f"qc_{name}" for name in (*CHECKS, "pass")}
    assert 0 < (~tiles["qc_pass"]).sum() < len(tiles)
    sdata.write(tmp_path / "slide.zarr")
    back = sd.read_zarr(tmp_path / "slide.zarr")
    assert back["tiles"]["qc_focus"].to_numpy() == pytest.approx(tiles["qc_focus"].to_numpy(), nan_ok=True)
    record = back.attrs["hespotex"]["qc"]["tiles"]
    assert record == json.loads(json.dumps(sdata.attrs["hespotex"]["qc"]["tiles"]))
    assert record["failed"]["image"]["any"] == pytest.approx((~tiles["qc_pass"]).mean())
    hx.pp.qc(sdata)  # again
    hx.pp.make_tiles(sdata, diameter_um=96, pitch_um=192)  # tiles with scores are still ours
    assert "qc_pass" not in sdata["tiles"]


def _all_tissue(sdata):
    from geopandas import GeoDataFrame
    from shapely import box
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    frame = GeoDataFrame(geometry=[box(0, 0, COUNT * SIDE, COUNT * SIDE)])
    return ShapesModel.parse(frame, transformations=get_transformation(sdata["image"], get_all=True))


def test_an_embedding_of_tiles_is_not_the_place_for_scores(slide):
    sdata = slide(table=False)
    sdata["tissue"] = _all_tissue(sdata)
    hx.pp.make_tiles(sdata, diameter_um=96, pitch_um=192)
    hx.pp.embed(sdata, "rgb", tile_um=64)
    hx.pp.qc(sdata)
    assert "qc_pass" in sdata["tiles"]
    assert "qc_pass" not in sdata["rgb_tiles"].obs


def test_copy_returns_scores_or_their_summary(slide):
    sdata = slide(PLACES)
    before = stored(sdata)
    frame = hx.pp.qc(sdata, copy=True)
    summary = hx.pp.qc(sdata, copy=True, summary=True).set_index("check")
    assert stored(sdata) == before
    assert list(frame.index) == list(sdata["table"].obs_names)
    assert summary.loc["any", "failed"] == pytest.approx((~frame["qc_pass"]).mean())
    assert summary.loc["focus", "median"] == pytest.approx(float(np.nanmedian(frame["qc_focus"])))
    assert (summary["n_tiles"] == COUNT**2).all()
    hx.pp.qc(sdata)
    assert sdata["table"].obs["qc_focus"].to_numpy() == pytest.approx(frame["qc_focus"].to_numpy(), nan_ok=True)


def test_limits_decide_what_passes(slide):
    sdata = slide(PLACES)
    lenient = hx.pp.qc(sdata, copy=True, limits={"focus": 0, "pen": 1, "blank": 1, "fold": 1})
    strict = hx.pp.qc(sdata, copy=True, limits={"focus": 99})
    assert lenient["qc_pass"].all()
    assert not strict["qc_pass"].any() or strict.loc[strict["qc_pass"], "qc_focus"].isna().all()


def test_each_slide_of_a_table_is_judged_by_itself(slide):
    pale, dense = slide({28: "fold"}), slide()
    both = sd.concatenate({"a": pale, "b": dense}, concatenate_tables=True)
    hx.pp.qc(both)
    table = both["table"]
    alone = hx.pp.qc(pale, copy=True)
    rows = table.obs["region"] == "spots-a"
    joined = table.obs[rows].set_index(table.obs.loc[rows, "spot_id"].astype(int))
    own = alone.set_index(pale["table"].obs["spot_id"].to_numpy())
    assert joined["qc_fold"].loc[own.index].to_numpy() == pytest.approx(own["qc_fold"].to_numpy())
    assert set(table.uns["hespotex"]["qc"]["failed"]) == {"image-a", "image-b"}


def test_a_coarse_slide_has_no_focus(slide):
    with pytest.warns(HespotexWarning, match="focus cannot be judged"):
        frame = hx.pp.qc(slide(mpp=1.5), copy=True)
    assert frame["qc_focus"].isna().all()
    assert frame["qc_pass"].all()
    assert frame["qc_blank"].notna().all()


def test_bad_arguments(slide):
    sdata = slide()
    with pytest.raises(DataValueError, match=r"\['sharpness'\] are unknown; possible: \['focus'"):
        hx.pp.qc(sdata, limits={"sharpness": 1})
    with pytest.raises(DataValueError, match="'pen' must be a number"):
        hx.pp.qc(sdata, limits={"pen": -1})
    with pytest.raises(DataValueError, match="'sharpness' is unknown"):
        hx.pp.qc(sdata, metrics=["sharpness"])
    with pytest.raises(DataValueError, match="copy=True"):
        hx.pp.qc(sdata, summary=True)
    with pytest.raises(DataValueError, match="tile_um=0"):
        hx.pp.qc(sdata, tile_um=0)
    with pytest.raises(MissingKeyError, match="'other'"):
        hx.pp.qc(sdata, shapes_key="other")
    sdata["table"].obs["qc_pen"] = 1.0
    with pytest.raises(DataValueError, match="qc did not make it"):
        hx.pp.qc(sdata)
    outside = slide(centres=[[9000, 10]], ids=["a"])
    with pytest.raises(GeometryError, match="lie outside"):
        hx.pp.qc(outside)


@pytest.mark.data
@pytest.mark.parametrize("name", ["skin", "brain"])
def test_defects_on_real_slides(data_dir, name):
    """One tile in four is painted: how many of these are found, and how many of the others are let pass."""
    sdata = _real(data_dir, name)
    key = "tiles" if name == "skin" else "spots"
    slide = resolve_slide(sdata)
    centres = shape_centres(sdata, key, slide)
    pixels = np.ascontiguousarray(np.moveaxis(slide.levels[0].array.compute(scheduler="synchronous"), 0, -1))
    hit = np.random.default_rng(1).permutation(len(centres)) < len(centres) // 4
    clean = hx.pp.qc(sdata, copy=True, tile_um=100, shapes_key=key)
    for defect, sensitivity in {"blur": 0.9, "green": 1, "blue": 1, "black": 1, "blank": 1, "fold": 0.6}.items():
        painted = pixels.copy()
        for row in np.flatnonzero(hit):
            paint(painted, centres[row], 100 / slide.mpp, slide.mpp, defect, strength=2.5 if defect == "fold" else 2)
        image = Image2DModel.parse(
            np.moveaxis(painted, -1, 0), dims=("c", "y", "x"), transformations=transformations(slide.mpp)
        )
        again = sd.SpatialData(images={"image": image}, shapes={key: sdata.shapes[key]})
        scores = hx.pp.qc(again, shapes_key=key, copy=True, tile_um=100)
        check = f"qc_{DEFECT[defect]}"
        limit = {"qc_focus": 0.3, "qc_pen": 0.02, "qc_blank": 0.75, "qc_fold": 0.1}[check]
        failed = (scores[check] < limit if check == "qc_focus" else scores[check] > limit).to_numpy()
        assert failed[hit].mean() >= sensitivity, defect
        assert failed[~hit].mean() <= 0.1, defect  # skin has real green ink at its margin
    assert (clean["qc_focus"] > 0.4).all()


def _real(data_dir, name):
    if name == "skin":
        sdata = hx.io.read_image(data_dir / "slide_cmu1_small" / "CMU-1-Small-Region.svs")
        hx.pp.detect_tissue(sdata)
        hx.pp.make_tiles(sdata, pitch_um=100)
        return sdata
    import anndata as ad

    folder = data_dir / "visium_mouse_brain_crop"
    return hx.io.from_anndata(ad.read_h5ad(folder / "visium_crop.h5ad"), folder / "visium_crop.jpg")
