from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse
from spatialdata.models import get_table_keys
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    ScaleError,
)


def visium(n: int = 3, *, pitch_px: float = 40.0, diameter_px: float | None = 26.0, libraries=("lib",)) -> ad.AnnData:
    """Spots of a hexagonal lattice: 100 µm = 40 px, so 2.5 µm/px; 26 px = 65 µm."""
    row, col = np.divmod(np.arange(n * n), n)
    xy = np.stack([20 + pitch_px * (col + row % 2 / 2), 20 + pitch_px * row * np.sqrt(3) / 2], axis=1)
    adata = ad.AnnData(
        X=sparse.csr_matrix(np.arange(n * n * 2, dtype=np.float32).reshape(-1, 2)),
        obs=pd.DataFrame({"array_row": row, "array_col": 2 * col + row % 2}, index=[f"AAC{i}-1" for i in range(n * n)]),
        var=pd.DataFrame(index=["A", "B"]),
        obsm={"spatial": xy},
    )
    if diameter_px is not None:
        scales = {"spot_diameter_fullres": diameter_px, "tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03}
        adata.uns["spatial"] = {library: {"scalefactors": dict(scales)} for library in libraries}
    return adata


def image(height: int = 160, width: int = 180) -> np.ndarray:
    return np.full((height, width, 3), 200, np.uint8)


def mpp_of(sdata) -> float:
    return float(get_transformation(sdata["image"], "microns").scale[0])


def test_visium_lattice_gives_the_scale() -> None:
    adata = visium()
    sdata = hx.io.from_anndata(adata, image(), patient="p")
    assert mpp_of(sdata) == pytest.approx(2.5)
    assert sdata["spots"]["radius"].tolist() == pytest.approx([13] * 9)
    table = sdata["table"]
    assert table.obsm["spatial"].tolist() == adata.obsm["spatial"].tolist()
    assert np.array_equal(table.X.toarray(), adata.X.toarray())
    assert sdata.attrs["hespotex"] == {"name": "lib", "patient": "p"}
    assert "region" not in adata.obs  # the object given is left as it was


def test_scale_given() -> None:
    adata = visium(diameter_px=None)
    with pytest.raises(ScaleError, match="pitch_um"):
        hx.io.from_anndata(adata, image())
    with pytest.raises(ScaleError, match="spot_diameter_um"):
        hx.io.from_anndata(adata, image(), mpp=2.0)
    sdata = hx.io.from_anndata(adata, image(), mpp=2.0, spot_diameter_um=55)
    assert sdata["spots"]["radius"].iloc[0] == pytest.approx(55 / 2 / 2)
    sdata = hx.io.from_anndata(adata, image(), pitch_um=20, spot_diameter_um=16)
    assert mpp_of(sdata) == pytest.approx(0.5)
    for name in ("mpp", "pitch_um", "spot_diameter_um"):
        with pytest.raises(ScaleError, match=name):
            hx.io.from_anndata(visium(), image(), **{name: -1.0})


def test_other_lattice_is_not_taken_for_visium() -> None:
    with pytest.raises(ScaleError, match="no Visium lattice"):
        hx.io.from_anndata(visium(diameter_px=20.0), image())
    with pytest.raises(ScaleError):
        hx.io.from_anndata(visium(1), image())


def test_preview_is_reported_and_fits() -> None:
    adata = visium(pitch_px=400.0, diameter_px=260.0)
    adata.obsm["spatial"] = adata.obsm["spatial"] + 15_000
    with pytest.warns(HespotexWarning) as caught:
        sdata = hx.io.from_anndata(adata, image(2000, 1900))
    assert [("preview" in str(w.message)) for w in caught] == [True]
    assert sdata["table"].obsm["spatial"] == pytest.approx(adata.obsm["spatial"] * 0.1)
    assert mpp_of(sdata) == pytest.approx(2.5)
    assert sdata["spots"]["radius"].iloc[0] == pytest.approx(13)
    # the scalefactors go with the positions: what squidpy draws with them still fits
    factors = sdata["table"].uns["spatial"]["lib"]["scalefactors"]
    assert factors == pytest.approx(
        {"spot_diameter_fullres": 26, "tissue_hires_scalef": 1.0, "tissue_lowres_scalef": 0.3}
    )
    assert adata.uns["spatial"]["lib"]["scalefactors"]["spot_diameter_fullres"] == 260


def test_columns_of_the_user_stay(tmp_path: Path) -> None:
    adata = visium()
    adata.obs["region"], adata.obs["Spot_ID"] = "cortex", np.arange(9)
    table = hx.io.from_anndata(adata, image())["table"]
    assert table.obs["region"].tolist() == ["cortex"] * 9
    assert table.obs["Spot_ID"].tolist() == list(range(9))
    assert get_table_keys(table) == ("spots", "hespotex_region", "hespotex_spot_id")
    again = hx.io.from_anndata(table, image())["table"]  # of the same content, they are taken as they are
    assert get_table_keys(again) == ("spots", "hespotex_region", "hespotex_spot_id")
    plain = hx.io.from_anndata(visium(), image())["table"]
    assert get_table_keys(hx.io.from_anndata(plain, image())["table"]) == ("spots", "region", "spot_id")
    section = hx.io.from_anndata(adata, image())
    section.write(tmp_path / "s.zarr")


@pytest.mark.parametrize("place", ["obs", "uns", "layers"])
def test_names_that_spatialdata_does_not_take(place: str) -> None:
    adata = visium()
    getattr(adata, place)["a key"] = adata.X if place == "layers" else 1
    with pytest.raises(DataValueError, match="a key"):
        hx.io.from_anndata(adata, image())


@pytest.mark.parametrize("value", [np.nan, "maybe"])
def test_in_tissue_must_be_known(value: object) -> None:
    adata = visium()
    adata.obs["in_tissue"] = np.array([1] * 8 + [value], dtype=object)
    with pytest.raises(DataValueError, match=r"in_tissue.*AAC8-1"):
        hx.io.from_anndata(adata, image())
    for stored in ([True] * 8 + [False], pd.Categorical(["1"] * 8 + ["0"])):
        adata.obs["in_tissue"] = stored
        assert hx.io.from_anndata(adata, image())["table"].n_obs == 8


def test_coarse_image_is_reported() -> None:
    with pytest.warns(HespotexWarning, match="preview"):
        hx.io.from_anndata(visium(), image(), mpp=5.0)


def test_spots_outside_the_image() -> None:
    with pytest.raises(GeometryError, match="full-resolution"):
        hx.io.from_anndata(visium(), image(90, 90))
    adata = visium()
    adata.obsm["spatial"][0] = np.nan
    with pytest.raises(GeometryError, match="AAC0-1"):
        hx.io.from_anndata(adata, image())


def test_libraries() -> None:
    adata = visium(libraries=("a", "b"))
    with pytest.raises(AmbiguousKeyError, match="library_id"):
        hx.io.from_anndata(adata, image())
    with pytest.raises(MissingKeyError, match="'c'"):
        hx.io.from_anndata(adata, image(), library_id="c")
    assert hx.io.from_anndata(adata, image(), library_id="b").attrs["hespotex"]["name"] == "b"


def test_names_and_rows() -> None:
    adata = visium()
    adata.var_names = ["A", "A"]
    with pytest.raises(DataValueError, match="duplicates='first'"):
        hx.io.from_anndata(adata, image())
    assert hx.io.from_anndata(adata, image(), duplicates="first")["table"].var_names.to_list() == ["A"]
    adata = visium()
    adata.obs_names = ["x"] * 9
    with pytest.raises(DataValueError, match="more than once"):
        hx.io.from_anndata(adata, image())
    adata = visium()
    adata.obs["in_tissue"] = [1] * 8 + [0]
    assert hx.io.from_anndata(adata, image())["table"].n_obs == 8
    assert hx.io.from_anndata(adata, image(), in_tissue_only=False)["table"].n_obs == 9
    adata.obs["in_tissue"] = 0
    with pytest.raises(DataValueError, match="no spot"):
        hx.io.from_anndata(adata, image())
    adata = visium()
    del adata.obsm["spatial"]
    with pytest.raises(MissingKeyError, match="spatial"):
        hx.io.from_anndata(adata, image())
    with pytest.raises(DataTypeError, match="AnnData"):
        hx.io.from_anndata(np.zeros(3), image())  # type: ignore[arg-type]


def test_real_crop(data_dir: Path) -> None:
    folder = data_dir / "visium_mouse_brain_crop"
    adata = ad.read_h5ad(folder / "visium_crop.h5ad")
    sdata = hx.io.from_anndata(adata, folder / "visium_crop.jpg")
    assert mpp_of(sdata) == pytest.approx(0.73, abs=0.01)
    assert 2 * sdata["spots"]["radius"].iloc[0] * mpp_of(sdata) == pytest.approx(65, abs=1)
    assert (sdata["table"].X != adata.X).nnz == 0


@pytest.fixture
def hest(tmp_path: Path) -> Path:
    adata = visium()
    adata.write_h5ad(tmp_path / "S1.h5ad")
    pixels = image()
    pixels[20, 20] = 255
    Image.fromarray(pixels).save(tmp_path / "S1.tif")
    labels = np.zeros((160, 180), np.int32)
    labels[18:23, 18:23] = 7
    np.save(tmp_path / "S1.npy", labels)
    return tmp_path


def test_hest_flat(hest: Path) -> None:
    for path, sample in ((hest, None), (hest, "S1"), (hest / "S1.h5ad", None)):
        sdata = hx.io.read_hest(path, sample)
        x, y = sdata["table"].obsm["spatial"][0].astype(int)
        assert sdata["image"].values[:, y, x].tolist() == [255] * 3
        assert sdata["nuclei_labels"].values[y, x] == 7
        assert sdata.attrs["hespotex"]["name"] == "S1"
    assert get_transformation(sdata["nuclei_labels"], "microns").scale.tolist() == pytest.approx([2.5, 2.5])


def test_hest_folders_and_metadata(hest: Path) -> None:
    for folder, name in (("st", "S1.h5ad"), ("wsis", "S1.tif"), ("metadata", "S1.json")):
        (hest / folder).mkdir()
        if name.endswith("json"):
            (hest / folder / name).write_text('{"pixel_size_um_estimated": 2.4, "patient": "Patient 3"}')
        else:
            (hest / name).rename(hest / folder / name)
    sdata = hx.io.read_hest(hest)
    assert mpp_of(sdata) == pytest.approx(2.4)
    assert sdata.attrs["hespotex"] == {"name": "S1", "patient": "Patient 3"}
    assert mpp_of(hx.io.read_hest(hest, mpp=2.6)) == pytest.approx(2.6)


@pytest.mark.parametrize("content", [b"", b"no table", None])
def test_hest_damaged_table(hest: Path, content: bytes | None) -> None:
    table = hest / "S1.h5ad"
    table.write_bytes(table.read_bytes()[:3000] if content is None else content)
    with pytest.raises(DataValueError, match=r"path: 'S1\.h5ad'"):
        hx.io.read_hest(hest)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff"])
def test_hest_damaged_metadata(hest: Path, content: bytes) -> None:
    (hest / "S1.json").write_bytes(content)
    with pytest.raises(DataValueError, match=r"metadata: 'S1\.json'"):
        hx.io.read_hest(hest)


def test_hest_failures(hest: Path) -> None:
    with pytest.raises(DataValueError, match="S1"):
        hx.io.read_hest(hest, "S2")
    with pytest.raises(DataValueError, match="no file"):
        hx.io.read_hest(hest / "S2.h5ad")
    np.save(hest / "S1.npy", np.zeros((160, 181), np.int32))
    with pytest.raises(GeometryError, match="181"):
        hx.io.read_hest(hest)
    np.save(hest / "S1.npy", np.zeros((160, 180), np.float32))
    with pytest.raises(DataValueError, match="float32"):
        hx.io.read_hest(hest)
    np.save(hest / "S1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataValueError, match="plain"):
        hx.io.read_hest(hest)
    (hest / "S1.npy").unlink()
    assert not hx.io.read_hest(hest).labels
    (hest / "S2.h5ad").write_bytes((hest / "S1.h5ad").read_bytes())
    with pytest.raises(AmbiguousKeyError, match="S1, S2"):
        hx.io.read_hest(hest)
    with pytest.raises(DataValueError, match="image"):
        hx.io.read_hest(hest, "S2")
    (hest / "empty").mkdir()
    with pytest.raises(DataValueError, match=r"no \.h5ad"):
        hx.io.read_hest(hest / "empty")
