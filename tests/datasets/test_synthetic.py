from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import DataValueError, MissingKeyError

SMALL = {"size_px": 500, "pitch_um": 40.0, "diameter_um": 40.0, "n_genes": 50}


def pixels(sdata) -> np.ndarray:
    return np.asarray(sdata["image"])


def test_contract(section) -> None:
    table = section["table"]
    assert table.X.dtype == np.int32
    assert table.X.format == "csr"
    assert table.X.min() >= 0
    assert pixels(section).dtype == np.uint8
    assert pixels(section).shape == (3, 800, 800)
    assert spatialdata.models.get_table_keys(table) == ("spots", "region", "spot_id")
    assert section.attrs["hespotex"] == {"name": "P1S1", "patient": "P1"}
    assert get_transformation(section["spots"], "microns").scale.tolist() == [0.5, 0.5]
    assert section["spots"]["radius"].iloc[0] == 40
    assert table.layers["truth"].shape == table.shape
    assert ((table.obs["array_row"] + table.obs["array_col"]) % 2 == 0).all()


def test_same_seed_same_section_other_seed_another() -> None:
    a, b, c = (hx.datasets.synthetic(**SMALL, seed=seed) for seed in (4, 4, 5))
    assert np.array_equal(pixels(a), pixels(b))
    assert (a["table"].X != b["table"].X).nnz == 0
    assert not np.array_equal(pixels(a), pixels(c))


def test_patient_does_not_depend_on_company() -> None:
    everyone = hx.datasets.synthetic(3, **SMALL, seed=4)
    last = hx.datasets.synthetic(first_patient=2, **SMALL, seed=4)
    assert [sdata.attrs["hespotex"]["patient"] for sdata in everyone] == ["P1", "P2", "P3"]
    assert np.array_equal(pixels(everyone[2]), pixels(last))
    assert (everyone[2]["table"].X != last["table"].X).nnz == 0
    assert everyone[0]["table"].var.equals(last["table"].var)


def test_global_random_state_is_left_alone() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    hx.datasets.synthetic(**SMALL, seed=4)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_sections_of_a_patient_share_the_stain() -> None:
    sections = hx.datasets.synthetic(2, 2, **SMALL, seed=1)
    assert [sdata.attrs["hespotex"]["name"] for sdata in sections] == ["P1S1", "P1S2", "P2S1", "P2S2"]
    glass = np.array([np.percentile(pixels(sdata), 99, axis=(1, 2)) for sdata in sections])
    assert np.abs(glass[0] - glass[1]).max() < np.abs(glass[0] - glass[2]).max()


def test_square_lattice_and_rectangular_image() -> None:
    sdata = hx.datasets.synthetic(size_px=(500, 900), mpp=2.0, lattice="st", n_genes=20, seed=0)
    table = sdata["table"]
    assert pixels(sdata).shape == (3, 500, 900)
    assert sdata["spots"]["radius"].iloc[0] == 25
    step = table.obsm["spatial"] - 100 * table.obs[["array_col", "array_row"]].to_numpy()
    assert np.ptp(step, axis=0).max() == pytest.approx(0)


def test_image_only_slide_is_of_the_same_world() -> None:
    slide = hx.datasets.synthetic(**SMALL, seed=4, with_expression=False)
    section = hx.datasets.synthetic(**SMALL, seed=4)
    assert not slide.tables
    assert not slide.shapes
    assert np.array_equal(pixels(slide), pixels(section))
    with pytest.raises(MissingKeyError, match="with_expression"):
        hx.datasets.cell_truth(slide)


def test_nuclei_are_dark_where_the_truth_says(section) -> None:
    cells = section.points["cells_truth"].compute()
    x, y = cells["x"].astype(int).clip(0, 799), cells["y"].astype(int).clip(0, 799)
    red = pixels(section)[0].astype(float)
    assert np.median(red[y, x]) < np.percentile(red, 25)
    lymphocytes = cells["cell_type"].isin(["t_cell", "b_cell"]).to_numpy()
    assert np.median(red[y, x][lymphocytes]) < np.median(red[y, x][cells["cell_type"] == "tumour"])


