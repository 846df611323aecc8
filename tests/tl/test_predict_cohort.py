"""Many slides: what is broken stays apart, what is done stays done, and nothing half-written is ever seen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import distributed
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile

import hespotex as hx
from hespotex.data import partial
from hespotex.data.geometry import resolve_slide
from hespotex.encoders import morphology
from hespotex.errors import DataValueError, HespotexWarning, OutputError
from hespotex.tl import _cohort, _predict_cohort

ONE = _cohort.one
BROKEN = {
    "blank.tif": "GeometryError",
    "cut.tif": "ImageFormatError",
    "empty.tif": "ImageFormatError",
    "gone.tif": "FileNotFoundError",
    "scaleless.tif": "ScaleError",
    "small.tif": "GeometryError",
    "text.svs": "ImageFormatError",
}


def write_tiff(path: Path, pixels: np.ndarray, mpp: float | None = 0.5) -> None:
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), compression="deflate", **scale)


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    """Two slides of 900 x 900 px, (h, w, 3)."""
    slides = hx.datasets.synthetic(2, size_px=900, with_expression=False, first_patient=4, seed=5)
    return [np.ascontiguousarray(resolve_slide(s).levels[0].array.compute().transpose(1, 2, 0)) for s in slides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    section = hx.datasets.synthetic(size_px=800, pitch_um=40.0, diameter_um=40.0, n_genes=40, seed=2)
    hx.pp.embed(section)
    path = tmp_path_factory.mktemp("trained") / "ridge.hx"
    hx.tl.train(section, "ridge", n_top_genes=10).save(path)
    return path


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> Path:
    section = hx.datasets.synthetic(size_px=800, pitch_um=40.0, diameter_um=40.0, n_genes=40, seed=3)
    hx.pp.embed(section)
    path = tmp_path_factory.mktemp("another") / "ridge.hx"
    hx.tl.train(section, "ridge", n_top_genes=10).save(path)
    return path


@pytest.fixture
def slides(pixels, tmp_path) -> Path:
    """A folder of two fine slides."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, image in zip(("first.tif", "second.tif"), pixels, strict=True):
        write_tiff(folder / name, image)
    return folder


