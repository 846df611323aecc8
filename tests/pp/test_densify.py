"""Positions between measured spots, stored as shapes."""

from __future__ import annotations

import numpy as np
import pytest
from geopandas import GeoDataFrame
from shapely import box
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, get_transformation

import hespotex as hx
from hespotex.data.geometry import resolve_slide, shape_centres, shape_geometries, shape_radius
from hespotex.data.lattice import detect_lattice
from hespotex.errors import DataValueError, GeometryError, MissingKeyError

from ..conftest import stored

TURNED = Affine(np.array([[0, -1, 900], [1, 0, 0], [0, 0, 1]]), ("x", "y"), ("x", "y"))


def lattice(kind: str, pitch: float = 60.0, shape=(600, 500)) -> np.ndarray:
    step = pitch * (np.sqrt(3) / 2 if kind == "hex" else 1.0)
    x, y = np.meshgrid(np.arange(60, shape[1] - 60, pitch), np.arange(60, shape[0] - 60, step))
    if kind == "hex":
        x[1::2] += pitch / 2
    return np.column_stack([x.ravel(), y.ravel()])


@pytest.fixture
def make_spots(plain_section):
    """A section of 0.5 µm/px whose spots lie on a lattice of 30 µm."""

    def make(kind: str = "hex", **options):
        return plain_section(centres=lattice(kind), radius=15.0, **options)

    return make


@pytest.mark.parametrize(
    ("kind", "layout", "wanted", "pitch"),
    [("hex", None, "hex", 15), ("hex", "triangles", "hex", 30 / np.sqrt(3)), ("square", None, "square", 15)],
)
@pytest.mark.parametrize("to_global", [None, TURNED])
def test_positions_lie_on_the_denser_lattice(make_spots, kind, layout, wanted, pitch, to_global):
    sdata = make_spots(kind, to_global=to_global)
    hx.pp.densify(sdata, layout)
    slide, dense = resolve_slide(sdata), sdata["dense_spots"]
    centres = shape_centres(sdata, "dense_spots", slide)
    found = detect_lattice(slide.microns(centres))
    assert found.kind == wanted
    assert found.pitch == pytest.approx(pitch)
    n = len(sdata["spots"])
    np.testing.assert_allclose(centres[:n], shape_centres(sdata, "spots", slide))
    assert dense["measured"].tolist() == [True] * n + [False] * (len(dense) - n)
    assert dense["position_id"].tolist() == dense.index.tolist() == list(range(len(dense)))
    assert dense["parent"][:n].tolist() == sdata["spots"].index.tolist()
    np.testing.assert_allclose(dense["distance_um"][:n], 0)
    assert dense["distance_um"][n:].min() >= 14.9
    assert dense["distance_um"].max() < 30 * 0.71
    parents = sdata["spots"].loc[dense["parent"]].geometry.centroid
    reach = np.hypot(
        parents.x.to_numpy() - dense.geometry.x.to_numpy(), parents.y.to_numpy() - dense.geometry.y.to_numpy()
    )
    np.testing.assert_allclose(reach * 0.5, dense["distance_um"])
    assert shape_radius(sdata, "dense_spots", slide) == pytest.approx(7.5)
    assert set(get_transformation(dense, get_all=True)) == set(get_transformation(sdata["image"], get_all=True))


def test_without_tissue_nothing_lies_beyond_the_outermost_spots(make_spots):
    for kind in ("square", "hex"):
        sdata = make_spots(kind)
        hull = sdata["spots"].geometry.union_all().convex_hull.buffer(1e-6)
        assert hx.pp.densify(sdata, copy=True).geometry.within(hull).all()


@pytest.mark.parametrize("layout", ["midpoints", "random"])
def test_new_positions_lie_in_tissue(make_spots, layout):
    sdata = make_spots()
    sdata["tissue"] = ShapesModel.parse(
        GeoDataFrame(geometry=[box(0, 0, 250, 700)]),
        transformations=get_transformation(sdata["image"], get_all=True),
    )
    dense = hx.pp.densify(sdata, layout, copy=True)
    outline = shape_geometries(sdata, "tissue", resolve_slide(sdata)).iloc[0]
    new = dense[~dense["measured"]]
    assert new.within(outline).all()
    assert dense["measured"].sum() == len(sdata["spots"])
    assert len(new) > 50


def test_random_positions(make_spots):
    sdata = make_spots()
    first = hx.pp.densify(sdata, "random", expand=3, max_distance_um=12, seed=1, copy=True)
    assert first.geometry.equals(
        hx.pp.densify(sdata, "random", expand=3, max_distance_um=12, seed=1, copy=True).geometry
    )
    assert not first.geometry.equals(
        hx.pp.densify(sdata, "random", expand=3, max_distance_um=12, seed=2, copy=True).geometry
    )
    assert first["distance_um"].max() <= 12


def test_only_rows_of_the_table_are_measured(make_spots):
    sdata = make_spots()
    sdata["table"] = sdata["table"][sdata["table"].obs["spot_id"] != "s0"].copy()
    dense = hx.pp.densify(sdata, copy=True)
    assert "s0" not in set(dense["parent"])
    assert dense["measured"].sum() == len(sdata["spots"]) - 1


def test_made_anew_and_not_over_others(make_spots):
    sdata = make_spots()
    hx.pp.densify(sdata)
    hx.pp.densify(sdata, "triangles")
    for name in ("spots", "image"):
        before = stored(sdata)
        with pytest.raises(DataValueError, match=rf"key_added='{name}' would replace .* densify did not make"):
            hx.pp.densify(sdata, key_added=name)
        assert stored(sdata) == before


def test_what_cannot_be_done_is_said(make_spots, plain_section):
    sdata = make_spots()
    with pytest.raises(DataValueError, match="layout='hex' is unknown; possible: 'midpoints'"):
        hx.pp.densify(sdata, "hex")
    with pytest.raises(GeometryError, match="for a square lattice.*use 'midpoints' or 'triangles'"):
        hx.pp.densify(sdata, "square")
    with pytest.raises(GeometryError, match="no hexagonal or square lattice; use layout='random'"):
        hx.pp.densify(plain_section())
    with pytest.raises(MissingKeyError, match="tissue_key='nope'"):
        hx.pp.densify(sdata, tissue_key="nope")
    with pytest.raises(MissingKeyError, match="no table"):
        hx.pp.densify(make_spots(table=False))
    with pytest.raises(DataValueError, match="max_distance_um"):
        hx.pp.densify(sdata, "random", max_distance_um=-1)
    with pytest.raises(DataValueError, match="expand"):
        hx.pp.densify(sdata, "random", expand=1)
    with pytest.raises(GeometryError, match="raise max_distance_um or expand"):
        hx.pp.densify(sdata, "random", max_distance_um=1e-6)
