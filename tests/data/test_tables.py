from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from hespotex.data.geometry import resolve_slide
from hespotex.data.tables import mark_table, resolve_shapes_key, resolve_table, row_positions, table_centres
from hespotex.errors import AmbiguousKeyError, DataTypeError, DataValueError, GeometryError, MissingKeyError


def test_rows_are_joined_by_id_and_not_by_order(plain_section):
    centres = np.random.default_rng(1).uniform(100, 400, (9, 2))
    sdata = plain_section(centres=centres)
    table = resolve_table(sdata)
    own = table_centres(sdata, table, resolve_slide(sdata))
    order = [int(name[1:]) for name in sdata["table"].obs["spot_id"]]
    assert order != sorted(order)
    np.testing.assert_allclose(own, centres[order])
    np.testing.assert_allclose(table_centres(sdata, table, resolve_slide(sdata), microns=True), centres[order] / 2)


def test_ids_of_another_type_are_explained(plain_section):
    sdata = plain_section(ids=range(12))
    sdata["table"].obs["spot_id"] = sdata["table"].obs["spot_id"].astype(str)
    with pytest.raises(GeometryError, match="12 of 12 rows.*astype"):
        row_positions(sdata, resolve_table(sdata), "spots")


def test_missing_and_repeated_ids(plain_section):
    sdata = plain_section()
    sdata["table"].obs["spot_id"] = ["nowhere", *sdata["table"].obs["spot_id"][1:]]
    with pytest.raises(GeometryError, match="1 of 12 rows.*'nowhere'"):
        row_positions(sdata, resolve_table(sdata), "spots")
    sdata["table"].obs["spot_id"] = ["s1"] * 2 + list(sdata["table"].obs["spot_id"][2:])
    with pytest.raises(GeometryError, match="occurs twice"):
        row_positions(sdata, resolve_table(sdata), "spots")


def test_which_table_is_meant(plain_section):
    sdata = plain_section()
    sdata["more"] = sdata["table"].copy()
    with pytest.raises(AmbiguousKeyError, match="'table', 'more'"):
        resolve_table(sdata)
    assert resolve_table(sdata, table_key="more").key == "more"
    mark_table(sdata["more"], "prediction")
    assert resolve_table(sdata).key == "table"
    with pytest.raises(MissingKeyError, match="'nope'"):
        resolve_table(sdata, table_key="nope")
    with pytest.raises(MissingKeyError, match="annotates 'tiles'"):
        resolve_table(sdata, shapes_key="tiles")
    assert resolve_shapes_key(sdata) == "spots"


def test_without_a_table_tiles_are_meant(plain_section):
    sdata = plain_section(table=False)
    with pytest.raises(MissingKeyError, match="make_tiles"):
        resolve_shapes_key(sdata)
    sdata["tiles"] = sdata["spots"]
    assert resolve_shapes_key(sdata) == "tiles"
    with pytest.raises(MissingKeyError, match="no table"):
        resolve_table(sdata)


def test_anndata_and_wrong_types(plain_section):
    adata = plain_section()["table"]
    table = resolve_table(adata)
    assert table.key is None
    assert list(table.instances) == list(adata.obs_names)
    with pytest.raises(DataValueError, match="AnnData"):
        resolve_table(adata, table_key="table")
    with pytest.raises(DataTypeError, match="dict"):
        resolve_table({})
    with pytest.raises(DataValueError, match="no observations"):
        resolve_table(ad.AnnData(np.zeros((0, 3), np.float32)))
