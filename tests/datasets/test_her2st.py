from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spatialdata.transformations import get_transformation

import hespotex as hx
from hespotex.datasets import _her2st
from hespotex.errors import DataValueError, HespotexWarning


def test_c2(her2st_dir: Path) -> None:
    sdata = hx.datasets.her2st("C2", path=her2st_dir)
    assert sdata["table"].shape == (187, 15706)
    assert sdata["image"]["scale0"]["image"].shape == (3, 9911, 9274)
    assert get_transformation(sdata["image"], "microns").scale[0] == pytest.approx(0.688, abs=0.002)
    assert sdata["spots"]["radius"].iloc[0] == pytest.approx(50 / 0.688, rel=0.005)
    assert np.median(np.asarray(sdata["table"].X.sum(axis=1))) == 8508
    assert sdata.attrs["hespotex"]["name"] == "C2"
    assert sdata.attrs["hespotex"]["patient"] == "C"
    # tissue lies under the spots, glass in the corner
    image = sdata["image"]["scale4"]["image"].values
    assert image.shape[1:] == (620, 580)
    x, y = (sdata["table"].obsm["spatial"] / 16).astype(int).T
    assert image[1, y, x].mean() < 200 < image[1, :20, :20].mean()


def test_c3_reports_rows_without_counts(her2st_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESPOTEX_DATA", str(her2st_dir.parent))
    with pytest.warns(HespotexWarning, match="2 only in 'C3_selection.tsv' .13x9, 17x14."):
        sdata = hx.datasets.her2st("C3")
    assert sdata["table"].shape == (180, 15821)
    assert sdata.attrs["hespotex"]["unmatched"]["spots_only"] == ["13x9", "17x14"]


def test_checksums_are_those_of_the_local_files(her2st_dir: Path) -> None:
    from hespotex.image.files._cache import sha256

    for section, files in _her2st._FILES.items():
        local = _her2st._local(section, her2st_dir)
        assert [sha256(path) for path in local] == [digest for _, digest in files]


def test_offline_says_how_to_place_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HESPOTEX_DATA", raising=False)
    with pytest.raises(DataValueError, match=r"could not be downloaded.*counts/C2\.tsv\.gz"):
        hx.datasets.her2st("C2")
    with pytest.raises(DataValueError, match="possible: C2, C3, C4, C5"):
        hx.datasets.her2st("A1")


def test_download_takes_sources_and_checksums(monkeypatch: pytest.MonkeyPatch, her2st_dir: Path) -> None:
    import pooch

    asked = []

    def retrieve(url: str, known_hash: str, *, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        return str(her2st_dir / {"gz": "counts", "sv": "spots", "pg": "images"}[fname[-2:]] / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("HESPOTEX_DATA", raising=False)
    assert hx.datasets.her2st("C2")["table"].n_obs == 187
    assert asked[2][0].endswith("/ST-imgs/C/C2/5714_HE_BT_C2.jpg")
    assert all(digest.startswith("sha256:") for _, digest in asked)


def test_incomplete_folder_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "counts").mkdir()
    (tmp_path / "counts" / "B1.tsv.gz").touch()
    with pytest.raises(DataValueError, match=r"missing: spots/B1_selection\.tsv, images/B1\.jpg"):
        hx.datasets.her2st("B1", path=tmp_path)
