from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import spatialdata as sd

import hespotex as hx
from hespotex.errors import DataValueError, MissingKeyError


def square(n=5, pitch=200.0):
    x, y = np.meshgrid(np.arange(n), np.arange(n))
    return np.column_stack([x.ravel(), y.ravel()]) * pitch


def hexagonal(n=6, pitch=100.0):
    x, y = np.meshgrid(np.arange(n, dtype=float), np.arange(n))
    x[1::2] += 0.5
    return np.column_stack([x.ravel() * pitch, y.ravel() * pitch * np.sqrt(3) / 2])


def table(coordinates) -> ad.AnnData:
    return ad.AnnData(np.ones((len(coordinates), 2), np.float32), obsm={"spatial": np.asarray(coordinates, float)})


def graph(coordinates, **options):
    return hx.pp.spatial_graph(table(coordinates), copy=True, **options)


@pytest.mark.parametrize(
    ("coordinates", "options", "centre", "neighbours", "distance"),
    [
        (square(), {}, 12, 4, 200),
        (square(), {"n_neighs": 8}, 12, 8, None),
        (hexagonal(), {}, 14, 6, 100),
        (hexagonal(), {"kind": "hex"}, 14, 6, 100),
    ],
)
def test_neighbours_on_a_lattice(coordinates, options, centre, neighbours, distance):
    connectivities, distances = graph(coordinates, **options)
    assert connectivities[centre].sum() == neighbours
    assert connectivities[0].sum() < neighbours
    assert (connectivities != connectivities.T).nnz == 0
    assert connectivities.diagonal().sum() == 0
    assert connectivities.dtype == np.float32
    if distance:
        np.testing.assert_allclose(distances.data, distance)


def test_scattered_and_incomplete_lattices_keep_their_edges():
    rng = np.random.default_rng(0)
    points = square(12)
    exact = graph(points).connectivities
    kept = np.flatnonzero(rng.random(len(points)) < 0.8)
    moved = points + rng.normal(0, 6, points.shape)
    np.testing.assert_array_equal(graph(moved).connectivities.toarray(), exact.toarray())
    np.testing.assert_array_equal(graph(moved[kept]).connectivities.toarray(), exact[kept][:, kept].toarray())


@pytest.mark.parametrize("with_array", [True, False])
@pytest.mark.parametrize("kept", [0.5, 0.1])
def test_neighbours_on_a_lattice_that_is_mostly_missing(kept, with_array):
    places = np.argwhere(np.random.default_rng(0).random((150, 150)) < kept)
    adata = table(places[:, ::-1] * 8.0)
    if with_array:
        adata.obs["array_row"], adata.obs["array_col"] = places.T
    found = hx.pp.spatial_graph(adata, kind=None if with_array else "square", copy=True)
    pairs = np.abs(places[:, None, 0] - places[None, :, 0]) + np.abs(places[:, None, 1] - places[None, :, 1])
    assert found.connectivities.nnz == (pairs == 1).sum()
    assert set(found.distances.data) == {8.0}


def test_bins_far_apart_in_a_region_of_its_own_are_no_neighbours():
    """Three bins show no lattice; the pitch is that of the sections beside them."""
    x, y = np.meshgrid(np.arange(20.0), np.arange(20.0))
    section = np.column_stack([x.ravel(), y.ravel()]) * 100
    few = np.array([[0.0, 0], [3000, 0], [0, 3000], [3000, 3000], [3100, 3000]])
    adata = table(np.concatenate([section, few]))
    adata.obs["section"] = ["a"] * len(section) + ["b"] * len(few)
    found = hx.pp.spatial_graph(adata, library_key="section", copy=True)
    assert found.distances.data.max() == 100
    assert found.connectivities[len(section) :].nnz == 2


def test_clouds_get_nearest_neighbours_made_symmetric():
    points = np.random.default_rng(0).random((50, 2))
    connectivities, distances = graph(points)
    assert connectivities.sum(1).min() >= 6
    assert (connectivities != connectivities.T).nnz == 0
    i, j = connectivities.nonzero()
    np.testing.assert_allclose(np.asarray(distances[i, j]).ravel(), np.linalg.norm(points[i] - points[j], axis=1))


