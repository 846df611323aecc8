from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from spatialdata.models import TableModel

import hespotex as hx
from hespotex.errors import AmbiguousKeyError, DataValueError, MissingKeyError


def lazyslide_table(shapes_key: str, ids: np.ndarray, values: np.ndarray) -> ad.AnnData:
    """As ``wsidata.io.add_features`` makes it."""
    adata = ad.AnnData(values.astype(np.float32))
    adata.obs_names = [str(name) for name in ids]
    adata.obs["tile_id"] = ids
    adata.obs["library_id"] = shapes_key
    adata.obs["library_id"] = adata.obs["library_id"].astype("category")
    return TableModel.parse(adata, region=shapes_key, region_key="library_id", instance_key="tile_id")


def values_of(sdata, shapes_key: str, width: int = 6) -> np.ndarray:
    return np.random.default_rng(len(sdata[shapes_key])).normal(size=(len(sdata[shapes_key]), width))


@pytest.fixture
def slide():
    """A slide with tiles and the features of two networks on them, no measurement."""
    sdata = hx.datasets.synthetic(size_px=800)
    del sdata.tables["table"]
    hx.pp.detect_tissue(sdata)
    hx.pp.make_tiles(sdata, pitch_um=60.0)
    for name in ("net", "other"):
        sdata[f"{name}_tiles"] = lazyslide_table("tiles", sdata["tiles"].index.to_numpy(), values_of(sdata, "tiles"))
    return sdata


@pytest.fixture
def measured():
    """Spots with counts, and features of the spots in a table of their own, in another order."""
    sdata = hx.datasets.synthetic(size_px=1600)
    values = values_of(sdata, "spots")
    turned = np.arange(len(values))[::-1]
    sdata["net_spots"] = lazyslide_table("spots", sdata["spots"].index.to_numpy()[turned], values[turned])
    return sdata


def test_features_of_spots_go_to_their_measured_table_in_its_order(measured) -> None:
    hx.pp.use_features(measured, "net_spots")
    ids = measured["table"].obs[measured["table"].uns["spatialdata_attrs"]["instance_key"]]
    expected = values_of(measured, "spots")[measured["spots"].index.get_indexer(ids)]
    np.testing.assert_array_equal(measured["table"].obsm["X_net"], expected.astype(np.float32))
    assert "X_net" not in measured["net_spots"].obsm
    np.testing.assert_array_equal(hx.pp.use_features(measured, "net_spots", copy=True), measured["table"].obsm["X_net"])


def test_from_them_to_genes_without_embedding(measured, slide, monkeypatch, tmp_path) -> None:
    hx.pp.use_features(measured, "net_spots")
    genes = list(measured["table"].var_names[:8])
    hx.tl.train(measured, "ridge", genes=genes).save(tmp_path / "net.hx")
    monkeypatch.setattr(hx.pp, "embed", None)
    with pytest.raises(MissingKeyError, match=r"no obsm\['X_net'\]"):
        hx.tl.predict(slide, tmp_path / "net.hx")
    hx.pp.use_features(slide, "net_tiles")
    hx.tl.predict(slide, tmp_path / "net.hx")
    assert slide["ridge_tiles"].shape == (len(slide["tiles"]), 8)
    assert list(slide["net_tiles"].obsm) == ["X_net"]  # beside the features no prediction
    slide.write(tmp_path / "slide.zarr")
    import spatialdata

    again = spatialdata.read_zarr(tmp_path / "slide.zarr")
    hx.tl.predict(again, tmp_path / "net.hx", key_added="second")
    np.testing.assert_array_equal(again["second_tiles"].X, slide["ridge_tiles"].X)


def test_tables_of_features_are_no_measurement(slide) -> None:
    hx.pp.embed(slide, "rgb")  # neither of the two is meant, so that it makes its own
    assert slide["rgb_tiles"].obsm["X_rgb"].shape == (len(slide["tiles"]), 3)
    hx.pp.embed(slide, "crops", tile_px=4)
    assert {"X_rgb", "X_crops"} <= set(slide["rgb_tiles"].obsm)


def test_a_few_features_or_none(measured) -> None:
    ids = measured["spots"].index.to_numpy()
    values = values_of(measured, "spots")
    measured["few_spots"] = lazyslide_table("spots", ids[:5], values[:5])
    with pytest.raises(
        MissingKeyError, match=rf"'few_spots' lacks {len(ids) - 5} of the {len(ids)} rows of table 'table'"
    ):
        hx.pp.use_features(measured, "few_spots")
    hx.pp.use_features(measured, "few_spots", table_key="few_spots", key_added="X_few")
    np.testing.assert_array_equal(measured["few_spots"].obsm["X_few"], values[:5].astype(np.float32))
    values[3, 2] = np.nan
    measured["broken_spots"] = lazyslide_table("spots", ids, values)
    with pytest.raises(DataValueError, match="NaN or infinite"):
        hx.pp.use_features(measured, "broken_spots")
    with pytest.raises(MissingKeyError, match="table_key='absent' is not among the tables"):
        hx.pp.use_features(measured, "absent")


def test_a_slot_of_somebody_else_is_left_alone(measured) -> None:
    measured["table"].obsm["X_net"] = np.zeros((measured["table"].n_obs, 2))
    with pytest.raises(DataValueError, match="X_net"):
        hx.pp.use_features(measured, "net_spots")
    hx.pp.use_features(measured, "net_spots", key_added="X_theirs")
    hx.pp.use_features(measured, "net_spots", key_added="X_theirs")  # its own is made anew
    hx.pp.embed(measured, "rgb")
    with pytest.raises(AmbiguousKeyError, match="several embeddings"):
        hx.tl.train(measured, "ridge", genes=list(measured["table"].var_names[:3]))
