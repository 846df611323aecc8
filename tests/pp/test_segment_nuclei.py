from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from geopandas import GeoDataFrame
from shapely import box
from spatialdata import SpatialData, get_element_annotators, read_zarr
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation, set_transformation

import hespotex as hx
from hespotex.errors import (
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    MissingWeightsError,
    OutputError,
    ScaleError,
)
from hespotex.pp import _nuclei_source, _segment_nuclei
from hespotex.segmentation import Watershed, _kept, _store
from hespotex.segmentation._nuclei import Nuclei

from ..segmentation._scenes import discs, lattice, matched

MPP = 0.5
SIDE = 320
SPOTS = np.array([[100.0, 100.0], [200, 100], [100, 220], [240, 240]])
RADIUS = 40.0


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    return discs((SIDE, SIDE), lattice((SIDE, SIDE), 30), 8)


def make(image: np.ndarray, *, table: bool = True, mpp: float | None = MPP, multiscale: bool = False) -> SpatialData:
    systems = {"global": Identity()}
    if mpp:
        systems["microns"] = Scale([mpp, mpp], axes=("x", "y"))
    element = Image2DModel.parse(
        np.moveaxis(image, -1, 0),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations=systems,
        scale_factors=[2] if multiscale else None,
    )
    spots = ShapesModel.parse(
        SPOTS, geometry=0, radius=np.full(len(SPOTS), RADIUS), index=list("abcd"), transformations=systems
    )
    tables = {}
    if table:
        # Rows in another order than the shapes: they are joined by name.
        obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 4), "spot_id": list("dcba")}, index=list("dcba"))
        tables["table"] = TableModel.parse(
            AnnData(np.ones((4, 2), np.float32), obs=obs), region="spots", region_key="region", instance_key="spot_id"
        )
    return SpatialData(images={"image": element}, shapes={"spots": spots}, tables=tables)


def expected_counts(truth: np.ndarray) -> np.ndarray:
    """Discs whose centre lies in each spot, in the order of the table's rows."""
    centres = np.array([np.argwhere(truth == name).mean(axis=0)[::-1] + 0.5 for name in range(1, truth.max() + 1)])
    inside = np.hypot(*(centres[None] - SPOTS[::-1, None]).transpose(2, 0, 1)) <= RADIUS
    return inside.sum(axis=1)


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
def test_everything_is_written_where_the_contract_says(scene, tmp_path) -> None:
    image, truth = scene
    sdata = make(image)
    assert hx.pp.segment_nuclei(sdata, n_jobs=1) is None
    hits, n_true, n_found = matched(truth, sdata["nuclei_labels"].values)
    assert hits == n_true == n_found == len(sdata["nuclei"]) == sdata["nuclei_features"].n_obs

    table = sdata["table"]
    assert np.array_equal(table.obs["n_nuclei"], expected_counts(truth))
    window = [len(np.unique(sdata["nuclei_labels"].values[int(y) - 40 : int(y) + 40, int(x) - 40 : int(x) + 40]))
              for x, y in SPOTS[::-1]]  # fmt: skip
    assert table.obs["n_nuclei_window"].tolist() == window
    note = table.uns["hespotex"]["n_nuclei"]
    assert note["params"] == {"method": "watershed", "diameter_um": 8.0, "simplify_um": 0.25}
    assert note["created_by"] == "hespotex.pp.segment_nuclei"

    features = sdata["nuclei_features"]
    assert list(features.var_names[:2]) == ["area_um2", "perimeter_um"]
    assert features.obs["nucleus_id"].tolist() == sdata["nuclei"]["nucleus_id"].tolist()
    assert abs(np.median(features[:, "area_um2"].X) - np.pi * 16) < 5
    assert set(sdata.coordinate_systems) == {"global", "microns"}
    for name in ("nuclei", "nuclei_labels"):
        assert name in sdata.filter_by_coordinate_system("microns")

    sdata.write(tmp_path / "section.zarr")
    again = read_zarr(tmp_path / "section.zarr")
    assert np.array_equal(again["nuclei_labels"].values, sdata["nuclei_labels"].values)
    assert np.array_equal(again["nuclei_features"].X, features.X)
    assert again["nuclei"].geometry.geom_equals_exact(sdata["nuclei"].geometry, 1e-9).all()
    hx.pp.segment_nuclei(again, n_jobs=1)
    assert len(again["nuclei"]) == len(sdata["nuclei"])


def test_copy_returns_outlines_and_writes_nothing(scene) -> None:
    sdata = make(scene[0])
    outlines = hx.pp.segment_nuclei(sdata, copy=True, n_jobs=1)
    assert len(outlines) == scene[1].max()
    assert list(sdata.shapes) == ["spots"]
    assert not sdata.labels
    assert list(sdata["table"].obs) == ["region", "spot_id"]
    assert "hespotex" not in sdata["table"].uns


def test_a_slide_without_a_table_gets_nuclei_and_no_counts(scene) -> None:
    sdata = make(scene[0], table=False)
    hx.pp.segment_nuclei(sdata, n_jobs=1)
    assert set(sdata.tables) == {"nuclei_features"}
    with pytest.raises(MissingKeyError, match="absent"):
        hx.pp.segment_nuclei(sdata, table_key="absent")