def test_order_of_rows_does_not_matter():
    points, order = square(), np.random.default_rng(0).permutation(25)
    plain, shuffled = graph(points).connectivities, graph(points[order]).connectivities
    np.testing.assert_array_equal(shuffled.toarray(), plain.toarray()[order][:, order])


def test_no_edge_joins_two_regions():
    adata = table(np.vstack([square(), square()]))
    adata.obs["section"] = ["a", "b"] * 25
    connectivities = hx.pp.spatial_graph(adata, kind="knn", n_neighs=3, library_key="section", copy=True).connectivities
    i, j = connectivities.nonzero()
    assert (adata.obs["section"].to_numpy()[i] == adata.obs["section"].to_numpy()[j]).all()
    with pytest.raises(MissingKeyError, match="'slide'"):
        hx.pp.spatial_graph(adata, library_key="slide")


def test_regions_of_a_spatialdata(plain_section):
    a, b = (plain_section(centres=square(4, 80.0) + 100) for _ in range(2))
    both = sd.concatenate({"a": a, "b": b}, concatenate_tables=True)
    hx.pp.spatial_graph(both)
    adata = both["table"]
    assert adata.obsp["spatial_connectivities"].sum() == 2 * 2 * 24
    assert adata.uns["hespotex"]["spatial_connectivities"]["distance_unit"] == "um"


def test_what_is_written_is_squidpys(plain_section):
    import squidpy as sq

    sdata = plain_section(centres=square(4, 80.0) + 100)
    hx.pp.spatial_graph(sdata)
    adata = sdata["table"]
    np.testing.assert_allclose(adata.obsp["spatial_distances"].data, 40)  # 80 px of 0.5 µm
    record = adata.uns["hespotex"]["spatial_connectivities"]
    assert record["params"] == {"kind": "square", "n_neighs": 4}
    again = hx.pp.spatial_graph(sdata, **record["params"], copy=True)
    np.testing.assert_array_equal(again.connectivities.toarray(), adata.obsp["spatial_connectivities"].toarray())
    sq.gr.spatial_autocorr(adata, mode="moran", show_progress_bar=False, n_jobs=1)
    assert len(adata.uns["moranI"]) == adata.n_vars
    other = sq.gr.spatial_neighbors_knn(adata, n_neighs=2, copy=True)
    assert other is not None


def test_copy_writes_nothing():
    adata = table(square())
    hx.pp.spatial_graph(adata, copy=True)
    assert not adata.obsp
    assert not adata.uns


def test_the_graph_of_others_is_not_replaced():
    adata = table(square())
    adata.obsp["spatial_connectivities"] = np.zeros((25, 25))
    with pytest.raises(DataValueError, match=r"obsp\['spatial_connectivities'\]"):
        hx.pp.spatial_graph(adata)
    assert set(adata.obsp) == {"spatial_connectivities"}
    hx.pp.spatial_graph(adata, key_added="own")
    hx.pp.spatial_graph(adata, key_added="own", n_neighs=8)


def test_too_few_observations():
    with pytest.raises(DataValueError, match="at least 2"):
        graph(square()[:1])
    five = np.random.default_rng(0).random((5, 2))
    with pytest.raises(DataValueError, match="n_neighs=6 neighbours were asked for among 5"):
        graph(five, n_neighs=6)
    assert graph(five).connectivities.nnz == 5 * 4  # unasked, as many as there are
    assert graph(square()[:2], kind="square").connectivities.nnz == 2
    alone = table(np.vstack([square(), [[0, 0]]]))
    alone.obs["section"] = ["a"] * 25 + ["b"]
    assert hx.pp.spatial_graph(alone, library_key="section", copy=True).connectivities[25].nnz == 0


def test_arguments():
    with pytest.raises(DataValueError, match="'tri'"):
        graph(square(), kind="tri")
    with pytest.raises(DataValueError, match=r"possible: \[4, 8\]"):
        graph(square(), kind="square", n_neighs=5)
    with pytest.raises(DataValueError, match="at least 1"):
        graph(square(), kind="knn", n_neighs=0)
    with pytest.raises(MissingKeyError, match="'spatial'"):
        hx.pp.spatial_graph(ad.AnnData(np.ones((3, 1), np.float32)))
    with pytest.raises(DataValueError, match="no coordinates"):
        graph(np.full((4, 2), np.nan))
    with pytest.raises(DataValueError, match="coincide"):
        graph(np.zeros((8, 2)), kind="square")
