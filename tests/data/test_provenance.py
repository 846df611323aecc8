from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from hespotex.data.provenance import digest, from_uns, read_record, record, to_uns
from hespotex.errors import DataTypeError

VALUES = {
    "none": None,
    "flag": np.bool_(True),
    "count": np.int64(3),
    "mpp": np.float32(0.5),
    "name": "timm:resnet50",
    "tuple": (1, 2.5),
    "empty": (),
    "names": ["a", "b"],
    "array": np.arange(3),
    "a/b": {"deep": {"x": (True, False)}},
    "steps": [{"name": "x", "n": 1}],
}
EXPECTED = {
    "none": None,
    "flag": True,
    "count": 3,
    "mpp": 0.5,
    "name": "timm:resnet50",
    "tuple": [1, 2.5],
    "empty": [],
    "names": ["a", "b"],
    "array": [0, 1, 2],
    "a_b": {"deep": {"x": [True, False]}},
    "steps": '[{"name": "x", "n": 1}]',
    "created_by": "a test",
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["memory", "h5ad", "zarr"])
def test_records_survive_storage(tmp_path, form):
    adata = ad.AnnData(np.zeros((2, 1), np.float32))
    record(adata, "X_test", created_by="a test", **VALUES)
    if form == "h5ad":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad")
    elif form == "zarr":
        adata.write_zarr(tmp_path / "a.zarr")
        adata = ad.io.read_zarr(tmp_path / "a.zarr")
    stored = read_record(adata, "X_test")
    assert stored.pop("hespotex_version")
    assert stored == EXPECTED
    assert read_record(adata, "other") == {}


def test_what_means_nothing_elsewhere_is_refused():
    with pytest.raises(DataTypeError, match="path"):
        to_uns({"weights": Path("x")})
    with pytest.raises(DataTypeError, match="object"):
        to_uns(object())
    assert from_uns(to_uns({"x": {3, 1}})) == {"x": [1, 3]}


def test_digest_depends_on_content_alone():
    a = np.arange(6.0).reshape(2, 3)
    assert digest({"x": 1, "y": 2}, a) == digest({"y": 2, "x": 1}, a[:, :].copy(order="F"))
    assert digest(a) != digest(a.T)
    assert digest(a) != digest(a.astype(np.float32))
    assert digest("ab", "c") != digest("a", "bc")