def test_the_nuclei_table_is_never_taken_for_the_measurement(scene) -> None:
    sdata = make(scene[0])
    hx.pp.segment_nuclei(sdata, n_jobs=1)
    hx.pp.segment_nuclei(sdata, n_jobs=1, raster=False)
    assert "nuclei_labels" not in sdata.labels
    assert "n_nuclei_window" not in sdata["table"].obs
    assert "n_nuclei" not in sdata["nuclei_features"].obs


def test_a_fine_image_is_read_coarser_and_outlines_lie_in_its_pixels(scene) -> None:
    image, truth = discs((480, 480), lattice((480, 480), 60), 16)
    sdata = make(image, mpp=0.25, multiscale=True)
    hx.pp.segment_nuclei(sdata, n_jobs=1)
    assert sdata["nuclei_labels"].shape == (240, 240)
    assert np.array_equal(sdata["table"].obs["n_nuclei"], expected_counts(truth))
    extent = sdata["nuclei"].total_bounds
    assert extent[2] > 300


@pytest.mark.parametrize("kind", ["array", "file", "element", "path"])
def test_labels_that_are_there_are_taken_as_they_are(scene, kind: str, tmp_path) -> None:
    image, truth = scene
    sdata, labels = make(image), np.where(truth > 0, truth + 100, 0)
    np.save(tmp_path / "nuclei.npy", labels)
    if kind == "element":
        sdata["mine"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": Identity()})
    method = {"array": labels, "file": tmp_path / "nuclei.npy", "element": "mine", "path": str(tmp_path / "nuclei.npy")}
    hx.pp.segment_nuclei(sdata, method[kind], n_jobs=1)
    assert np.array_equal(sdata["nuclei_labels"].values, labels)
    assert sorted(sdata["nuclei"]["nucleus_id"]) == list(range(101, 101 + truth.max()))
    assert np.array_equal(sdata["table"].obs["n_nuclei"], expected_counts(truth))
    # Labels of this slide say nothing about how to segment another one.
    assert sdata["table"].uns["hespotex"]["n_nuclei"]["params"] == {}


def test_labels_of_a_coarser_level_are_placed_on_the_image(scene) -> None:
    image, truth = scene
    sdata = make(image, multiscale=True)
    hx.pp.segment_nuclei(sdata, truth[::2, ::2], n_jobs=1)
    assert np.array_equal(sdata["table"].obs["n_nuclei"], expected_counts(truth))


def test_any_function_of_an_image_is_a_method(scene) -> None:
    from skimage.measure import label

    image, truth = scene
    sdata = make(image)
    hx.pp.segment_nuclei(sdata, lambda rgb: label(rgb[..., 0] < 160, connectivity=1), n_jobs=1, key_added="mine")
    assert {"mine", "mine_labels", "mine_features"} <= {name for _, name, _ in sdata.gen_elements()}
    assert np.array_equal(sdata["table"].obs["n_nuclei"], expected_counts(truth))


def test_rows_of_other_regions_are_left_alone(scene) -> None:
    sdata = make(scene[0])
    other = sdata["spots"].copy()
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 4 + ["more"] * 4), "spot_id": list("abcdabcd")})
    obs.index = obs.index.astype(str)
    sdata["more"] = other
    sdata["table"] = TableModel.parse(
        AnnData(np.ones((8, 2), np.float32), obs=obs),
        region=["spots", "more"],
        region_key="region",
        instance_key="spot_id",
    )
    hx.pp.segment_nuclei(sdata, shapes_key="spots", n_jobs=1)
    counts = sdata["table"].obs["n_nuclei"]
    assert counts[:4].notna().all()
    assert counts[4:].isna().all()
    hx.pp.segment_nuclei(sdata, shapes_key="more", n_jobs=1)
    counts = sdata["table"].obs["n_nuclei"]
    assert counts.dtype == np.int64
    assert np.array_equal(counts[:4], counts[4:])


