"""Visium HD folders in the real layout."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import spatialdata as sd
from scipy import sparse

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres, shape_radius
from hespotex.errors import CountsError, DataValueError, GeometryError, HespotexWarning

from .visium_hd_folder import write_visium_hd_folder

MPP = 0.5
ANGLE = np.radians(3)  # the array lies askew on the slide


def bins(size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Array positions of n x n bins, and their centres in pixels of the image."""
    array = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), axis=-1).reshape(-1, 2)
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
    return array, (array[:, ::-1] + 0.5) * size / MPP @ turn.T + (80, 40)


@pytest.fixture
def written(tmp_path, section):
    """A folder of bins of 8 and 16 µm on a synthetic section; what was written."""
    pixels = np.ascontiguousarray(np.moveaxis(section["image"].values, 0, -1))
    genes = ["GENE1", "GENE2", "GENE3", "GENE2", "MT-ND1"]  # one symbol of two genes
    rng = np.random.default_rng(0)
    positions = {8: bins(8, 30), 16: bins(16, 15)}
    counts = {}
    for size, (_, xy) in positions.items():
        red = pixels[xy[:, 1].astype(int), xy[:, 0].astype(int)].mean(axis=1)
        rate = np.column_stack([(255 - red) / 40, np.full((len(xy), 4), 0.7)])
        counts[size] = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    image = write_visium_hd_folder(tmp_path / "outs", pixels, counts, positions, mpp=MPP, genes=genes)
    return tmp_path / "outs", image, pixels, counts, positions


@pytest.mark.parametrize("size", [8, 16])
def test_bins_counts_and_image_are_those_written(written, size, caplog):
    path, _, pixels, counts, positions = written
    with caplog.at_level(logging.INFO, "hespotex"):
        sdata = hx.io.read_visium_hd(path, size, patient="P")
    assert "1 symbols stand for several genes" in caplog.text
    table, (array, xy) = sdata["table"], positions[size]
    assert sparse.isspmatrix_csr(table.X) or table.X.format == "csr"
    assert np.array_equal(table.X.toarray(), counts[size].toarray())
    assert list(table.var_names) == ["GENE1", "GENE2", "GENE3", "GENE2-1", "MT-ND1"]
    assert np.array_equal(table.obs[["array_row", "array_col"]], array)
    assert np.abs(table.obsm["spatial"] - xy).max() < 1e-9
    slide = resolve_slide(sdata)
    assert slide.mpp == pytest.approx(MPP)
    assert np.array_equal(np.moveaxis(slide.levels[0].array.compute(), 0, -1), pixels)
    assert np.abs(shape_centres(sdata, "bins", slide) - xy).max() < 1e-6
    assert shape_radius(sdata, "bins", slide) == pytest.approx(size / 2)
    assert (sdata["bins"].geometry.geom_type == "Polygon").all()
    assert sdata["bins"].geometry.area.to_numpy() == pytest.approx((size / MPP) ** 2)
    assert sdata.attrs["hespotex"] == {
        "name": path.parent.name, "patient": "P", "bin_size_um": size, "left_out": {}
    }  # fmt: skip


def test_bins_may_be_circles(written):
    sdata = hx.io.read_visium_hd(written[0], bins_as_squares=False)
    assert (sdata["bins"].geometry.geom_type == "Point").all()
    assert shape_radius(sdata, "bins", resolve_slide(sdata)) == pytest.approx(4)


def test_a_prefixed_download_and_a_given_image(written, tmp_path):
    path, image, _, _, _ = written
    (path / "feature_slice.h5").rename(path / "Lung_feature_slice.h5")
    elsewhere = tmp_path / "elsewhere.btf"
    image.rename(elsewhere)
    with pytest.raises(DataValueError, match="image: the folder holds no microscope image; pass image="):
        hx.io.read_visium_hd(path)
    sdata = hx.io.read_visium_hd(path, image=elsewhere)
    assert sdata.attrs["hespotex"]["name"] == "Lung"
    elsewhere.rename(path / "Lung_tissue_image.btf")
    assert hx.io.read_visium_hd(path)["table"].n_obs == 900
    (path / "Other_tissue_image.tif").write_bytes(b"")
    with pytest.raises(DataValueError, match="several files that may be the microscope image"):
        hx.io.read_visium_hd(path)


