"""Labels, regions, and statistics between them."""

from __future__ import annotations

import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import DataValueError, MissingKeyError

MARKERS = {"tumour": ["TUMOUR1", "TUMOUR2"], "stroma": ["FIBROBLAST1", "FIBROBLAST2"], "T cell": ["T_CELL1"]}
GENES = [gene for genes in MARKERS.values() for gene in genes]


@pytest.fixture(scope="module")
def base():
    sdata = hx.datasets.synthetic(size_px=1200, n_genes=40, pitch_um=60, seed=5)
    hx.pp.detect_tissue(sdata)
    hx.pp.superpixels(sdata, 16)
    hx.tl.predict(sdata, "tesla", genes=GENES)
    return sdata


@pytest.fixture
def sdata(base):
    import spatialdata

    elements = {name: element for _, name, element in base.gen_spatial_elements()}
    tables = {name: table.copy() for name, table in base.tables.items()}
    return spatialdata.SpatialData.init_from_elements({**elements, **tables}, attrs=dict(base.attrs))


def fine(sdata):
    return sdata["tesla_superpixels"]


def nearest_type(sdata):
    """True type of the cell nearest to each superpixel."""
    from scipy.spatial import cKDTree

    cells = hx.datasets.cell_truth(sdata)
    _, cell = cKDTree(cells.obsm["spatial"]).query(fine(sdata).obsm["spatial"])
    return cells.obs["cell_type"].to_numpy()[cell]


def test_markers_find_their_types(sdata):
    hx.tl.annotate(sdata, MARKERS)
    obs = fine(sdata).obs
    true = nearest_type(sdata)
    share = (true[obs["tesla_type"] == "tumour"] == "tumour").mean()
    assert share > 1.3 * (true == "tumour").mean()
    assert list(obs["tesla_type"].cat.categories) == [*MARKERS]  # none is "Unclassified"
    assert (obs["tesla_type"].value_counts() > 0).all()
    np.testing.assert_allclose(obs["tesla_type_score"], fine(sdata).obsm["tesla_type_scores"].max(axis=1), rtol=1e-5)


def test_clusters_are_areas_numbered_by_size(sdata):
    hx.tl.annotate(sdata, n_clusters=4, seed=0)
    counts = fine(sdata).obs["tesla_cluster"].value_counts()
    assert list(counts.sort_values(ascending=False).index) == list(counts.sort_index().index)
    again = hx.tl.annotate(sdata, n_clusters=4, seed=0, copy=True)
    assert (again["tesla_cluster"] == fine(sdata).obs["tesla_cluster"]).all()


def test_components_found_on_a_sample_give_like_clusters(sdata, monkeypatch):
    from sklearn.metrics import adjusted_rand_score

    from hespotex.tl import _annotate

    values = np.random.default_rng(0).normal(size=(fine(sdata).n_obs, 60)).astype(np.float32)
    half = fine(sdata).obs["array_row"].to_numpy() > fine(sdata).obs["array_row"].median()
    values[half, :20] += 6
    values[3] = np.nan

    class Stored:
        unit = "log1p_cp10k"

    Stored.values = values
    whole = _annotate._components(Stored, seed=0)
    monkeypatch.setattr(_annotate, "_SAMPLE", 400)
    monkeypatch.setattr(_annotate, "_ROWS_AT_ONCE", 100)
    some = _annotate._components(Stored, seed=0)
    assert some.shape == whole.shape == (len(values), 50)
    for found in (whole, some):
        assert np.isnan(found[3]).all()
        assert adjusted_rand_score(np.delete(found[:, 0] > np.nanmedian(found[:, 0]), 3), np.delete(half, 3)) > 0.8