def test_truth_of_cells_adds_up_to_the_truth_of_spots(section) -> None:
    cells = hx.datasets.cell_truth(section)
    table = section["table"]
    distance = np.linalg.norm(table.obsm["spatial"][:, None] - cells.obsm["spatial"][None], axis=2) * 0.5
    share = np.where(distance < 20 + 36, np.exp(-0.5 * (np.maximum(distance - 20, 0) / 12) ** 2), 0)
    caught = share @ cells.X
    expected = caught + 0.04 * caught.mean(axis=0)
    assert np.allclose(expected, table.layers["truth"], rtol=1e-3, atol=1e-3)


def test_markers_mark_their_type() -> None:
    sdata = hx.datasets.synthetic(size_px=2000, n_genes=100, seed=0)
    cells, programs = hx.datasets.cell_truth(sdata), sdata["table"].var["program"]
    for kind in ("tumour", "fibroblast", "b_cell"):
        inside = (cells.obs["cell_type"] == kind).to_numpy()
        markers = (programs == kind).to_numpy()
        share = cells.X / cells.X.sum(axis=1, keepdims=True)
        assert share[inside][:, markers].sum(axis=1).mean() > 2 * share[~inside][:, markers].sum(axis=1).mean()


def test_counts_follow_the_truth_with_more_than_poisson_noise() -> None:
    sdata = hx.datasets.synthetic(size_px=2000, n_genes=100, depth=4000, seed=0)
    table = sdata["table"]
    counts, truth = table.X.toarray().astype(float), table.layers["truth"].astype(float)
    assert np.median(truth.sum(axis=1)) == pytest.approx(4000 * 1.04, rel=0.05)
    efficiency = counts.sum(axis=1) / truth.sum(axis=1)
    assert 0.25 < np.log(efficiency).std() < 0.6
    expected = truth * efficiency[:, None]
    assert ((counts - expected) ** 2).sum() > 2 * expected.sum()
    r = [np.corrcoef(np.log1p(a), np.log1p(b))[0, 1] for a, b in zip(counts.T, truth.T, strict=True)]
    assert np.mean(r) > 0.3


def assert_same(a, b) -> None:
    """Equal elements and maps to microns (a scale read from disk names one axis more, so matrices are compared)."""
    for key in ("image", "spots"):
        one, other = (get_transformation(s[key], "microns").to_affine_matrix(("x", "y"), ("x", "y")) for s in (a, b))
        assert np.allclose(one, other)
    assert np.array_equal(pixels_of(a), pixels_of(b))
    assert a["spots"].geometry.equals(b["spots"].geometry)
    assert a["spots"]["radius"].equals(b["spots"]["radius"])
    assert (a["table"].X != b["table"].X).nnz == 0
    assert a["table"].X.dtype == b["table"].X.dtype
    assert a["table"].obs["spot_id"].to_list() == b["table"].obs["spot_id"].to_list()
    assert a["table"].var_names.equals(b["table"].var_names)
    assert a.attrs["hespotex"] == b.attrs["hespotex"]


def pixels_of(sdata) -> np.ndarray:
    image = sdata["image"]
    return np.asarray(image["scale0"]["image"] if hasattr(image, "children") else image)


def test_round_trip(tmp_path: Path, section) -> None:
    section.write(tmp_path / "s.zarr")
    back = spatialdata.read_zarr(tmp_path / "s.zarr")
    assert_same(section, back)
    assert np.allclose(hx.datasets.cell_truth(back).X, hx.datasets.cell_truth(section).X)


@pytest.mark.parametrize(
    "wrong",
    [{"n_patients": 0}, {"size_px": 0}, {"mpp": -1.0}, {"n_genes": 0}, {"depth": 0}, {"lattice": "square"}, {"pitch_um": -5.0}],
)  # fmt: skip
def test_sizes_must_be_positive(wrong: dict) -> None:
    with pytest.raises(DataValueError, match=next(iter(wrong))):
        hx.datasets.synthetic(**{**SMALL, **wrong})


def test_no_room_for_a_spot() -> None:
    with pytest.raises(DataValueError, match="no room"):
        hx.datasets.synthetic(size_px=60, mpp=0.5)
