from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from PIL import Image
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.errors import (
    CountsError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    ImageFormatError,
    MissingKeyError,
    ScaleError,
)

POSITIONS = [(1, 1), (2, 1), (1, 2), (3, 3)]
GENES = ["A", "B", "C"]


def write(folder: Path, *, counts=None, genes=GENES, rows=None, spots=None, pixels=None) -> dict[str, Path]:
    """A section of four spots, 40 px (200 µm) apart: 5 µm/px, spots of 20 px."""
    counts = np.arange(12).reshape(4, 3) if counts is None else counts
    rows = [f"{x}x{y}" for x, y in POSITIONS] if rows is None else rows
    lines = ["\t".join(["", *genes])] + ["\t".join([row, *map(str, v)]) for row, v in zip(rows, counts, strict=True)]
    paths = {"counts": folder / "s.tsv.gz", "spots": folder / "s.tsv", "image": folder / "s.png"}
    paths["counts"].write_bytes(gzip.compress("\n".join(lines).encode()))
    if spots is None:
        spots = pd.DataFrame(POSITIONS, columns=["x", "y"])
        spots["pixel_x"], spots["pixel_y"] = spots["x"] * 40.0, spots["y"] * 40.0
    spots.to_csv(paths["spots"], sep="\t", index=False)
    if pixels is None:
        pixels = np.zeros((200, 160, 3), np.uint8)
    Image.fromarray(pixels).save(paths["image"])
    return paths


def frame(**columns) -> pd.DataFrame:
    spots = pd.DataFrame(POSITIONS, columns=["x", "y"])
    spots["pixel_x"], spots["pixel_y"] = spots["x"] * 40.0, spots["y"] * 40.0
    return spots.assign(**columns)


def test_contract(tmp_path: Path) -> None:
    sdata = hx.io.read_st(**write(tmp_path), name="one", patient="p")
    table = sdata["table"]
    assert table.X.dtype == np.int32
    assert table.X.format == "csr"
    assert table.X.toarray().tolist() == np.arange(12).reshape(4, 3).tolist()
    assert table.var_names.to_list() == GENES
    assert table.obs["array_row"].to_list() == [1, 1, 2, 3]
    assert table.obs["array_col"].to_list() == [1, 2, 1, 3]
    assert table.obsm["spatial"].tolist() == [[40, 40], [80, 40], [40, 80], [120, 120]]
    assert spatialdata.models.get_table_keys(table) == ("spots", "region", "spot_id")
    assert table.obs["region"].cat.categories.to_list() == ["spots"]
    shapes = sdata["spots"]
    assert shapes.index.to_list() == table.obs["spot_id"].to_list() == ["1x1", "2x1", "1x2", "3x3"]
    assert shapes.geometry.x.to_list() == [40, 80, 40, 120]
    assert shapes["radius"].tolist() == pytest.approx([10] * 4)
    for key in ("image", "spots"):
        assert get_transformation(sdata[key], "microns").scale.tolist() == pytest.approx([5, 5])
        assert set(get_transformation(sdata[key], get_all=True)) == {"global", "microns"}
    assert sdata.attrs["hespotex"] == {
        "name": "one", "patient": "p", "unmatched": {"counts_only": [], "spots_only": []}
    }  # fmt: skip


def test_bright_pixel_lies_under_its_spot(tmp_path: Path) -> None:
    pixels = np.zeros((200, 160, 3), np.uint8)
    pixels[120, 120] = 255
    sdata = hx.io.read_st(**write(tmp_path, pixels=pixels))
    x, y = sdata["table"].obsm["spatial"][3].astype(int)
    assert sdata["image"].values[:, y, x].tolist() == [255, 255, 255]
    assert sdata["image"].values.sum() == 3 * 255


def test_rows_of_one_file_only_are_reported(tmp_path: Path) -> None:
    spots = pd.concat([frame(), pd.DataFrame({"x": [9], "y": [9], "pixel_x": [1.0], "pixel_y": [1.0]})])
    paths = write(tmp_path, rows=["1x1", "2x1", "1x2", "5x6"], spots=spots)
    with pytest.warns(HespotexWarning, match=r"1 only in 's.tsv.gz' \(5x6\); 2 only in 's.tsv' \(3x3, 9x9\)"):
        sdata = hx.io.read_st(**paths)
    assert sdata["table"].obs_names.to_list() == ["1x1", "2x1", "1x2"]
    assert sdata.attrs["hespotex"]["unmatched"] == {"counts_only": ["5x6"], "spots_only": ["3x3", "9x9"]}


def test_spots_off_tissue_are_left_out(tmp_path: Path) -> None:
    paths = write(tmp_path, spots=frame(selected=[1, 1, 1, 0]))
    assert hx.io.read_st(**paths)["table"].n_obs == 3
    everything = hx.io.read_st(**paths, on_tissue_only=False)
    assert everything["table"].obs["in_tissue"].to_list() == [1, 1, 1, 0]