def test_self_labelling_takes_areas_with_the_markers(sdata):
    hx.tl.annotate(sdata, {"tumour": ["TUMOUR1", "TUMOUR2"]}, method="self_labelling", key_added="areas")
    obs = fine(sdata).obs
    values = fine(sdata)[:, ["TUMOUR1", "TUMOUR2"]].X.mean(axis=1)
    inside = (obs["areas"] == "tumour").to_numpy()
    assert 0 < inside.sum() < len(inside)
    assert values[inside].mean() > values[~inside].mean()


def test_annotation_works_on_spots_too(sdata):
    hx.pp.embed(sdata, "morphology", progress_bar=False)
    hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=GENES))
    hx.tl.annotate(sdata, MARKERS, key="ridge")
    assert sdata["table"].obs["ridge_type"].notna().all()
    with pytest.raises(DataValueError, match="works on superpixels"):
        hx.tl.annotate(sdata, MARKERS, key="ridge", method="self_labelling", key_added="x")


def test_annotate_names_what_is_wrong(sdata):
    with pytest.raises(DataValueError, match="either markers"):
        hx.tl.annotate(sdata)
    with pytest.raises(DataValueError, match="cell type 'x'"):
        hx.tl.annotate(sdata, {"x": ["NOPE"]})
    fine(sdata).obs["mine"] = 1
    with pytest.raises(DataValueError, match="annotate did not make"):
        hx.tl.annotate(sdata, MARKERS, key_added="mine")
    with pytest.raises(DataValueError, match="method='magic'"):
        hx.tl.annotate(sdata, MARKERS, method="magic")
    fine(sdata).obsm["own_scores"] = np.zeros((fine(sdata).n_obs, 1))
    with pytest.raises(DataValueError, match=r"obsm\['own_scores'\], which annotate did not make"):
        hx.tl.annotate(sdata, MARKERS, key_added="own")
    fine(sdata).X[:, fine(sdata).var_names.get_loc("T_CELL1")] = 0
    with pytest.raises(DataValueError, match=r"cell type 'T cell': the markers \['T_CELL1'\] are the same everywhere"):
        hx.tl.annotate(sdata, {"T cell": ["TUMOUR1", "T_CELL1"]}, method="self_labelling", key_added="x")


def test_core_lies_deeper_than_the_edge_and_spots_follow(sdata):
    hx.tl.annotate(sdata, MARKERS)
    hx.tl.regions(sdata, "tesla_type", "tumour", table_key="tesla_superpixels", depth_um=48)
    obs = fine(sdata).obs
    assert obs.loc[obs["tesla_type_region"] == "core", "tesla_type_region_depth_um"].min() > 48
    assert obs.loc[obs["tesla_type_region"] == "edge", "tesla_type_region_depth_um"].max() <= 48
    assert (obs["tesla_type"][obs["tesla_type_region"] != "outside"] == "tumour").all()
    spots = sdata["table"].obs["tesla_type_region"]
    assert set(spots.dropna()) == {"core", "edge", "outside"}


def test_every_piece_of_a_tumour_is_divided(sdata):
    shapes = sdata["superpixels"]
    middle = shapes["col"].median()
    fine(sdata).obs["by_hand"] = np.where(np.abs(shapes["col"].to_numpy() - middle) > 8, "tumour", "other")
    hx.tl.regions(sdata, "by_hand", "tumour", table_key="tesla_superpixels", depth_um=32)
    obs = fine(sdata).obs
    for piece in (0, 1):
        assert set(obs.loc[obs["by_hand_region_component"] == piece, "by_hand_region"]) == {"core", "edge"}