def test_the_section_survives_the_disk(written, tmp_path):
    sdata = hx.io.read_visium_hd(written[0], 16)
    sdata.write(tmp_path / "section.zarr")
    back = sd.read_zarr(tmp_path / "section.zarr")
    assert (back["table"].X != sdata["table"].X).nnz == 0
    slides = [resolve_slide(data) for data in (sdata, back)]
    assert slides[1].mpp == slides[0].mpp
    assert np.abs(shape_centres(back, "bins", slides[1]) - shape_centres(sdata, "bins", slides[0])).max() < 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")
@pytest.mark.filterwarnings("ignore:.*have fewer than 1 counts")
def test_bins_are_embedded_and_predicted(written):
    sdata = hx.io.read_visium_hd(written[0])
    hx.pp.embed(sdata, "rgb", tile_um=16)
    model = hx.tl.train([sdata], "ridge", genes=["GENE1", "GENE3"])
    hx.tl.predict(sdata, model)
    predicted = hx.get.prediction(sdata, "ridge")
    measured = np.asarray(sdata["table"][:, "GENE1"].X.todense()).ravel()
    assert np.corrcoef(np.asarray(predicted[:, "GENE1"].X).ravel(), measured)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("missing", "called"),
    [
        ("feature_slice.h5", "feature slice"),
        ("binned_outputs/square_008um/filtered_feature_bc_matrix.h5", "filtered feature-barcode matrix"),
        ("binned_outputs/square_008um/spatial/tissue_positions.parquet", "tissue positions"),
        ("binned_outputs/square_008um/spatial/scalefactors_json.json", "scale factors"),
    ],
)
def test_a_missing_file_is_named(written, missing, called):
    (written[0] / missing).unlink()
    with pytest.raises(DataValueError, match=f"there is no '{missing.split('/')[-1]}' in .*10x calls it the {called}"):
        hx.io.read_visium_hd(written[0])


def test_what_does_not_fit(written, tmp_path):
    path, _, pixels, _, _ = written
    with pytest.raises(DataValueError, match=r"bin_size=2 is not among those of the folder: \[8, 16\]"):
        hx.io.read_visium_hd(path, 2)
    with pytest.raises(DataValueError, match="does not exist; give the output folder of Space Ranger"):
        hx.io.read_visium_hd(tmp_path / "nothing")
    small = tmp_path / "small.png"
    from PIL import Image

    Image.fromarray(pixels[:200, :200]).save(small)
    with pytest.raises(GeometryError, match="Pass the image that was given to Space Ranger"):
        hx.io.read_visium_hd(path, image=small)
    matrix = path / "binned_outputs" / "square_016um" / "filtered_feature_bc_matrix.h5"
    matrix.write_bytes(matrix.read_bytes()[:500])
    with pytest.raises(DataValueError, match="no feature matrix of 10x, or damaged"):
        hx.io.read_visium_hd(path, 16)
    (path / "binned_outputs" / "square_008um" / "spatial" / "scalefactors_json.json").write_text("{")
    with pytest.raises(DataValueError, match="'scalefactors_json.json' is no JSON"):
        hx.io.read_visium_hd(path)


def test_positions_of_another_run(written):
    import pandas as pd

    file = written[0] / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"
    pd.read_parquet(file).iloc[:10].to_parquet(file)
    with pytest.raises(DataValueError, match="spatialdata_io.visium_hd cannot read this folder"):
        hx.io.read_visium_hd(written[0])


def test_normalised_values_are_refused(written):
    import h5py

    with h5py.File(written[0] / "binned_outputs" / "square_008um" / "filtered_feature_bc_matrix.h5", "a") as file:
        values = file["matrix/data"][:] * 0.5
        del file["matrix/data"]
        file["matrix/data"] = values
    with pytest.raises(CountsError, match="not whole numbers"):
        hx.io.read_visium_hd(written[0])


def test_an_image_that_states_another_scale_is_told(written, tmp_path):
    import tifffile

    other = tmp_path / "other.tif"
    tifffile.imwrite(
        other, written[2], photometric="rgb", resolution=(1e4 / 0.25, 1e4 / 0.25), resolutionunit="CENTIMETER"
    )
    with pytest.warns(HespotexWarning, match="states 0.25 µm/px"):
        sdata = hx.io.read_visium_hd(written[0], image=other)
    assert resolve_slide(sdata).mpp == pytest.approx(MPP)