BAD = {
    "unknown method": ({"method": "stardist"}, MissingKeyError, "stardist"),
    "missing file": ({"method": "nowhere.npy"}, MissingKeyError, "nowhere.npy"),
    "labels of another size": ({"method": np.zeros((5, 7), int)}, DataValueError, "7 × 5 px"),
    "float labels": ({"method": np.zeros((SIDE, SIDE))}, DataTypeError, "float64"),
    "a mask": ({"method": np.zeros((SIDE, SIDE), bool)}, DataTypeError, "number the nuclei"),
    "negative labels": ({"method": np.full((SIDE, SIDE), -1)}, DataValueError, "negative label -1"),
    "no mpp": ({"mpp": 0}, DataValueError, "mpp=0"),
    "no tolerance": ({"simplify_um": -0.1}, DataValueError, "simplify_um=-0.1"),
    "no threads": ({"n_jobs": 0}, DataValueError, "n_jobs=0"),
    "no nuclei": ({"method": np.zeros((SIDE, SIDE), int)}, DataValueError, "no nuclei"),
    "a number": ({"method": 3}, DataTypeError, "int"),
    "negative diameter": ({"diameter_um": -1}, DataValueError, "diameter_um=-1"),
    "coarse": ({"mpp": 4.0}, ScaleError, "2.0 px"),
    "too fine": ({"mpp": 0.1}, ScaleError, "enlarge"),
    "mpp with labels": ({"method": np.ones((SIDE, SIDE), int), "mpp": 0.5}, DataValueError, "labels have one"),
    "no weights": ({"method": "cellpose", "model": "nowhere"}, MissingWeightsError, "nowhere"),
    "a file that is no network": ({"method": "instanseg", "model": "nowhere"}, MissingWeightsError, "nowhere"),
    "unknown network": ({"method": "lazyslide:uni"}, MissingKeyError, "uni"),
    "missing geojson": ({"method": "nowhere.geojson"}, MissingKeyError, "nowhere.geojson"),
    "no client": ({"client": 3}, DataTypeError, "client"),
    "weights for watershed": ({"model": "nowhere"}, DataValueError, "cellpose"),
    "no image": ({"image_key": "absent"}, MissingKeyError, "absent"),
    "taken name": ({"key_added": "spots"}, DataValueError, "spots"),
    "bad function": ({"method": lambda rgb: np.zeros((2, 2), int)}, DataValueError, "shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error_and_changes_nothing(scene, case: str) -> None:
    arguments, error, message = BAD[case]
    sdata = make(scene[0])
    with pytest.raises(error, match=message):
        hx.pp.segment_nuclei(sdata, **arguments)
    assert {name for _, name, _ in sdata.gen_elements()} == {"image", "spots", "table"}
    assert list(sdata["table"].obs) == ["region", "spot_id"]


def test_a_blank_slide_has_no_nuclei_and_says_so() -> None:
    sdata = make(np.full((SIDE, SIDE, 3), 240, np.uint8))
    with pytest.raises(DataValueError, match="no nuclei"):
        hx.pp.segment_nuclei(sdata)
    assert "n_nuclei" not in sdata["table"].obs


def test_an_unknown_scale_is_an_error(scene) -> None:
    with pytest.raises(ScaleError, match="set_scale"):
        hx.pp.segment_nuclei(make(scene[0], mpp=None))


def test_labels_elsewhere_are_refused(scene) -> None:
    from spatialdata.transformations import Translation

    sdata = make(scene[0])
    sdata["mine"] = Labels2DModel.parse(
        scene[1], dims=("y", "x"), transformations={"global": Translation([50, 0], axes=("x", "y"))}
    )
    with pytest.raises(GeometryError, match="do not cover"):
        hx.pp.segment_nuclei(sdata, "mine")
    sdata["other"] = Labels2DModel.parse(scene[1], dims=("y", "x"), transformations={"elsewhere": Identity()})
    with pytest.raises(GeometryError, match="no coordinate system"):
        hx.pp.segment_nuclei(sdata, "other")
    # The first and the last corner of a square lie where they should, and all else is turned over.
    turned = Affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    sdata["turned"] = Labels2DModel.parse(scene[1], dims=("y", "x"), transformations={"global": turned})
    with pytest.raises(GeometryError, match="do not cover"):
        hx.pp.segment_nuclei(sdata, "turned")
    near = Translation([3, 0], axes=("x", "y"))
    sdata["near"] = Labels2DModel.parse(scene[1], dims=("y", "x"), transformations={"global": near})
    with pytest.raises(GeometryError, match="do not cover"):
        hx.pp.segment_nuclei(sdata, "near")


def test_large_numbers_of_labels_are_the_same_in_a_store(scene, tmp_path) -> None:
    image, truth = scene
    labels = np.where(truth > 0, truth.astype(np.uint32) + np.uint32(3_000_000_000), 0).astype(np.uint32)
    hx.pp.segment_nuclei(make(image), labels, target=tmp_path / "nuclei.zarr", n_jobs=1)
    assert np.array_equal(read_zarr(tmp_path / "nuclei.zarr")["nuclei_labels"].values, labels)


def test_outlines_are_simplified_as_asked(scene) -> None:
    full, rough = make(scene[0]), make(scene[0])
    hx.pp.segment_nuclei(full, simplify_um=0, n_jobs=1)
    hx.pp.segment_nuclei(rough, n_jobs=1)
    assert full["nuclei"].count_coordinates().sum() > 1.5 * rough["nuclei"].count_coordinates().sum()
    assert np.array_equal(full["nuclei_features"].X, rough["nuclei_features"].X)
    assert full["table"].uns["hespotex"]["n_nuclei"]["params"]["simplify_um"] == 0
    outlines = hx.pp.segment_nuclei(full, "nuclei", simplify_um=0.5, copy=True, n_jobs=1)
    assert outlines.geometry.geom_equals_exact(full["nuclei"].geometry, 0).all()


def test_nuclei_of_somebody_else_are_not_overwritten(scene) -> None:
    sdata = make(scene[0])
    sdata["nuclei"] = sdata["spots"].copy()
    with pytest.raises(DataValueError, match="nuclei_2"):
        hx.pp.segment_nuclei(sdata)
    del sdata["nuclei"]
    sdata["table"].obs["n_nuclei"] = 7
    with pytest.raises(DataValueError, match=r"obs\['n_nuclei'\]"):
        hx.pp.segment_nuclei(sdata)
    assert "nuclei" not in sdata


def xenium_like(sdata: SpatialData, key: str = "nucleus_boundaries") -> GeoDataFrame:
    """The nuclei of `sdata` as Xenium has them: in µm that are turned and shifted on the image, with text for ids."""
    from shapely import affinity

    # The image lies turned by 90° in "xenium": (x, y) px are (700 - y / 2, x / 2 + 30) µm.
    to_um = Affine([[0, -0.5, 700], [0.5, 0, 30], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata["image"], to_um, "xenium")
    outlines = sdata["nuclei"].geometry
    moved = [affinity.affine_transform(outline, [0, -0.5, 0.5, 0, 700, 30]) for outline in outlines]
    ids = [f"aaaa{number:04d}-1" for number in range(len(moved))]
    frame = GeoDataFrame(geometry=moved, index=ids).sample(frac=1, random_state=0)
    sdata[key] = ShapesModel.parse(frame, transformations={"xenium": Identity()})
    return frame


@pytest.fixture
def segmented(scene) -> SpatialData:
    sdata = make(scene[0])
    hx.pp.segment_nuclei(sdata, n_jobs=1)
    return sdata


def test_boundaries_of_xenium_are_taken_as_they_are(scene, segmented) -> None:
    image, truth = scene
    frame = xenium_like(segmented)
    before, expected = segmented["nuclei"], segmented["nuclei_features"].to_df()
    hx.pp.segment_nuclei(segmented, "nucleus_boundaries", n_jobs=1, key_added="given")

    table, outlines = segmented["given_features"], segmented["given"]
    assert sorted(outlines.index) == sorted(frame.index)
    assert table.obs["nucleus_id"].tolist() == outlines["nucleus_id"].tolist() == outlines.index.tolist()
    number = outlines.index.str[4:8].astype(int).to_numpy()
    assert outlines.geometry.geom_equals_exact(before.geometry.iloc[number].set_axis(outlines.index), 1e-6).all()
    assert set(get_transformation(outlines, get_all=True)) == {"global", "microns", "xenium"}
    assert np.array_equal(segmented["table"].obs["n_nuclei"], expected_counts(truth))
    assert segmented["table"].uns["hespotex"]["n_nuclei"]["params"] == {}
    np.testing.assert_allclose(
        table[:, "mean_haematoxylin"].X.ravel(), expected["mean_haematoxylin"].to_numpy()[number], rtol=0.1
    )
    labels = segmented["given_labels"].values
    for label, (x, y) in zip(table.obs["label"], table.obsm["spatial"], strict=True):
        assert labels[int(y), int(x)] == label
    hx.pp.embed_nuclei(segmented, shapes_key="given")
    assert segmented["given_features"].obsm["X_morphology"].shape[0] == len(frame)


def test_outlines_of_qupath_are_taken_as_they_are(scene, segmented, tmp_path) -> None:
    before = segmented["nuclei"]
    features = [
        {
            "type": "Feature",
            "id": f"uuid-{name}",
            "geometry": shape.__geo_interface__,
            "properties": {"objectType": "detection", "classification": {"name": "Tumor" if name % 2 else "Stroma"}},
        }
        for name, shape in before.geometry.items()
    ]
    path = tmp_path / "cells.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    for method in (path, str(path)):
        sdata = make(scene[0])
        hx.pp.segment_nuclei(sdata, method, n_jobs=1)
        assert sdata["nuclei"].index.tolist() == [f"uuid-{name}" for name in before.index]
        assert sdata["nuclei"].geometry.geom_equals_exact(before.geometry.set_axis(sdata["nuclei"].index), 0).all()
        classes = sdata["nuclei_features"].obs["classification"]
        assert classes.tolist() == ["Tumor" if name % 2 else "Stroma" for name in before.index]
        assert np.array_equal(sdata["table"].obs["n_nuclei"], segmented["table"].obs["n_nuclei"])
    sdata.write(tmp_path / "section.zarr")
    assert read_zarr(tmp_path / "section.zarr")["nuclei_features"].obs["classification"].tolist() == classes.tolist()


def same_nuclei(one: SpatialData, other: SpatialData) -> None:
    """Compares all that was written but for the spots' table."""
    assert one["nuclei"].index.tolist() == other["nuclei"].index.tolist()
    assert one["nuclei"].geometry.geom_equals_exact(other["nuclei"].geometry, 0).all()
    assert get_transformation(one["nuclei"], get_all=True) == get_transformation(other["nuclei"], get_all=True)
    tables = one["nuclei_features"], other["nuclei_features"]
    assert np.array_equal(tables[0].X, tables[1].X)
    assert np.array_equal(tables[0].obsm["spatial"], tables[1].obsm["spatial"])
    pd.testing.assert_frame_equal(tables[0].obs, tables[1].obs)
    assert tables[0].uns["hespotex"] == tables[1].uns["hespotex"]
    assert get_element_annotators(one, "nuclei") == get_element_annotators(other, "nuclei") == {"nuclei_features"}


@pytest.mark.parametrize("kind", ["watershed", "labels", "shapes"])
def test_a_store_holds_what_memory_holds(scene, segmented, kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 100)  # several rows of blocks, so that the store grows
    monkeypatch.setattr(_store, "CHUNK_PX", 128)
    monkeypatch.setattr(_store, "_BATCH", 30)
    image, truth = scene
    here, there = make(image), make(image)
    method = {"watershed": "watershed", "labels": np.where(truth > 0, truth + 100, 0), "shapes": "mine"}[kind]
    if kind == "shapes":
        xenium_like(segmented)
        for sdata in (here, there):
            set_transformation(sdata["image"], get_transformation(segmented["image"], "xenium"), "xenium")
            sdata["mine"] = segmented["nucleus_boundaries"]
    hx.pp.segment_nuclei(here, method, n_jobs=1)
    hx.pp.segment_nuclei(there, method, n_jobs=1, target=tmp_path / "nuclei.zarr")
    found = read_zarr(tmp_path / "nuclei.zarr")
    assert len(found["nuclei"]) == truth.max()
    same_nuclei(found, here)
    assert np.array_equal(found["nuclei_labels"].values, here["nuclei_labels"].values)
    assert (
        get_transformation(found["nuclei_labels"], get_all=True).keys()
        == get_transformation(here["nuclei_labels"], get_all=True).keys()
    )
    pd.testing.assert_frame_equal(there["table"].obs, here["table"].obs)
    assert {name for _, name, _ in there.gen_elements()} == {"image", "spots", "table"} | ({"mine"} & set(there.shapes))
    assert [path.name for path in tmp_path.iterdir()] == ["nuclei.zarr"]
    hx.pp.segment_nuclei(
        make(image), method if kind != "shapes" else "watershed", raster=False, target=tmp_path / "b.zarr"
    )
    assert not read_zarr(tmp_path / "b.zarr").labels


def test_a_store_that_fails_leaves_nothing(scene, tmp_path, monkeypatch) -> None:
    sdata = make(scene[0])
    (tmp_path / "there").mkdir()
    with pytest.raises(DataValueError, match="exists already"):
        hx.pp.segment_nuclei(sdata, target=tmp_path / "there")
    with pytest.raises(DataValueError, match="copy=True"):
        hx.pp.segment_nuclei(sdata, target=tmp_path / "a.zarr", copy=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="nothing can be written to the folder"):
        hx.pp.segment_nuclei(sdata, target=tmp_path / "file" / "a.zarr")

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataValueError, match="no nuclei"):
        hx.pp.segment_nuclei(make(np.full((SIDE, SIDE, 3), 240, np.uint8)), target=tmp_path / "a.zarr")
    monkeypatch.setattr(_store, "paint", full)
    with pytest.raises(DataValueError, match=r"a\.zarr.* could not be written .*No space left"):
        hx.pp.segment_nuclei(sdata, target=tmp_path / "a.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
    assert list(sdata["table"].obs) == ["region", "spot_id"]


def test_threads_end_with_the_call_whatever_ends_it(scene, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 64)
    monkeypatch.setattr(Nuclei, "concatenate", lambda parts, _: full(next(iter(parts))))
    before = set(threading.enumerate())
    with pytest.raises(MemoryError) as kept:
        hx.pp.segment_nuclei(make(scene[0]), n_jobs=2)
    assert kept.tb is not None
    assert not set(threading.enumerate()) - before


def test_interrupted_nuclei_go_on_where_they_stopped(scene, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 64)
    monkeypatch.setattr(_kept, "KEEP_AFTER_S", 0.0)
    calls, stop_at, segment = [], [18], Watershed.__call__

    def counted(self: Watershed, rgb: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return segment(self, rgb)

    monkeypatch.setattr(Watershed, "__call__", counted)
    interrupted, undisturbed = make(scene[0]), make(scene[0])
    with hx.settings.override(cache_dir=tmp_path):
        with pytest.raises(KeyboardInterrupt), pytest.warns(HespotexWarning, match="3 finished parts") as said:
            hx.pp.segment_nuclei(interrupted, n_jobs=1)
        assert said[0].filename == __file__
        assert "nuclei" not in interrupted.shapes
        calls.clear()
        hx.pp.segment_nuclei(interrupted, n_jobs=1)
        assert len(calls) == 25 - 15
        assert not list((tmp_path / "nuclei").iterdir())
        stop_at[0] = -1
        hx.pp.segment_nuclei(undisturbed, n_jobs=1)
    same_nuclei(interrupted, undisturbed)


KILLED = """
import sys, time
import threading
import numpy as np
import hespotex as hx
from hespotex.pp import _nuclei_source
from hespotex.segmentation import Watershed, _kept
from spatialdata import read_zarr

segment = Watershed.__call__
Watershed.__call__ = lambda self, rgb: time.sleep(0.1) or segment(self, rgb)
_kept.KEEP_AFTER_S, _nuclei_source.BLOCK_PX = 0.0, 64
hx.settings.cache_dir = sys.argv[1]
hx.pp.segment_nuclei(read_zarr(sys.argv[2]), n_jobs=2, target=sys.argv[3], progress_bar=False)
"""


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
def test_a_killed_process_loses_little_and_leaves_nothing(scene, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 64)
    monkeypatch.setattr(_kept, "KEEP_AFTER_S", 0.0)
    cache, slide, target = tmp_path / "cache", tmp_path / "slide.zarr", tmp_path / "nuclei.zarr"
    make(scene[0]).write(slide)
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, str(cache), str(slide), str(target)])
    while process.poll() is None and len(list(cache.rglob("*.npz"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = len([path for path in cache.rglob("*.npz") if not path.name.startswith(".")])
    assert 2 <= kept < 5
    assert not target.exists()

    calls, segment = [], Watershed.__call__
    monkeypatch.setattr(Watershed, "__call__", lambda self, rgb: calls.append(1) or segment(self, rgb))
    with hx.settings.override(cache_dir=cache):
        hx.pp.segment_nuclei(read_zarr(slide), n_jobs=1, target=target)
        assert len(calls) == 25 - 5 * kept
        undisturbed = make(scene[0])
        hx.pp.segment_nuclei(undisturbed, n_jobs=1)
    found = read_zarr(target)
    same_nuclei(found, undisturbed)
    assert np.array_equal(found["nuclei_labels"].values, undisturbed["nuclei_labels"].values)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "slide.zarr", "nuclei.zarr"}
    assert not list((cache / "nuclei").iterdir())


def test_a_slide_without_nuclei_is_not_called_interrupted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 64)
    monkeypatch.setattr(_kept, "KEEP_AFTER_S", 0.0)
    sdata = make(np.full((SIDE, SIDE, 3), 240, np.uint8))
    with hx.settings.override(cache_dir=tmp_path):
        with pytest.raises(DataValueError, match="no nuclei"):  # a warning would be an error of another type
            hx.pp.segment_nuclei(sdata, n_jobs=1)
        assert not list((tmp_path / "nuclei").iterdir())


@pytest.mark.parametrize("change", ["diameter", "image", "resolution", "outlines"])
def test_parts_of_another_image_or_other_parameters_are_not_used(scene, tmp_path, monkeypatch, change: str) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 64)
    monkeypatch.setattr(_kept, "KEEP_AFTER_S", 0.0)
    calls, segment = [], Watershed.__call__

    def interrupted(self: Watershed, rgb: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return segment(self, rgb)

    monkeypatch.setattr(Watershed, "__call__", interrupted)
    with hx.settings.override(cache_dir=tmp_path):
        with pytest.raises(KeyboardInterrupt), pytest.warns(HespotexWarning, match="interrupted"):
            hx.pp.segment_nuclei(make(scene[0]), n_jobs=1)
        image, options = scene[0], {}
        if change == "image":
            image = image.copy()
            image[200:203, 200:203] //= 2
        else:
            options = {"diameter": {"diameter_um": 8.1}, "resolution": {"mpp": 0.52}, "outlines": {"simplify_um": 0.2}}[
                change
            ]
        calls[:] = [0] * 100
        hx.pp.segment_nuclei(make(image), n_jobs=1, **options)
        assert len(calls) == 125


def test_a_cluster_writes_the_same(scene, segmented, cluster) -> None:
    sdata = make(scene[0])
    hx.pp.segment_nuclei(sdata, client=cluster)
    same_nuclei(sdata, segmented)
    assert np.array_equal(sdata["nuclei_labels"].values, segmented["nuclei_labels"].values)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["instanseg", "lazyslide:instanseg"])
def test_instanseg_is_a_method(name: str, tmp_path) -> None:
    if find_spec("lazyslide_models") is None:
        pytest.skip("lazyslide-models is not installed")
    import torch

    from ..segmentation.test_instanseg import Darkness

    torch.jit.script(Darkness()).save(str(tmp_path / "weights.pt"))
    # In the middle of the squares that it numbers, which begin 64 px before the image.
    centres = np.stack(np.meshgrid(np.arange(76, 310, 40), np.arange(36, 310, 40)), axis=-1).reshape(-1, 2)
    image, truth = discs((SIDE, SIDE), centres, 9)
    sdata = make(image)
    hx.pp.segment_nuclei(sdata, name, model=tmp_path / "weights.pt", device="cpu")
    hits, n_true, n_found = matched(truth, sdata["nuclei_labels"].values)
    assert hits == n_true == n_found
    assert sdata["table"].uns["hespotex"]["n_nuclei"]["params"] == {
        "method": "instanseg",
        "diameter_um": 8.0,
        "simplify_um": 0.25,
    }


class StubCellpose:
    """Stands where ``cellpose.models.CellposeModel`` is: dark regions of about the diameter that it is told."""

    def __init__(self, gpu: bool, pretrained_model: str, device) -> None:
        assert (gpu, device.type) == (False, "cpu")
        self.weights, self.seen = pretrained_model, []
        StubCellpose.last = self

    def eval(self, image: np.ndarray, *, channel_axis: int, diameter: float) -> tuple:
        from skimage.measure import label

        assert image.dtype == np.uint8
        assert image.shape[channel_axis] == 3
        self.seen.append((image.shape, diameter))
        regions = label(image.mean(axis=channel_axis) < 150, connectivity=1)
        sizes = np.sqrt(4 / np.pi * np.bincount(regions.ravel()))
        fitting = (sizes > 0.6 * diameter) & (sizes < 1.5 * diameter)
        fitting[0] = False
        return np.where(fitting[regions], regions, 0).astype(np.uint16), [], np.zeros(256)


@pytest.fixture
def cellpose_weights(tmp_path, monkeypatch):
    """Path of a file that takes the place of weights, where the network that they belong to is a stub."""
    monkeypatch.setitem(sys.modules, "cellpose.models", SimpleNamespace(CellposeModel=StubCellpose))
    path = tmp_path / "cpsam"
    path.touch()
    return path


def test_cellpose_finds_the_same_in_blocks_and_in_one_piece(cellpose_weights, monkeypatch) -> None:
    centres = np.stack(np.meshgrid(np.arange(75, 310, 25), np.arange(25, 310, 25)), axis=-1).reshape(-1, 2)
    centres = centres + np.random.default_rng(0).uniform(-2, 2, centres.shape)  # every fourth row and column on a seam
    image, truth = discs((SIDE, SIDE), centres, 8)
    here, blocks = make(image), make(image)
    options = {"model": cellpose_weights, "device": "cpu"}
    hx.pp.segment_nuclei(here, "cellpose", **options)
    assert len(StubCellpose.last.seen) == 1
    assert StubCellpose.last.weights == str(cellpose_weights)
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 100)
    hx.pp.segment_nuclei(blocks, "cellpose", **options)
    assert len(StubCellpose.last.seen) == 16
    same_nuclei(blocks, here)
    assert np.array_equal(blocks["nuclei_labels"].values, here["nuclei_labels"].values)
    hits, n_true, n_found = matched(truth, here["nuclei_labels"].values, 0.9)
    assert hits == n_true == n_found
    assert np.array_equal(here["table"].obs["n_nuclei"], expected_counts(truth))
    note = here["table"].uns["hespotex"]["n_nuclei"]
    assert note["params"] == {"method": "cellpose", "diameter_um": 8.0, "simplify_um": 0.25}


def test_cellpose_writes_to_disk_what_it_writes_to_memory(scene, cellpose_weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 100)
    here, there = make(scene[0]), make(scene[0])
    options = {"model": cellpose_weights, "device": "cpu"}
    hx.pp.segment_nuclei(here, "cellpose", **options)
    hx.pp.segment_nuclei(there, "cellpose", target=tmp_path / "nuclei.zarr", **options)
    found = read_zarr(tmp_path / "nuclei.zarr")
    same_nuclei(found, here)
    assert np.array_equal(found["nuclei_labels"].values, here["nuclei_labels"].values)
    pd.testing.assert_frame_equal(there["table"].obs, here["table"].obs)
    assert "nuclei" not in there


@pytest.mark.parametrize(("mpp", "working"), [(0.5, None), (0.25, None), (0.25, 0.25), (0.8, None)])
def test_cellpose_is_told_the_diameter_in_the_pixels_that_it_sees(cellpose_weights, mpp: float, working) -> None:
    """Of nuclei of 8 µm and of 16 µm it is those asked for that are found, whatever the image's scale."""
    small, large = np.array([[90, 30], [90, 120], [60, 80]]), np.array([[130, 75], [115, 30]])  # µm
    size = int(160 / mpp)
    image, truth = discs((size, size), small / mpp, 4 / mpp)
    other, more = discs((size, size), large / mpp, 8 / mpp)
    image = np.where(more[..., None] > 0, other, image)
    options = {"model": cellpose_weights, "device": "cpu", "mpp": working}
    expected = mpp if working else max(mpp, 0.5)
    for diameter_um, wanted in ((8.0, truth), (16.0, more)):
        sdata = make(image, mpp=mpp, table=False)
        hx.pp.segment_nuclei(sdata, "cellpose", diameter_um=diameter_um, **options)
        ((shape, diameter),) = StubCellpose.last.seen
        assert diameter == pytest.approx(diameter_um / expected)
        assert shape[0] > 160 / expected + 2 * diameter  # surroundings in the same pixels
        assert len(sdata["nuclei"]) == wanted.max()
        found = sdata["nuclei_features"][:, "area_um2"].X
        np.testing.assert_allclose(found, np.pi * diameter_um**2 / 4, rtol=0.15)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (lambda shape: np.zeros((shape[0] // 2, shape[1] // 2), np.uint16), DataValueError, "labels of shape"),
        (lambda shape: np.zeros((1, *shape[:2]), np.uint16), DataValueError, "labels of shape"),
        (lambda shape: np.zeros(0), DataValueError, "labels of shape"),
        (lambda shape: np.full(shape[:2], -1), DataValueError, "negative label -1"),
        (lambda shape: np.full(shape[:2], 0.5), DataTypeError, "float64"),
    ],
)
def test_masks_of_cellpose_that_are_none_are_refused(scene, cellpose_weights, monkeypatch, masks, error, message):
    monkeypatch.setattr(StubCellpose, "eval", lambda self, image, **_: (masks(image.shape), [], None))
    sdata = make(scene[0])
    with pytest.raises(error, match=message):
        hx.pp.segment_nuclei(sdata, "cellpose", model=cellpose_weights, device="cpu")
    assert {name for _, name, _ in sdata.gen_elements()} == {"image", "spots", "table"}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_the_installed_cellpose_is_a_method(scene, tmp_path, monkeypatch) -> None:
    """All of Cellpose but its network, in whose place are the flows of dark regions."""
    from hespotex._optional import ensure_torchvision

    ensure_torchvision()
    models = pytest.importorskip("cellpose.models")
    if not hasattr(models, "CPSAM"):
        pytest.skip("this version of Cellpose names its network otherwise")
    import torch
    from cellpose.dynamics import labels_to_flows
    from skimage.measure import label

    seen = []

    class Flows(torch.nn.Module):
        def __init__(self, dtype) -> None:
            super().__init__()
            self.device, self.dtype = torch.device("cpu"), torch.float32

        def load_model(self, path: str, device) -> None:
            assert path == str(tmp_path / "weights")

        def forward(self, tiles):
            maps = np.empty((len(tiles), 3, *tiles.shape[2:]), np.float32)
            for place, tile in zip(maps, tiles.numpy(), strict=True):
                # Cellpose has set 0 and 1 to the darkest and the brightest percent, and pads with 0
                regions = label((tile.mean(axis=0) < 0.4) & (tile != 0).any(axis=0), connectivity=1)
                sizes = np.bincount(regions.ravel())
                seen.extend(np.sqrt(4 / np.pi * sizes[1:]).tolist())
                regions[(sizes < 30)[regions]] = 0
                place[2] = np.where(regions > 0, 6.0, -6.0)
                place[:2] = 0 if not regions.any() else 5 * labels_to_flows([regions], device=self.device)[0][2:4]
            return torch.from_numpy(maps), torch.zeros(len(tiles), 256)

    torch.save({}, tmp_path / "weights")
    monkeypatch.setattr(models, "CPSAM", Flows)
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 200)
    sdata = make(scene[0])
    hx.pp.segment_nuclei(sdata, "cellpose", model=tmp_path / "weights", device="cpu")
    assert np.median(seen) == pytest.approx(30, abs=2)  # the size in pixels that its network was trained for
    hits, n_true, n_found = matched(scene[1], sdata["nuclei_labels"].values, 0.7)
    assert hits == n_true == n_found


def test_more_nuclei_than_memory_are_sent_to_disk(scene, tmp_path, monkeypatch) -> None:
    number = int(scene[1].max())
    needed = number * _segment_nuclei.OBJECT_BYTES
    sdata = make(scene[0])
    monkeypatch.setattr(_segment_nuclei, "available_bytes", lambda: int(1.2 * needed))  # of which 80 % are too little
    said = rf"^{number} nuclei .*take {needed / 1e6:.1f} MB.* {1.2 * needed / 1e6:.1f} MB of memory.*80%.*"
    with pytest.raises(DataValueError, match=said + r"hx\.pp\.segment_nuclei\(\.\.\., target='nuclei\.zarr'\)"):
        hx.pp.segment_nuclei(sdata)
    assert "nuclei" not in sdata
    hx.pp.segment_nuclei(sdata, target=tmp_path / "nuclei.zarr")
    assert len(read_zarr(tmp_path / "nuclei.zarr")["nuclei"]) == number
    monkeypatch.setattr(_segment_nuclei, "available_bytes", lambda: int(1.3 * needed))
    hx.pp.segment_nuclei(sdata)
    assert len(sdata["nuclei"]) == number


def test_boundaries_that_cannot_be_placed_or_used_are_refused(scene) -> None:
    sdata = make(scene[0])
    far, near = [box(900, 900, 909, 909)], [box(9, 9, 19, 19), box(900, 900, 909, 909)]
    sdata["elsewhere"] = ShapesModel.parse(GeoDataFrame(geometry=far), transformations={"other": Identity()})
    with pytest.raises(GeometryError):
        hx.pp.segment_nuclei(sdata, "elsewhere")
    sdata["far"] = ShapesModel.parse(GeoDataFrame(geometry=far), transformations={"global": Identity()})
    with pytest.raises(DataValueError, match="'far' can be used"):
        hx.pp.segment_nuclei(sdata, "far")
    sdata["near"] = ShapesModel.parse(GeoDataFrame(geometry=near), transformations={"global": Identity()})
    with pytest.warns(HespotexWarning, match="of 2 outlines of 'near' 1 lie beyond") as said:
        hx.pp.segment_nuclei(sdata, "near")
    assert said[0].filename == __file__
    assert sdata["nuclei"].index.tolist() == [0]
