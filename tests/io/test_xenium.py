"""Xenium folders in the real layout, with an H&E image that lies turned."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import spatialdata as sd
from scipy import sparse

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres, shape_geometries, shape_radius
from hespotex.errors import DataValueError, GeometryError, HespotexWarning, ScaleError

from .xenium_folder import PIXEL_UM, write_xenium_folder

MPP = 0.5
GENES = ["EPCAM", "VIM", "PTPRC"]


@pytest.fixture
def turned(section):
    """The H&E of a section turned by 90°, and what takes its pixels to the section's."""
    pixels = np.moveaxis(section["image"].values, 0, -1)
    to_section = np.array([[0.0, -1, pixels.shape[1]], [1, 0, 0], [0, 0, 1]])
    return np.ascontiguousarray(np.rot90(pixels)), to_section


@pytest.fixture
def written(tmp_path, section, turned):
    """Writer of a folder of 120 cells on the section; its path, counts, ids and positions in pixels of the H&E."""
    pixels, to_section = turned
    rng = np.random.default_rng(0)
    xy = rng.uniform(20, 780, (120, 2))  # pixels of the section
    upright = np.moveaxis(section["image"].values, 0, -1)
    dark = 255 - upright[xy[:, 1].astype(int), xy[:, 0].astype(int)].mean(axis=1)
    counts = sparse.csr_matrix(rng.poisson(np.column_stack([dark / 4, np.full((120, 2), 2)])).astype(np.float32))
    alignment = np.diag([MPP / PIXEL_UM, MPP / PIXEL_UM, 1]) @ to_section

    def write(**options):
        options = {"pixels": pixels, "alignment": alignment, "mpp": MPP} | options
        names = write_xenium_folder(tmp_path / "outs", xy * MPP, counts, GENES, **options)
        there = np.column_stack([xy[:, 1], pixels.shape[0] - xy[:, 0]])
        return tmp_path / "outs", counts, names, there

    return write


def test_cells_counts_and_image_are_those_written(written, turned, caplog):
    path, counts, names, xy = written()
    with caplog.at_level(logging.INFO, "hespotex"):
        sdata = hx.io.read_xenium(path, patient="P")
    assert "2 of type 'Unassigned Codeword'" in caplog.text
    table = sdata["table"]
    assert np.array_equal(table.X.toarray(), counts.toarray())
    assert list(table.var_names) == GENES
    assert list(table.obs["cell_id"]) == names
    slide = resolve_slide(sdata)
    assert slide.mpp == pytest.approx(MPP)
    assert np.array_equal(np.moveaxis(slide.levels[0].array.compute(), 0, -1), turned[0])
    assert np.abs(table.obsm["spatial"] - xy).max() < 1e-6
    for key, side in (("cell_boundaries", 8), ("nucleus_boundaries", 4)):
        assert np.abs(shape_centres(sdata, key, slide) - xy).max() < 1e-3
        assert shape_radius(sdata, key, slide) == pytest.approx(side / 2, rel=1e-4)
        assert shape_geometries(sdata, key, slide).area.to_numpy() == pytest.approx((side / MPP) ** 2, rel=1e-4)
    assert sdata.attrs["hespotex"] == {
        "name": "core-1",
        "patient": "P",
        "left_out": {"Negative Control Codeword": 1, "Negative Control Probe": 1, "Unassigned Codeword": 2},
    }
    assert not sdata.points


def test_a_cell_lies_on_its_pixel(tmp_path):
    """One bright pixel, through a turned and scaled alignment."""
    pixels = np.full((300, 400, 3), 90, np.uint8)
    pixels[120, 250] = 255
    matrix = np.array([[0.0, 2.0, 30.0], [-2.0, 0.0, 900.0], [0, 0, 1]])
    microns = ((np.array([[250.5, 120.5, 1]]) @ matrix.T)[:, :2]) * PIXEL_UM
    write_xenium_folder(
        tmp_path / "outs", microns, sparse.csr_matrix([[3.0, 0, 1]]), GENES, pixels=pixels, alignment=matrix
    )
    sdata = hx.io.read_xenium(tmp_path / "outs")
    slide = resolve_slide(sdata)
    x, y = shape_centres(sdata, "cell_boundaries", slide)[0]
    assert (np.floor(x), np.floor(y)) == (250, 120)
    assert slide.levels[0].array[:, int(y), int(x)].compute().tolist() == [255, 255, 255]
    assert slide.mpp == pytest.approx(2 * PIXEL_UM)