def test_spots_of_which_little_lies_on_superpixels_have_no_region(sdata):
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    bounds = sdata["superpixels"].total_bounds
    left = sdata["superpixels"].geometry.cx[: bounds[0] + 1, :].geometry.iloc[0]
    x, y = left.bounds[0], left.centroid.y
    spots, table = sdata["spots"], sdata["table"]
    radius = float(spots["radius"].iloc[0])
    centres = np.column_stack([spots.geometry.x, spots.geometry.y])
    centres[0], centres[1] = (x - 0.8 * radius, y), centres.mean(axis=0)
    sdata["spots"] = ShapesModel.parse(
        centres, geometry=0, radius=radius, index=spots.index, transformations=get_transformation(spots, get_all=True)
    )
    fine(sdata).obs["by_hand"] = "tumour"
    hx.tl.regions(sdata, "by_hand", "tumour", table_key="tesla_superpixels", depth_um=32)
    region = table.obs["by_hand_region"].set_axis(table.obs["spot_id"])
    assert region.loc[[spots.index[0]]].isna().all()
    assert region.loc[spots.index[1]] in ("core", "edge")


def test_spots_on_another_slide_have_no_region_and_are_not_drawn():
    import matplotlib.pyplot as plt
    import spatialdata
    from spatialdata.transformations import get_transformation, set_transformation

    both = dict(zip("AB", hx.datasets.synthetic(n_patients=2, size_px=800, n_genes=20, pitch_um=60), strict=True))
    for name, each in both.items():
        for _, _, element in list(each.gen_spatial_elements()):
            known = get_transformation(element, get_all=True)
            systems = {f"{system}_{name}": transformation for system, transformation in known.items()}
            set_transformation(element, systems, set_all=True)
    sdata = spatialdata.concatenate(both, concatenate_tables=True)
    hx.pp.detect_tissue(sdata, image_key="image-B")
    hx.pp.superpixels(sdata, 16, image_key="image-B")
    hx.tl.predict(sdata, "interpolate", shapes_key="spots-B", image_key="image-B", genes=["TUMOUR1"])
    sdata["interpolate_superpixels"].obs["by_hand"] = "tumour"
    hx.tl.regions(sdata, "by_hand", "tumour", table_key="interpolate_superpixels", depth_um=32)
    obs = sdata["table"].obs
    assert obs.loc[obs["region"] == "spots-A", "by_hand_region"].isna().all()
    assert set(obs.loc[obs["region"] == "spots-B", "by_hand_region"].dropna()) == {"core", "edge"}
    figure = hx.pl.superresolution(sdata, "TUMOUR1", crop_um=100)
    assert len(figure.axes[0].collections[0].get_array()) == len(sdata["spots-B"])
    plt.close(figure)


def test_regions_write_all_or_nothing_and_spare_columns_of_others(sdata):
    fine(sdata).obs["by_hand"] = "tumour"
    sdata["table"].obs["by_hand_region"] = "mine"
    before = list(fine(sdata).obs)
    with pytest.raises(DataValueError, match="made by something else"):
        hx.tl.regions(sdata, "by_hand", "tumour", table_key="tesla_superpixels")
    assert list(fine(sdata).obs) == before
    fine(sdata).obs["own_depth_um"] = 1.0
    with pytest.raises(DataValueError, match="own_depth_um"):
        hx.tl.regions(sdata, "by_hand", "tumour", table_key="tesla_superpixels", key_added="own")


def test_niches_are_compositions_of_surroundings(sdata):
    shapes = sdata["superpixels"]
    left = shapes["col"].to_numpy() < shapes["col"].median()
    fine(sdata).obs["by_hand"] = np.where(left, "a", "b")
    hx.tl.regions(sdata, "by_hand", n_niches=2, radius_um=40, table_key="tesla_superpixels")
    niche = fine(sdata).obs["by_hand_niche"].astype(str).to_numpy()
    assert max((niche[left] == "0").mean(), (niche[left] == "1").mean()) > 0.9
    assert (niche[left] == niche[left][0]).mean() > 0.9
    assert (niche[~left] != niche[left][0]).mean() > 0.9