def test_measured_positions_give_the_scale(tmp_path: Path) -> None:
    spots = frame()
    spots["new_x"], spots["new_y"] = spots["x"] + 0.05, spots["y"] - 0.1
    spots["pixel_x"], spots["pixel_y"] = spots["new_x"] * 50, spots["new_y"] * 51
    sdata = hx.io.read_st(**write(tmp_path, spots=spots))
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(200 / np.sqrt(50 * 51))


def test_resized_image(tmp_path: Path) -> None:
    spots = frame()
    spots[["pixel_x", "pixel_y"]] *= 10
    paths = write(tmp_path, spots=spots)
    with pytest.raises(GeometryError, match="frame_size"):
        hx.io.read_st(**paths)
    sdata = hx.io.read_st(**paths, frame_size=(1600, 2000))
    assert sdata["table"].obsm["spatial"].tolist() == [[40, 40], [80, 40], [40, 80], [120, 120]]
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(5)
    with pytest.raises(ScaleError, match="in x"):
        hx.io.read_st(**paths, frame_size=(1600, 2500))
    with pytest.raises(ScaleError, match="frame_size"):
        hx.io.read_st(**paths, frame_size=(0, 2500))


def test_one_spot_needs_mpp(tmp_path: Path) -> None:
    paths = write(tmp_path, spots=frame().iloc[:1], rows=["1x1"], counts=[[1, 2, 3]])
    with pytest.raises(ScaleError, match="mpp"):
        hx.io.read_st(**paths)
    assert hx.io.read_st(**paths, mpp=5.0)["spots"]["radius"].tolist() == [10]


@pytest.mark.parametrize("value", [-1, 0.5, "NaN", ""])
def test_what_is_no_count_is_refused(tmp_path: Path, value: object) -> None:
    counts = np.arange(12).reshape(4, 3).astype(object)
    counts[1, 1] = value
    with pytest.raises(CountsError, match="raw counts"):
        hx.io.read_st(**write(tmp_path, counts=counts))


def test_text_among_counts_is_refused(tmp_path: Path) -> None:
    counts = np.arange(12).reshape(4, 3).astype(object)
    counts[1, 1] = "many"
    with pytest.raises(CountsError, match="text"):
        hx.io.read_st(**write(tmp_path, counts=counts))


def test_duplicate_genes(tmp_path: Path) -> None:
    paths = write(tmp_path, genes=["A", "B", "A"])
    with pytest.raises(DataValueError, match="more than once: A"):
        hx.io.read_st(**paths)
    first = hx.io.read_st(**paths, duplicates="first")["table"]
    summed = hx.io.read_st(**paths, duplicates="sum")["table"]
    assert first.var_names.to_list() == summed.var_names.to_list() == ["A", "B"]
    assert first.X.toarray().tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert summed.X.toarray().tolist() == [[2, 1], [8, 4], [14, 7], [20, 10]]
    with pytest.raises(DataValueError, match="duplicates"):
        hx.io.read_st(**paths, duplicates="last")  # type: ignore[arg-type]


def test_duplicate_spots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataValueError, match="1x1"):
        hx.io.read_st(**write(tmp_path, rows=["1x1", "1x1", "1x2", "3x3"]))
    with pytest.raises(DataValueError, match="1x1"):
        hx.io.read_st(**write(tmp_path, spots=frame(x=[1, 1, 1, 3], y=[1, 1, 2, 3])))


def test_tables_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataValueError, match="share no spot"):
        hx.io.read_st(**write(tmp_path, rows=["11x1", "12x1", "11x2", "13x3"]))
    with pytest.raises(DataValueError, match="<x>x<y>"):
        hx.io.read_st(**write(tmp_path, rows=["AAC-1", "AAG-1", "AAT-1", "ACC-1"]))
    with pytest.raises(MissingKeyError, match="pixel_y"):
        hx.io.read_st(**write(tmp_path, spots=frame().drop(columns="pixel_y")))


def test_a_mirrored_array_has_a_scale(tmp_path: Path) -> None:
    sdata = hx.io.read_st(**write(tmp_path, spots=frame(pixel_y=[120.0, 120.0, 80.0, 40.0])))
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(5)


def test_resolution_tags_are_not_asked_where_the_spots_give_the_scale(tmp_path: Path) -> None:
    paths = write(tmp_path)
    paths["image"] = tmp_path / "s.tif"
    tifffile.imwrite(
        paths["image"],
        np.zeros((200, 160, 3), np.uint8),
        photometric="rgb",
        resolution=(2000, 4000),
        resolutionunit="CENTIMETER",
    )
    assert get_transformation(hx.io.read_st(**paths)["image"], "microns").scale[0] == pytest.approx(5)