def test_transcripts_are_lazy_and_lie_on_their_cells(written):
    path, _, _, xy = written()
    sdata = hx.io.read_xenium(path, transcripts=True)
    from spatialdata import transform

    points = transform(sdata["transcripts"], to_coordinate_system="global")[["x", "y"]].compute().to_numpy()
    nearest = np.linalg.norm(points[:, None] - xy[None], axis=-1).min(axis=1)
    assert len(points) == 360
    assert nearest.max() < 1e-2


def test_the_section_survives_the_disk(written, tmp_path):
    sdata = hx.io.read_xenium(written()[0])
    sdata.write(tmp_path / "section.zarr")
    back = sd.read_zarr(tmp_path / "section.zarr")
    assert (back["table"].X != sdata["table"].X).nnz == 0
    slides = [resolve_slide(data) for data in (sdata, back)]
    assert slides[1].mpp == pytest.approx(slides[0].mpp)
    centres = [shape_centres(data, "cell_boundaries", slide) for data, slide in zip((sdata, back), slides, strict=True)]
    assert np.abs(centres[1] - centres[0]).max() < 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")
@pytest.mark.filterwarnings("ignore:.*have fewer than 1 counts")
def test_cells_are_embedded_and_predicted(written):
    sdata = hx.io.read_xenium(written()[0])
    hx.pp.embed(sdata, "rgb", tile_um=4)
    model = hx.tl.train([sdata], "ridge", genes=["EPCAM", "VIM"])
    hx.tl.predict(sdata, model)
    predicted = np.asarray(hx.get.prediction(sdata, "ridge")[:, "EPCAM"].X).ravel()
    measured = np.asarray(sdata["table"][:, "EPCAM"].X.todense()).ravel()
    assert np.corrcoef(predicted, measured)[0, 1] > 0.5


def test_cells_beyond_the_image_or_without_outline_are_left_out(written, turned):
    path, _, names, xy = written(pixels=np.ascontiguousarray(turned[0][:500]))
    import pandas as pd

    outlines = pd.read_parquet(path / "cell_boundaries.parquet")
    inside = np.flatnonzero(xy[:, 1] < 500)
    outlines[outlines["cell_id"] != names[inside[0]]].to_parquet(path / "cell_boundaries.parquet")
    with (
        pytest.warns(HespotexWarning, match=f"{120 - len(inside)} of 120 cells lie beyond sample_he_image.ome.tif"),
        pytest.warns(HespotexWarning, match="1 of 120 cells have no outline"),
    ):
        sdata = hx.io.read_xenium(path)
    assert list(sdata["table"].obs["cell_id"]) == [names[row] for row in inside[1:]]
    assert list(sdata["cell_boundaries"].index) == [names[row] for row in inside[1:]]
    assert len(sdata["nucleus_boundaries"]) == len(inside)


def test_an_image_on_the_grid_of_the_morphology_image_needs_no_alignment(tmp_path):
    pixels = np.full((400, 400, 3), 200, np.uint8)
    microns = np.array([[40.0, 30.0], [60.0, 70.0]])
    counts = sparse.csr_matrix([[1.0, 2, 3], [4, 5, 6]])
    write_xenium_folder(tmp_path / "outs", microns, counts, GENES, pixels=pixels, mpp=PIXEL_UM)
    sdata = hx.io.read_xenium(tmp_path / "outs")
    assert sdata["table"].obsm["spatial"] == pytest.approx(microns / PIXEL_UM)
    write_xenium_folder(tmp_path / "mute", microns, counts, GENES, pixels=pixels)
    with pytest.warns(HespotexWarning, match="no alignment of sample_he_image.ome.tif"):
        hx.io.read_xenium(tmp_path / "mute")
    write_xenium_folder(tmp_path / "other", microns, counts, GENES, pixels=pixels, mpp=0.27)
    with pytest.raises(ScaleError, match=r"0.27 µm/px, Xenium's morphology image 0.2125; pass alignment="):
        hx.io.read_xenium(tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("1,0,0\n0,1,0\n", GeometryError, "2 x 3 numbers"),
        ("1,0,0\n0,1,0\n0,0.5,1\n", GeometryError, "no affine map"),
        ("1,0,0\n2,0,0\n0,0,1\n", GeometryError, "no affine map"),
        ("a,b\n", DataValueError, "no table of numbers"),
        ("1,0,90000\n0,1,0\n0,0,1\n", GeometryError, "none of 120 cells lies on"),
        ("1,0,0\n0,2,0\n0,0,1\n", ScaleError, "one scale within 3%"),
    ],
)
@pytest.mark.filterwarnings("ignore:the alignment gives:hespotex.errors.HespotexWarning")
@pytest.mark.filterwarnings("ignore:.*cells lie beyond:hespotex.errors.HespotexWarning")
def test_alignments_that_cannot_be(written, text, error, message):
    path, *_ = written()
    (path / "sample_he_imagealignment.csv").write_text(text)
    with pytest.raises(error, match=message):
        hx.io.read_xenium(path)