def test_statistics_are_of_measured_spots_alone(sdata):
    x = sdata["table"].obsm["spatial"][:, 0]
    sdata["table"].obs["half"] = np.where(x < np.median(x), "left", "right")
    counts = sdata["table"].X.tolil()
    counts[np.flatnonzero(x < np.median(x)), 0] = 500
    sdata["table"].X = counts.tocsr()
    table = hx.tl.rank_regions(sdata, "half")
    first = table[table["region"] == "left"].iloc[0]
    assert first["gene"] == sdata["table"].var_names[0]
    assert first["p_adjusted"] < 1e-6
    assert first["n_in"] + first["n_out"] == sdata["table"].n_obs
    with pytest.raises(DataValueError, match="predictions, which are not tested"):
        hx.tl.rank_regions(sdata, "half", table_key="tesla_superpixels")


def test_statistics_equal_scipy_gene_by_gene(sdata, monkeypatch):
    from scipy.stats import mannwhitneyu

    from hespotex.tl import _regions

    monkeypatch.setattr(_regions, "_GENES_AT_ONCE", 7)
    x = sdata["table"].obsm["spatial"][:, 0]
    sdata["table"].obs["third"] = np.digitize(x, np.quantile(x, [0.3, 0.6])).astype(str)
    table = hx.tl.rank_regions(sdata, "third", groups=["0", "2"])
    counts = sdata["table"].X.toarray().astype(float)
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    inside, outside = (values[(sdata["table"].obs["third"] == name).to_numpy()] for name in ("0", "2"))
    here = table[table["region"] == "0"].set_index("gene").loc[sdata["table"].var_names]
    assert (here["n_in"] == len(inside)).all()
    assert (here["n_out"] == len(outside)).all()
    np.testing.assert_allclose(here["mean_in"], inside.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(here["p_value"], mannwhitneyu(inside, outside, axis=0).pvalue, rtol=1e-4)
    with pytest.raises(MissingKeyError, match=r"groups=\['9'\] are not in"):
        hx.tl.rank_regions(sdata, "third", groups=["0", "1", "9"])
    with pytest.raises(DataValueError, match="two are needed"):
        hx.tl.rank_regions(sdata, "third", groups="0")


def test_a_region_of_two_spots_is_not_tested(sdata):
    sdata["table"].obs["few"] = ["a", "a"] + ["b"] * (sdata["table"].n_obs - 2)
    with pytest.raises(DataValueError, match="two are needed"):
        hx.tl.rank_regions(sdata, "few")


def test_regions_names_what_is_wrong(sdata):
    with pytest.raises(MissingKeyError, match=r"hx\.tl\.annotate"):
        hx.tl.regions(sdata, "nope", "tumour", table_key="tesla_superpixels")
    fine(sdata).obs["by_hand"] = "a"
    with pytest.raises(DataValueError, match="no cell has such a label"):
        hx.tl.regions(sdata, "by_hand", "b", table_key="tesla_superpixels")
    with pytest.raises(DataValueError, match="either target="):
        hx.tl.regions(sdata, "by_hand", table_key="tesla_superpixels")


def test_tls_score_needs_several_kinds_in_one_place(sdata):
    hx.tl.tls_score(sdata, MARKERS, num_required=2)
    score = fine(sdata).obs["tls_score"].to_numpy()
    assert ((score == 0) | ((score >= 0.5) & (score <= 1))).all()
    with pytest.raises(DataValueError, match="num_required"):
        hx.tl.tls_score(sdata, MARKERS, num_required=4, key_added="again")


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in divide:RuntimeWarning"
)  # of squidpy, where a type is absent
def test_squidpy_takes_fine_tables_as_they_are(sdata):
    import squidpy as sq

    hx.tl.annotate(sdata, MARKERS)
    table = fine(sdata)
    sq.gr.spatial_neighbors_grid(table, n_neighs=4)
    sq.gr.nhood_enrichment(table, cluster_key="tesla_type", seed=0, show_progress_bar=False, n_perms=20)
    z = table.uns["tesla_type_nhood_enrichment"]["zscore"]
    assert (np.diag(z)[:2] > 0).all()