@pytest.fixture
def mixed(slides, pixels) -> Path:
    """The same with everything that may be wrong with a slide."""
    whole = (slides / "first.tif").read_bytes()
    (slides / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (slides / "empty.tif").write_bytes(b"")
    (slides / "text.svs").write_text("this is no slide")
    (slides / "gone.tif").symlink_to(slides / "nowhere")
    write_tiff(slides / "blank.tif", np.full((900, 900, 3), 244, np.uint8))
    write_tiff(slides / "small.tif", pixels[0][400:440, 400:440])
    write_tiff(slides / "scaleless.tif", pixels[0], mpp=None)
    return slides


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Names of the slides whose pixels are looked at, as they come."""
    seen: list[str] = []
    embed = hx.pp.embed

    def counted(sdata, *args, **kwargs):
        seen.append(sdata.attrs["hespotex"]["name"])
        return embed(sdata, *args, **kwargs)

    monkeypatch.setattr(hx.pp, "embed", counted)
    return seen


@pytest.fixture
def tall(pixels, tmp_path) -> Path:
    """A folder of two slides that are five times as high, for several runs."""
    folder = tmp_path / "tall"
    folder.mkdir()
    for name, image in zip(("first.tif", "second.tif"), pixels, strict=True):
        write_tiff(folder / name, np.tile(image, (5, 1, 1)))
    return folder


def status(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["slide"].map(lambda path: Path(path).name), frame["status"], strict=True))


def values(path: Path) -> np.ndarray:
    """The prediction in a result."""
    data = ad.read_h5ad(path) if path.suffix == ".h5ad" else sd.read_zarr(path)["ridge_tiles"]
    return np.asarray(data.X)


def remains(out: Path) -> list[str]:
    """What lies in `out` besides results, manifest and the lock."""
    known = {"manifest.parquet", ".hespotex.lock"}
    return sorted(
        path.name for path in out.iterdir() if path.name not in known and path.suffix not in (".zarr", ".h5ad")
    )


def staged(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.parent.name == "staging" or path.suffix == ".part"]


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_broken_slides_are_listed_and_the_others_predicted(mixed, trained, tmp_path, format):
    out = tmp_path / "out"
    frame = hx.tl.predict_cohort(mixed, trained, out, format=format)
    assert status(frame) == {"first.tif": "done", "second.tif": "done"} | dict.fromkeys(BROKEN, "failed")
    failed = frame[frame["status"] == "failed"]
    assert dict(zip(failed["slide"].map(lambda path: Path(path).name), failed["error"], strict=True)) == BROKEN
    assert failed["message"].str.len().min() > 20
    assert sorted(path.name for path in out.glob(f"*.{format}")) == [f"first.{format}", f"second.{format}"]
    assert remains(out) == []
    for name in ("first", "second"):
        slide = hx.io.read_wsi(mixed / f"{name}.tif")
        hx.tl.predict(slide, trained)
        assert np.array_equal(values(out / f"{name}.{format}"), slide["ridge_tiles"].X)


def test_a_result_names_its_slide_and_holds_no_pixels(slides, trained, tmp_path):
    frame = hx.tl.predict_cohort(slides / "first.tif", trained, tmp_path / "out").iloc[0]
    result = sd.read_zarr(tmp_path / "out" / "first.zarr")
    assert not result.images
    assert {"tissue", "tiles"} <= set(result.shapes)
    about = result.attrs["hespotex"]["slide"]
    assert (about["file"], about["size"], about["mpp"], about["shape"]) == (
        *("first.tif", (slides / "first.tif").stat().st_size, pytest.approx(0.5), [900, 900]),
    )
    assert about["fingerprint"] == frame["fingerprint"]
    # Laid over the slide, everything fits.
    slide = hx.io.read_wsi(slides / "first.tif")
    hx.pp.detect_tissue(slide)
    assert slide["tissue"].equals(result["tissue"])


def test_the_manifest_is_what_is_returned(mixed, trained, tmp_path):
    frame = hx.tl.predict_cohort(mixed, trained, tmp_path / "out", mpp=0.5)
    stored = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    stored["warnings"] = stored["warnings"].map(list)
    pd.testing.assert_frame_equal(frame, stored[frame.columns], check_dtype=False)
    done = frame[frame["status"] == "done"].set_index(frame["output"][frame["status"] == "done"])
    assert {"first.zarr", "scaleless.zarr"} <= set(done.index)  # whose scale is given
    stages = [f"seconds_{stage}" for stage in ("read", "tissue", "tiles", "embed", "predict", "write")]
    assert (done[stages] > 0).all(axis=None)
    assert np.allclose(done[stages].sum(axis=1), done["seconds"])
    assert done["n_tiles"].tolist() == [len(values(tmp_path / "out" / name)) for name in done.index]
    assert set(done["n_genes"]) == {10}
    assert set(frame["hespotex_version"]) == {hx.__version__}
    assert set(frame["attempts"]) == {1}


def test_warnings_of_a_slide_are_in_its_row(slides, trained, tmp_path, recwarn):
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out", mpp=0.6)
    assert all("states 0.5" in " ".join(said) for said in frame["warnings"])
    assert not [warning for warning in recwarn if issubclass(warning.category, HespotexWarning)]


def test_what_is_done_is_not_done_again(mixed, trained, tmp_path, embedded):
    first = hx.tl.predict_cohort(mixed, trained, tmp_path / "out")
    assert sorted(embedded) == ["first", "second"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.zarr")}
    again = hx.tl.predict_cohort([mixed], trained, tmp_path / "out")
    assert len(embedded) == 2
    assert status(again) == status(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.zarr")} == before


def test_a_slide_that_is_mended_is_done_by_the_next_call(mixed, trained, tmp_path, pixels):
    hx.tl.predict_cohort(mixed, trained, tmp_path / "out")
    write_tiff(mixed / "cut.tif", pixels[0])
    frame = hx.tl.predict_cohort(mixed, trained, tmp_path / "out").set_index("output")
    assert frame.loc["cut.zarr", "status"] == "done"
    assert frame.loc["cut.zarr", "attempts"] == 2
    assert frame.loc["cut.zarr", "error"] == ""
    assert np.array_equal(values(tmp_path / "out" / "cut.zarr"), values(tmp_path / "out" / "first.zarr"))


def test_a_slide_that_has_changed_is_predicted_again(slides, trained, tmp_path, pixels, embedded):
    hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    write_tiff(slides / "first.tif", pixels[1])
    hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    assert embedded[2:] == ["first"]
    assert np.array_equal(values(tmp_path / "out" / "first.zarr"), values(tmp_path / "out" / "second.zarr"))


def test_results_of_another_model_are_not_mixed_with(slides, trained, another, tmp_path):
    hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    before = values(tmp_path / "out" / "first.zarr")
    for model, options in ((another, {}), (trained, {"mpp": 0.6}), (trained, {"format": "h5ad"})):
        with pytest.raises(DataValueError, match="another folder"):
            hx.tl.predict_cohort(slides, model, tmp_path / "out", **options)
    frame = hx.tl.predict_cohort(slides, another, tmp_path / "out", overwrite=True)
    assert set(frame["model"]) == {hx.models._store.identify(hx.models.load(another))}
    assert not np.array_equal(values(tmp_path / "out" / "first.zarr"), before)
    assert remains(tmp_path / "out") == []


def test_a_replacement_that_was_interrupted_goes_on_without_being_asked_again(
    slides, trained, another, tmp_path, monkeypatch, embedded
):
    out = tmp_path / "out"
    assert set(hx.tl.predict_cohort(slides, trained, out)["status"]) == {"done"}
    predict = ONE.predict

    def interrupted(sdata, *args, **kwargs):
        if sdata.attrs["hespotex"]["name"] == "second":
            raise KeyboardInterrupt
        predict(sdata, *args, **kwargs)

    monkeypatch.setattr(ONE, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict_cohort(slides, another, out, overwrite=True)
    monkeypatch.setattr(ONE, "predict", predict)
    assert (out / "second.zarr").exists()  # of the first model, until there is another
    assert set(hx.tl.predict_cohort(slides, another, out)["status"]) == {"done"}
    assert embedded == ["first", "second", "first", "second", "second"]
    hx.tl.predict_cohort(slides, another, tmp_path / "fresh")
    assert np.array_equal(values(out / "second.zarr"), values(tmp_path / "fresh" / "second.zarr"))


def test_results_of_other_slides_by_another_model_are_not_forgotten(slides, trained, another, tmp_path):
    assert set(hx.tl.predict_cohort(slides, trained, tmp_path / "out")["status"]) == {"done"}
    hx.tl.predict_cohort(slides / "first.tif", another, tmp_path / "out", overwrite=True)
    with pytest.raises(DataValueError, match="overwrite=True"):  # of the second a result of the first model is left
        hx.tl.predict_cohort(slides, another, tmp_path / "out")


def test_what_is_not_ours_is_left_alone(slides, trained, tmp_path):
    (tmp_path / "out" / "first.zarr").mkdir(parents=True)
    (tmp_path / "out" / "first.zarr" / "thesis.txt").write_text("mine")
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    assert status(frame) == {"first.tif": "failed", "second.tif": "done"}
    assert "is no result of this slide" in frame["message"][0]
    assert (tmp_path / "out" / "first.zarr" / "thesis.txt").read_text() == "mine"


def test_overwriting_replaces_a_result_of_the_same_model_too(slides, trained, tmp_path):
    hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    expected = values(tmp_path / "out" / "first.zarr")
    shutil.rmtree(tmp_path / "out" / "first.zarr" / "tables" / "ridge_tiles")  # damaged, and nothing shows it
    hx.tl.predict_cohort(slides, trained, tmp_path / "out", overwrite=True)
    assert np.array_equal(values(tmp_path / "out" / "first.zarr"), expected)


def test_what_appears_meanwhile_is_left_alone(slides, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    predict = ONE.predict

    def slow(*args, **kwargs):
        predict(*args, **kwargs)
        if not (out / "first.zarr").exists():
            (out / "first.zarr").mkdir()
            (out / "first.zarr" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(ONE, "predict", slow)
    frame = hx.tl.predict_cohort(slides / "first.tif", trained, out)
    assert frame["status"].tolist() == ["failed"]
    assert [path.name for path in (out / "first.zarr").iterdir()] == ["thesis.txt"]
    assert staged(out) == []


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_a_result_that_the_manifest_does_not_know_of_is_recognised(slides, trained, tmp_path, embedded, format):
    first = hx.tl.predict_cohort(slides, trained, tmp_path / "out", format=format)
    (tmp_path / "out" / "manifest.parquet").write_bytes(b"PAR1 and no more")
    again = hx.tl.predict_cohort(slides, trained, tmp_path / "out", format=format)
    assert len(embedded) == 2
    columns = ["slide", "output", "status", "n_tiles", "n_genes", "identity", "attempts"]
    pd.testing.assert_frame_equal(again[columns], first[columns])


def test_slides_of_one_name_get_results_of_their_own(slides, trained, tmp_path):
    (slides / "deeper").mkdir()
    shutil.copy2(slides / "second.tif", slides / "deeper" / "first.tif")
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    assert sorted(frame["output"]) == ["first-2.zarr", "first.zarr", "second.zarr"]
    by_slide = frame.set_index("slide")["output"]
    same = by_slide[str(slides / "deeper" / "first.tif")], by_slide[str(slides / "second.tif")]
    assert np.array_equal(*(values(tmp_path / "out" / name) for name in same))
    # A further slide does not take a name away.
    shutil.copy2(slides / "first.tif", slides / "deeper" / "a.tif")
    later = hx.tl.predict_cohort(slides, trained, tmp_path / "out").set_index("slide")["output"]
    assert later[by_slide.index].equals(by_slide)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on other systems")
@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_a_name_that_is_no_text_does_not_stop_the_cohort(slides, trained, tmp_path, format):
    (slides / "second.tif").rename(os.fsdecode(os.fsencode(slides) + b"/caf\xe9.tif"))
    (slides / "first.tif").rename(slides / "préparation 1 (病理).tif")
    broken = Path(os.fsdecode(os.fsencode(slides) + b"/\xe9.tif"))
    broken.write_bytes(b"")
    for _ in range(2):
        frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out", format=format)
        assert status(frame) == {"caf\\xe9.tif": "done", "préparation 1 (病理).tif": "done", "\\xe9.tif": "failed"}
        assert set(frame["output"]) == {f"caf.{format}", f"préparation_1_病理.{format}", f"unnamed.{format}"}
    assert frame.set_index("status").loc["done", "attempts"].tolist() == [1, 1]
    if format == "zarr":
        assert sd.read_zarr(tmp_path / "out" / "caf.zarr").attrs["hespotex"]["slide"]["file"] == "caf\\xe9.tif"


def test_links_in_circles_end(slides, tmp_path):
    (slides / "deeper").mkdir()
    (slides / "deeper" / "up").symlink_to(slides)
    (slides / "deeper" / "out").symlink_to(tmp_path)
    found = _cohort.slides.find_slides(slides, but=tmp_path / "out")
    assert found == [slides / "first.tif", slides / "second.tif"]


def test_a_folder_of_results_among_the_slides_is_not_taken_for_slides(slides, trained):
    (slides / ".hidden.tif").write_bytes(b"")
    (slides / "notes.txt").write_text("")
    for _ in range(2):
        frame = hx.tl.predict_cohort(slides, trained, slides / "predicted")
        assert status(frame) == {"first.tif": "done", "second.tif": "done"}


def _as_lazyslide(slide: Path, corners: list[tuple[float, float]]) -> Path:
    """The store that LazySlide leaves beside a slide, with tissue and tiles of its own."""
    import geopandas as gpd
    from shapely.geometry import box
    from spatialdata.models import ShapesModel

    wsidata = pytest.importorskip("wsidata")
    wsi = wsidata.open_wsi(slide)
    wsi.shapes["tissues"] = ShapesModel.parse(gpd.GeoDataFrame({"tissue_id": [0]}, geometry=[box(100, 100, 800, 800)]))
    squares = [box(x, y, x + 80, y + 80) for x, y in corners]
    tiles = gpd.GeoDataFrame({"tile_id": np.arange(len(corners)), "tissue_id": 0}, geometry=squares)
    wsi.shapes["tiles"] = ShapesModel.parse(tiles)
    wsi.write()
    wsi.close()
    return slide.with_suffix(".zarr")


def _listing(store: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in store.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_a_store_of_lazyslide_and_its_slide_are_one(slides, trained, tmp_path, format):
    corners = [(200.0, 300.0), (328.0, 300.0), (456.0, 300.0)]
    store = _as_lazyslide(slides / "first.tif", corners)
    before, out = _listing(store), tmp_path / "out"
    frame = hx.tl.predict_cohort(slides, trained, out, format=format)
    assert status(frame) == {"first.tif": "done", "second.tif": "done"}, frame["message"].tolist()
    assert frame["n_tiles"][0] == 3
    assert _listing(store) == before
    own = hx.io.read_wsi(slides / "first.tif")
    own["tiles"] = sd.read_zarr(store)["tiles"]
    hx.tl.predict(own, trained)
    assert np.array_equal(values(out / f"first.{format}"), np.asarray(own["ridge_tiles"].X))
    # By either name it is the same, and it is there already.
    seen: list[str] = []
    for names in ([store], [slides / "first.tif"], [store, slides / "first.tif"]):
        hx.tl.predict_cohort(names, trained, out, format=format, log=lambda event: seen.append(event["event"]))
    assert (seen.count("slide_kept"), seen.count("slide_done")) == (3, 0)
    # Other tiles are another result.
    shutil.rmtree(store)
    _as_lazyslide(slides / "first.tif", [*corners, (600.0, 600.0)])
    assert hx.tl.predict_cohort(slides, trained, out, format=format)["n_tiles"][0] == 4
    if format == "zarr":
        assert "slide_properties" not in sd.read_zarr(out / "first.zarr").attrs


def test_a_store_of_lazyslide_without_its_slide_says_which_is_missing(slides, trained, tmp_path):
    store = _as_lazyslide(slides / "first.tif", [(200.0, 300.0)])
    (slides / "first.tif").unlink()
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out").set_index("error")
    assert Path(frame.loc["DataValueError", "slide"]) == store
    assert "no file first with a suffix of slides" in frame.loc["DataValueError", "message"]
    write_tiff(slides / "first.tif", np.full((400, 400, 3), 200, np.uint8))
    frame = hx.tl.predict_cohort(slides / "first.tif", trained, tmp_path / "out")
    assert "cannot be opened together" in frame["message"][0]


def test_a_store_of_lazyslide_without_tissue_is_a_bare_slide(slides, trained, tmp_path):
    wsidata = pytest.importorskip("wsidata")
    wsidata.open_wsi(slides / "first.tif").write()
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    assert set(frame["status"]) == {"done"}, frame["message"].tolist()
    (slides / "first.zarr").rename(tmp_path / "aside")
    other = hx.tl.predict_cohort(slides / "first.tif", trained, tmp_path / "other")
    assert other["n_tiles"][0] == frame["n_tiles"][0]
    assert np.array_equal(values(tmp_path / "out" / "first.zarr"), values(tmp_path / "other" / "first.zarr"))


def test_stores_are_slides_too(patients, trained, tmp_path):
    patients[0].write(tmp_path / "measured.zarr")
    frame = hx.tl.predict_cohort(tmp_path / "measured.zarr", trained, tmp_path / "out")
    assert frame["status"].tolist() == ["done"], frame["message"][0]
    hx.tl.predict(patients[0], trained)
    result = sd.read_zarr(tmp_path / "out" / "measured.zarr")
    assert np.array_equal(hx.get.prediction(result, "ridge").X, hx.get.prediction(patients[0], "ridge").X)


@pytest.fixture
def several(patients, tmp_path) -> Path:
    """A store with two measured tables, on shapes of their own, and two images."""
    from spatialdata.models import TableModel

    sdata = patients[0]
    shapes, table = sdata["spots"], sdata["table"]
    few = np.arange(table.n_obs) % 3 == 0
    names = table.uns["spatialdata_attrs"]
    own = table[few].copy()
    del own.uns["spatialdata_attrs"]
    own.obs[names["region_key"]] = pd.Categorical(["few"] * own.n_obs)
    ids = own.obs[names["instance_key"]]
    sdata["few"] = shapes.loc[ids]
    sdata["thinned"] = TableModel.parse(
        own, region="few", region_key=names["region_key"], instance_key=names["instance_key"]
    )
    (image,) = sdata.images
    sdata["other_image"] = sdata[image]
    sdata.write(tmp_path / "several.zarr")
    return tmp_path / "several.zarr"


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_the_table_of_a_store_can_be_named(several, trained, tmp_path, format):
    out = tmp_path / "out"
    frame = hx.tl.predict_cohort(several, trained, out, format=format)
    assert "table_key=" in frame["message"][0]
    image = next(name for name in sd.read_zarr(several).images if name != "other_image")
    keys = {"table_key": "thinned", "shapes_key": "few", "image_key": image}
    frame = hx.tl.predict_cohort(several, trained, out, format=format, **keys)
    assert frame["status"].tolist() == ["done"], frame["message"][0]
    sdata = sd.read_zarr(several)
    hx.tl.predict(sdata, trained, **keys)
    expected = hx.get.prediction(sdata, "ridge", table_key="thinned")
    result = out / f"several.{format}"
    found = ad.read_h5ad(result) if format == "h5ad" else hx.get.prediction(sd.read_zarr(result), "ridge")
    assert np.array_equal(found.X, expected.X)
    assert (frame["n_tiles"][0], frame["n_genes"][0]) == expected.shape


def test_a_result_of_another_table_is_not_taken_for_this_one(several, trained, tmp_path):
    out = tmp_path / "out"
    image = next(name for name in sd.read_zarr(several).images if name != "other_image")
    first = hx.tl.predict_cohort(several, trained, out, table_key="table", image_key=image)
    assert first["status"].tolist() == ["done"], first["message"][0]
    for keys in ({"table_key": "thinned"}, {"table_key": "table", "shapes_key": "spots"}, {"image_key": "other_image"}):
        with pytest.raises(DataValueError, match="Name another folder"):
            hx.tl.predict_cohort(several, trained, out, **{"image_key": image, **keys})
    (out / "manifest.parquet").unlink()  # the result itself says what it is
    frame = hx.tl.predict_cohort(several, trained, out, table_key="thinned", image_key=image)
    assert "exists and is no result of this slide" in frame["message"][0]
    frame = hx.tl.predict_cohort(several, trained, out, table_key="thinned", image_key=image, overwrite=True)
    assert frame["n_tiles"][0] == sd.read_zarr(several)["thinned"].n_obs


def test_an_earlier_prediction_in_another_table_is_left_where_it_is(several, trained, tmp_path):
    sdata = sd.read_zarr(several)
    image = next(name for name in sdata.images if name != "other_image")
    hx.tl.predict(sdata, trained, table_key="table", image_key=image)
    sdata.write(tmp_path / "again.zarr")
    frame = hx.tl.predict_cohort(
        tmp_path / "again.zarr", trained, tmp_path / "out", format="h5ad", table_key="thinned", image_key=image
    )
    assert frame["status"].tolist() == ["done"], frame["message"][0]
    assert ad.read_h5ad(tmp_path / "out" / "again.h5ad").n_obs == sdata["thinned"].n_obs


def test_keys_of_stores_do_not_concern_image_files(several, slides, trained, tmp_path):
    image = next(name for name in sd.read_zarr(several).images if name != "other_image")
    keys = {"table_key": "table", "image_key": image}
    frame = hx.tl.predict_cohort([several, slides / "first.tif"], trained, tmp_path / "out", **keys)
    assert frame["status"].tolist() == ["done", "done"], frame["message"].tolist()
    with pytest.raises(DataValueError, match="table_key='table'.*no slide is one"):
        hx.tl.predict_cohort(slides, trained, tmp_path / "none", **keys)
    assert not (tmp_path / "none").exists()


def test_a_store_without_the_table_named_fails_before_it_is_embedded(slides, trained, tmp_path, embedded):
    hx.io.read_wsi(slides / "first.tif").write(tmp_path / "bare.zarr")
    frame = hx.tl.predict_cohort(tmp_path / "bare.zarr", trained, tmp_path / "out", table_key="table")
    assert "table_key='table'" in frame["message"][0]
    assert embedded == []


def test_superpixels_of_many_slides(slides, tmp_path):
    section = hx.datasets.synthetic(size_px=800, pitch_um=60.0, diameter_um=50.0, n_genes=20, seed=2)
    hx.pp.detect_tissue(section)
    hx.pp.superpixels(section, 16.0)
    hx.pp.embed(section, "rgb", shapes_key="superpixels")
    model = hx.tl.train(section, "ridge_parts", genes=section["table"].var_names[:5])
    frame = hx.tl.predict_cohort(slides, model, tmp_path / "out", format="h5ad")
    assert frame["status"].tolist() == ["done", "done"], frame["message"].tolist()
    slide = hx.io.read_wsi(slides / "first.tif")
    hx.tl.predict(slide, model)
    stored = ad.read_h5ad(tmp_path / "out" / "first.h5ad")
    assert np.array_equal(stored.X, slide["ridge_parts_superpixels"].X)
    assert frame["n_tiles"][0] == len(slide["superpixels"])


def test_a_model_of_one_section_is_refused(slides, tmp_path):
    section = hx.datasets.synthetic(size_px=800, pitch_um=60.0, diameter_um=50.0, n_genes=20, seed=2)
    hx.pp.detect_tissue(section)
    hx.pp.superpixels(section, 30.0)
    model = hx.tl.train(section, "interpolate", genes=section["table"].var_names[:5])
    with pytest.raises(hx.errors.ModelMismatchError, match="predicts the section it was fitted on and no other"):
        hx.tl.predict_cohort(slides, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {}, "paths is empty"),
        ("{out}", {}, "is the folder of the slides"),
        ("{nothing}", {}, "holds no slide; looked for .bif"),
        (["{slides}/first.tif", "{slides}/../slides/first.tif"], {}, "named more than once"),
        ("{slides}", {"format": "csv"}, "possible: 'zarr', 'h5ad'"),
        ("{slides}", {"retries": -1}, "must be at least 0"),
        ("{slides}", {"genes": ["NOPE"]}, "does not predict 1 of 1"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(slides, trained, tmp_path, paths, options, message):
    (tmp_path / "nothing").mkdir()
    out = tmp_path / "nothing" if paths == "{out}" else tmp_path / "out"
    places = {"slides": slides, "nothing": tmp_path / "nothing", "out": out}
    named = paths.format(**places) if isinstance(paths, str) else [path.format(**places) for path in paths]
    with pytest.raises(DataValueError, match=message):
        hx.tl.predict_cohort(named, trained, out, **options)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "nothing").iterdir()) == []


def test_what_would_meet_every_slide_is_said_once_and_at_once(slides, trained, tmp_path, monkeypatch):
    with pytest.raises(DataValueError, match="device='cuda:99' is not available"):
        hx.tl.predict_cohort(slides, trained, tmp_path / "out", device="cuda:99")

    def missing(name, **_):
        raise hx.errors.MissingWeightsError(f"{name}: no weights")

    monkeypatch.setattr(_predict_cohort, "create", missing)
    with pytest.raises(hx.errors.MissingWeightsError, match="morphology: no weights"):
        hx.tl.predict_cohort(slides, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_events_are_json_lines(mixed, trained, tmp_path, capsys):
    hx.tl.predict_cohort(mixed, trained, tmp_path / "out", log=tmp_path / "logs" / "run.jsonl")
    events = [json.loads(line) for line in (tmp_path / "logs" / "run.jsonl").read_text().splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["cohort_started", "cohort_finished"]
    assert (events[-1]["done"], events[-1]["failed"]) == (2, 7)
    first = [event for event in events if Path(event.get("slide", "")).name == "first.tif"]
    assert [event["event"] for event in first] == ["slide_started", *["stage"] * 6, "slide_done"]
    assert sum(event["event"] == "slide_failed" for event in events) == 7
    assert all(event["seconds"] >= 0 for event in events if event["event"] == "stage")
    capsys.readouterr()
    hx.tl.predict_cohort(mixed, trained, tmp_path / "out", log="-")
    kept = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert sum(event["event"] == "slide_kept" for event in kept) == 2


@pytest.mark.parametrize(("times", "retries", "expected"), [(1, 1, "done"), (2, 1, "failed"), (2, 2, "done")])
def test_a_failure_that_may_pass_is_tried_again_after_the_others(
    slides, trained, tmp_path, monkeypatch, times, retries, expected
):
    seen = []
    opened = ONE.open_slide

    def flaky(path, mpp=None):
        seen.append(path.name)
        if path.name == "first.tif" and seen.count("first.tif") <= times:
            try:
                raise OSError(errno.EIO, "Input/output error")
            except OSError as error:
                raise hx.errors.ImageFormatError("image: a tile cannot be read") from error
        return opened(path, mpp)

    monkeypatch.setattr(ONE, "open_slide", flaky)
    frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out", retries=retries).set_index("output")
    assert seen[:3] == ["first.tif", "second.tif", "first.tif"]
    assert frame.loc["first.zarr", "status"] == expected
    assert frame.loc["first.zarr", "attempts"] == min(times, retries) + 1
    assert frame.loc["second.zarr", "status"] == "done"


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_stops_all_and_leaves_nothing_half_written(slides, trained, tmp_path, monkeypatch, number, format):
    out = tmp_path / "out"
    published = ONE.publish
    full = [False]

    def publish(part, path):
        if path.name.startswith("second") and full[0]:
            raise OSError(number, os.strerror(number))
        published(part, path)

    monkeypatch.setattr(ONE, "publish", publish)
    full[0] = True
    with pytest.raises(OutputError, match=os.strerror(number)):
        hx.tl.predict_cohort(slides, trained, out, format=format)
    stored = pd.read_parquet(out / "manifest.parquet")
    assert status(stored) == {"first.tif": "done", "second.tif": "pending"}
    assert sorted(path.stem for path in out.glob(f"*.{format}")) == ["first"]
    assert staged(out) == []
    full[0] = False
    frame = hx.tl.predict_cohort(slides, trained, out, format=format)
    assert set(frame["status"]) == {"done"}
    assert set(frame["message"]) == {""}


@pytest.mark.parametrize("format", ["zarr", "h5ad"])
def test_a_limit_on_file_size_is_a_full_disk(slides, trained, tmp_path, format):
    script = f"""
import hespotex as hx, resource, signal, sys
import hespotex.tl, spatialdata
hx.settings.cache_dir, hx.settings.progress_bar = {str(tmp_path / "cache")!r}, False
hx.tl.predict_cohort  # what is imported may be compiled and written before the limit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    hx.tl.predict_cohort({str(slides)!r}, {str(trained)!r}, {str(tmp_path / "out")!r}, format={format!r})
except hx.errors.OutputError as error:
    print("OutputError", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("OutputError"), done.stderr
    assert not list((tmp_path / "out").glob(f"*.{format}"))
    assert staged(tmp_path / "out") == []
    assert set(hx.tl.predict_cohort(slides, trained, tmp_path / "out", format=format)["status"]) == {"done"}


def test_a_folder_that_cannot_be_written_to_is_said_at_once(slides, trained, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    script = f"""
import hespotex as hx
hx.settings.cache_dir, hx.settings.progress_bar = {str(tmp_path / "cache")!r}, False
hx.tl.predict_cohort({str(slides)!r}, {str(trained)!r}, {str(tmp_path / "out")!r})
"""
    command = [sys.executable, "-c", script]
    if os.geteuid() == 0:  # root may write everywhere unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, without setpriv")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "OutputError: out=" in done.stderr
    assert "cannot be written to" in done.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        hx.tl.predict_cohort(slides, trained, tmp_path / "file" / "out")


def test_one_run_at_a_time_and_a_dead_one_holds_nothing(slides, trained, tmp_path):
    out = tmp_path / "out"
    script = f"""
from pathlib import Path
from hespotex.data.lock import locked
with locked(Path({str(out)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataValueError, match=f"in use by another run \\(process {other.pid} on "):
            hx.tl.predict_cohort(slides, trained, out)
        assert not (out / "manifest.parquet").exists()
        other.kill()
        other.wait()
    assert set(hx.tl.predict_cohort(slides, trained, out)["status"]) == {"done"}


@pytest.fixture
def in_small_runs(monkeypatch):
    """The slide in several runs, each kept at once."""
    monkeypatch.setattr(morphology, "_PART_PX", 300)
    monkeypatch.setattr(partial, "_KEEP_AFTER_S", 0.0)


def test_ctrl_c_in_a_slide_keeps_what_is_done_of_it(tall, trained, tmp_path, monkeypatch, in_small_runs):
    out = tmp_path / "out"
    hx.tl.predict_cohort(tall, trained, tmp_path / "undisturbed")
    embed_runs = morphology.Morphology.embed_runs
    done: list[int] = []

    def interrupted(self, slide, centres, runs, **how):
        for number, found in embed_runs(self, slide, centres, runs, **how):
            yield number, found
            done.append(len(runs))
            if len(done) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(morphology.Morphology, "embed_runs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict_cohort(tall, trained, out)
    assert status(pd.read_parquet(out / "manifest.parquet")) == {"first.tif": "pending", "second.tif": "pending"}
    assert list(out.glob("*.zarr")) == []
    n_runs = done[0]
    assert n_runs > 2
    assert set(hx.tl.predict_cohort(tall, trained, out)["status"]) == {"done"}
    assert done[2] == n_runs - 2  # of the first slide only what was left
    for name in ("first.zarr", "second.zarr"):
        assert np.array_equal(values(out / name), values(tmp_path / "undisturbed" / name))
    assert remains(out) == []


def test_ctrl_c_right_after_a_result_does_not_lose_the_note_of_it(slides, trained, tmp_path):
    def interrupt(event):
        if event["event"] == "slide_done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hx.tl.predict_cohort(slides, trained, tmp_path / "out", log=interrupt)
    stored = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert status(stored) == {"first.tif": "done", "second.tif": "pending"}


def test_an_embedding_is_not_lost_by_what_follows_it(slides, trained, tmp_path, monkeypatch, in_small_runs):
    predict = ONE.predict
    calls: list[str] = []

    def failing(sdata, *args, **kwargs):
        calls.append("predict")
        if len(calls) == 1:
            raise MemoryError("no more")
        return predict(sdata, *args, **kwargs)

    monkeypatch.setattr(ONE, "predict", failing)
    computed: list[int] = []
    embed_runs = morphology.Morphology.embed_runs

    def counted(self, slide, centres, runs, **how):
        for number, found in embed_runs(self, slide, centres, runs, **how):
            computed.append(number)
            yield number, found

    monkeypatch.setattr(morphology.Morphology, "embed_runs", counted)
    frame = hx.tl.predict_cohort(slides / "first.tif", trained, tmp_path / "out", retries=0)
    assert frame["error"].tolist() == ["MemoryError"]
    once = len(computed)
    assert hx.tl.predict_cohort(slides / "first.tif", trained, tmp_path / "out")["status"].tolist() == ["done"]
    assert len(computed) == once
    assert remains(tmp_path / "out") == []


def test_a_cluster_gives_the_same_results(mixed, trained, tmp_path, cluster):
    here = hx.tl.predict_cohort(mixed, trained, tmp_path / "here")
    events: list[dict] = []
    there = hx.tl.predict_cohort(mixed, trained, tmp_path / "there", client=cluster, log=events.append)
    columns = ["slide", "output", "status", "n_tiles", "n_genes", "error", "message", "identity", "warnings"]
    pd.testing.assert_frame_equal(here[columns], there[columns])
    for name in ("first.zarr", "second.zarr"):
        assert np.array_equal(values(tmp_path / "here" / name), values(tmp_path / "there" / name))
    assert remains(tmp_path / "there") == []
    assert events[-1]["event"] == "cohort_finished"


@pytest.mark.slow
def test_a_slide_that_kills_its_workers_fails_and_the_others_go_on(slides, trained, tmp_path):
    import dask

    with dask.config.set({"distributed.scheduler.allowed-failures": 1, "logging.distributed": "critical"}):
        workers = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", host="127.0.0.1", memory_limit=0
        )
        client = distributed.Client(workers)
        try:
            client.register_plugin(_Deadly("first.tif"))
            frame = hx.tl.predict_cohort(slides, trained, tmp_path / "out", client=client)
        finally:
            with contextlib.suppress(TimeoutError):  # the machine may be busy
                client.close()
                workers.close()
    assert status(frame) == {"first.tif": "failed", "second.tif": "done"}
    assert frame["error"][0] == "WorkerError"
    assert "run out of memory" in frame["message"][0]


class _Deadly(distributed.WorkerPlugin):
    """A worker, also one that replaces another, is killed when it reads a slide, as by the system where memory is short."""

    def __init__(self, name: str) -> None:
        self._name = name

    def setup(self, worker) -> None:
        from hespotex.tl._cohort import one

        opened, deadly = one.open_slide, self._name

        def open_slide(path, mpp=None):
            if path.name == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return opened(path, mpp)

        one.open_slide = open_slide


RUN = """
import sys, time
import hespotex as hx
from hespotex.data import partial
from hespotex.encoders import morphology
partial._KEEP_AFTER_S = 0.0
morphology._PART_PX = 300
hx.settings.cache_dir, hx.settings.progress_bar = sys.argv[4], False
print("begun", flush=True)
frame = hx.tl.predict_cohort(*sys.argv[1:4])
sys.exit(3 if (frame["status"] != "done").any() else 0)
"""


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(mixed, trained, tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    command = [sys.executable, "-c", RUN, str(mixed), str(trained)]
    rng = np.random.default_rng(0)
    start = time.monotonic()
    assert subprocess.run([*command, str(undisturbed), str(tmp_path / "cache")], check=False).returncode == 3
    took = time.monotonic() - start
    for _ in range(2):
        with subprocess.Popen([*command, str(out), str(tmp_path / "cache2")], stdout=subprocess.PIPE) as run:
            run.stdout.readline()
            time.sleep(rng.uniform(0.2, 0.9) * took / 3)
            run.kill()
        for path in out.glob("*.zarr"):
            sd.read_zarr(path)  # what is there is whole
    assert subprocess.run([*command, str(out), str(tmp_path / "cache2")], check=False).returncode == 3
    for name in ("first.zarr", "second.zarr"):
        assert np.array_equal(values(out / name), values(undisturbed / name))
    assert remains(out) == []
    assert status(pd.read_parquet(out / "manifest.parquet")) == status(
        pd.read_parquet(undisturbed / "manifest.parquet")
    )