def damage(paths: dict[str, Path], what: str) -> None:
    """Spoil one of the files of a section."""
    content = paths["counts"].read_bytes()
    lines = gzip.decompress(content).split(b"\n")
    text = paths["spots"].read_text()
    if what == "counts empty":
        paths["counts"].write_bytes(gzip.compress(b""))
    elif what == "counts of a header":
        paths["counts"].write_bytes(gzip.compress(lines[0]))
    elif what == "counts not gzipped":
        paths["counts"].write_bytes(b"\n".join(lines))
    elif what == "counts truncated":
        paths["counts"].write_bytes(content[:-12])
    elif what == "counts ragged":
        paths["counts"].write_bytes(gzip.compress(b"\n".join([*lines, b"4x4\t1\t2\t3\t4\t5"])))
    elif what == "spots empty":
        paths["spots"].write_bytes(b"")
    elif what == "spots not text":
        paths["spots"].write_bytes(b"\xff\xfe\x00\x81")
    else:
        column, value = what.split("=")
        spots = pd.read_csv(paths["spots"], sep="\t").astype(object)
        spots.loc[1, column] = value
        spots.to_csv(paths["spots"], sep="\t", index=False)
        assert paths["spots"].read_text() != text


@pytest.mark.parametrize(
    "what",
    [
        "counts empty", "counts of a header", "counts not gzipped", "counts truncated", "counts ragged",
        "spots empty", "spots not text", "pixel_x=left", "pixel_y=", "x=one", "y=", "selected=", "selected=yes",
        "new_x=", "new_y=up",
    ],
)  # fmt: skip
def test_damaged_tables_are_named(tmp_path: Path, what: str) -> None:
    columns = {"selected": 1, "new_x": [1.0, 2, 1, 3], "new_y": [1.0, 1, 2, 3]}
    paths = write(tmp_path, spots=frame(**columns))
    hx.io.read_st(**paths)
    damage(paths, what)
    named = r"counts: 's\.tsv\.gz'" if what.startswith("counts") else r"spots: 's\.tsv'"
    with pytest.raises(DataValueError, match=named) as caught:
        hx.io.read_st(**paths)
    if "=" in what:
        assert repr(what.split("=")[0]) in str(caught.value)


@pytest.mark.parametrize("pitch_um", [(1, 2, 3), (), "far", (200, "far"), (200, -1)])
def test_pitch_is_one_number_or_two(tmp_path: Path, pitch_um: object) -> None:
    with pytest.raises(ScaleError, match="pitch_um"):
        hx.io.read_st(**write(tmp_path), pitch_um=pitch_um)  # type: ignore[arg-type]


@pytest.mark.parametrize("frame_size", [(160,), (160, 200, 3), (160, "high"), 160])
def test_frame_size_is_two_numbers(tmp_path: Path, frame_size: object) -> None:
    with pytest.raises(ScaleError, match="frame_size"):
        hx.io.read_st(**write(tmp_path), frame_size=frame_size)  # type: ignore[arg-type]


def test_outside_and_grey(tmp_path: Path) -> None:
    for side in (100, 120):  # a position equal to the width is not on the image: embedding refuses it, too
        with pytest.raises(GeometryError, match="3x3"):
            hx.io.read_st(**write(tmp_path, pixels=np.zeros((side, side, 3), np.uint8)))
    assert hx.io.read_st(**write(tmp_path, pixels=np.zeros((121, 121, 3), np.uint8)))
    with pytest.raises(ImageFormatError):
        hx.io.read_st(**write(tmp_path, pixels=np.zeros((200, 160), np.uint8)))


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


def test_round_trip(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1100, 3), dtype=np.uint8)
    sdata = hx.io.read_st(**write(tmp_path, pixels=pixels))
    sdata.write(tmp_path / "s.zarr")
    back = spatialdata.read_zarr(tmp_path / "s.zarr")
    assert_same(sdata, back)


def test_section_without_full_resolution_image(data_dir: Path) -> None:
    stem = f"{data_dir}/her2st_a1_lowres/A1_"
    with pytest.warns(HespotexWarning, match="17x14, 18x20"):
        sdata = hx.io.read_st(
            f"{stem}counts.tsv.gz", f"{stem}selection.tsv", f"{stem}image.png", patient="A", frame_size=(6954, 7435)
        )
    assert sdata["table"].shape == (346, 15045)
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(3.19, abs=0.02)


def test_other_legacy_layouts(data_dir: Path) -> None:
    stem = f"{data_dir}/mob_st_stahl2016/rep11"
    bulb = hx.io.read_st(f"{stem}_counts.tsv.gz", f"{stem}_spots.tsv", f"{stem}.jpg")
    assert bulb["table"].shape == (262, 16218)
    assert bulb["table"].obs_names[0] == "16.92x9.015"
    assert get_transformation(bulb["image"], "microns").scale[0] == pytest.approx(2.75, abs=0.01)
    folder = data_dir / "mob_st2k_stutility"
    with pytest.warns(HespotexWarning, match="11 only in"):
        staggered = hx.io.read_st(
            folder / "MOB1.tsv.gz",
            folder / "alignment_table_MOB1.tsv",
            folder / "MOB1.jpg",
            pitch_um=(6400 / 65, 6800 / 62),
        )
    assert staggered["table"].shape == (379, 1000)
    assert get_transformation(staggered["image"], "microns").scale[0] == pytest.approx(4.55, abs=0.02)
