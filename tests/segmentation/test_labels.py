from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hespotex.errors import DataTypeError, DataValueError, MissingKeyError
from hespotex.segmentation import load_labels


def test_a_label_image_is_mapped_and_not_read(tmp_path) -> None:
    labels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "nuclei.npy", labels)
    loaded = load_labels(tmp_path / "nuclei.npy")
    assert isinstance(loaded, np.memmap)
    assert np.array_equal(loaded, labels)


def test_files_that_are_no_label_images_are_refused(tmp_path) -> None:
    with pytest.raises(MissingKeyError, match="absent.npy"):
        load_labels(tmp_path / "absent.npy")
    np.save(tmp_path / "seg.npy", np.array({"masks": np.zeros((2, 2))}, dtype=object), allow_pickle=True)
    with pytest.raises(DataValueError, match=r"refused.*allow_pickle=True\)\.item\(\)\['masks'\]"):
        load_labels(tmp_path / "seg.npy")
    np.save(tmp_path / "float.npy", np.zeros((2, 2)))
    with pytest.raises(DataTypeError, match="float64"):
        load_labels(tmp_path / "float.npy")
    np.save(tmp_path / "mask.npy", np.zeros((2, 2), bool))
    with pytest.raises(DataTypeError, match="number the nuclei"):
        load_labels(tmp_path / "mask.npy")
    np.save(tmp_path / "volume.npy", np.zeros((2, 2, 2), int))
    with pytest.raises(DataValueError, match="two axes"):
        load_labels(tmp_path / "volume.npy")
    np.save(tmp_path / "negative.npy", np.array([[-1, 0], [1, 1]]))
    with pytest.raises(DataValueError, match=r"negative label -1.*labels\[labels < 0\] = 0"):
        load_labels(tmp_path / "negative.npy")
    np.save(tmp_path / "huge.npy", np.array([[0, 2**63]], dtype=np.uint64))
    with pytest.raises(DataValueError, match="too large"):
        load_labels(tmp_path / "huge.npy")
    (tmp_path / "labels.tif").write_bytes(b"II")
    with pytest.raises(DataValueError, match="not a .npy"):
        load_labels(tmp_path / "labels.tif")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataValueError, match="no plain array"):
        load_labels(tmp_path / "cut.npy")


class Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


def test_a_pickled_file_is_not_opened(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("cells_seg.npy", np.array(Trap(), dtype=object), allow_pickle=True)
    np.load("cells_seg.npy", allow_pickle=True)
    assert Path("sprung").exists()  # it is a trap
    Path("sprung").unlink()
    with pytest.raises(DataValueError, match="refused"):
        load_labels("cells_seg.npy")
    assert not Path("sprung").exists()