def test_an_alignment_of_another_image_is_suspected(written):
    path, *_ = written(mpp=0.25)
    with pytest.warns(HespotexWarning, match="0.5 µm/px, but the file states 0.25"):
        hx.io.read_xenium(path)


@pytest.mark.parametrize(
    ("missing", "called"),
    [
        ("experiment.xenium", "experiment manifest"),
        ("cells.zarr.zip", "cell segmentation masks and boundaries"),
        ("cells.parquet", "cell summary"),
        ("cell_boundaries.parquet", "cell segmentation boundaries"),
        ("nucleus_boundaries.parquet", "nucleus segmentation boundaries"),
        ("cell_feature_matrix.h5", "cell-feature matrix"),
        ("transcripts.parquet", "transcript data"),
    ],
)
def test_a_missing_file_is_named(written, missing, called):
    path, *_ = written()
    (path / missing).unlink()
    with pytest.raises(DataValueError, match=f"there is no '{missing}' in .*10x calls it the {called}"):
        hx.io.read_xenium(path, transcripts=True)


def test_an_image_that_is_not_there(written):
    path, *_ = written(pixels=None)
    with pytest.raises(DataValueError, match=r"holds no H&E image \(\*he_image.ome.tif\); pass image="):
        hx.io.read_xenium(path)
    with pytest.raises(DataValueError, match="there is no file"):
        hx.io.read_xenium(path, path / "he.tif")


@pytest.mark.parametrize("damaged", ["cells.zarr.zip", "cells.parquet", "cell_boundaries.parquet"])
def test_a_damaged_file_is_told(written, damaged):
    path, *_ = written()
    (path / damaged).write_bytes((path / damaged).read_bytes()[:300])
    with pytest.raises(DataValueError, match="spatialdata_io.xenium cannot read this folder"):
        hx.io.read_xenium(path)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:image .image. has 2.12 µm:hespotex.errors.HespotexWarning")
def test_real_cells_on_their_image(data_dir, tmp_path):
    """200 cells of a lung, whose folder is written here: they lie on nuclei, which are darker than a few µm beside."""
    import anndata as ad

    source = data_dir / "xenium_lung_cells"
    cells = ad.read_h5ad(source / "NCBI858.h5ad")
    xy = cells.obs[["y_pixel", "x_pixel"]].to_numpy(dtype=float)  # named the wrong way round
    folder = tmp_path / "outs"
    write_xenium_folder(folder, xy * 10 * PIXEL_UM, sparse.csr_matrix(cells.X), list(cells.var_names))
    (tmp_path / "alignment.csv").write_text("10,0,0\n0,10,0\n0,0,1\n")
    sdata = hx.io.read_xenium(folder, source / "NCBI858.jpg", alignment=tmp_path / "alignment.csv")
    slide = resolve_slide(sdata)
    assert slide.mpp == pytest.approx(2.125)
    assert np.array_equal(sdata["table"].X.toarray(), cells.X)
    grey = slide.levels[0].array.compute().mean(axis=0)
    centres = shape_centres(sdata, "cell_boundaries", slide)
    assert np.abs(centres - xy).max() < 1e-3

    def brightness(shift):
        x, y = (centres + shift).astype(int).T
        return grey[y.clip(0, grey.shape[0] - 1), x.clip(0, grey.shape[1] - 1)].mean()

    beside = [brightness(shift) for shift in ((4, 0), (-4, 0), (0, 4), (0, -4))]
    assert brightness((0, 0)) < min(beside)
