"""Other tools on what hespotex writes, storage, sections in other guises, and no look at what is to be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.data.provenance import from_uns

from .conftest import fresh
from .io.visium_folder import write_visium_folder

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

# A network of each stage, as small as it gets
TINY = {
    "epochs": 2,
    "n_members": 1,
    "width": 8,
    "head_width": 8,
    "n_layers": 1,
    "jk_hidden": 4,
    "align_weight": 0.5,
    "gate_hidden": 8,
    "gate_epochs": 2,
    "target_ranks": (2, 3),
}


def genes_of(sdata: SpatialData, n: int = 8) -> list[str]:
    return [str(gene) for gene in sdata["table"].var_names[:n]]


def prepare(sdata: SpatialData) -> SpatialData:
    """Embed a section and connect its spots."""
    hx.pp.embed(sdata, "morphology", tile_um=40.0, context_um=80.0)
    hx.pp.spatial_graph(sdata)
    return sdata


@pytest.fixture(scope="module")
def _predicted(_small_section: SpatialData) -> SpatialData:
    sdata = prepare(fresh(_small_section))
    hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=list(sdata["table"].var_names)))
    return sdata


@pytest.fixture
def predicted(_predicted: SpatialData) -> SpatialData:
    """A section with embedding, graph and a prediction of all its genes."""
    return fresh(_predicted)


# -- other tools -------------------------------------------------------------------------------------------------------


def test_scanpy_takes_the_prediction(predicted: SpatialData) -> None:
    import scanpy as sc

    pred = hx.get.prediction(predicted)
    half = np.where(pred.obsm["spatial"][:, 0] < np.median(pred.obsm["spatial"][:, 0]), "left", "right")
    pred.obs["half"] = half
    pred.obs["half"] = pred.obs["half"].astype("category")
    sc.pp.pca(pred, n_comps=5)
    sc.tl.rank_genes_groups(pred, "half")
    first = pred.uns["rank_genes_groups"]["names"]["left"][0]
    difference = pred.to_df().groupby(half).mean().T
    assert pred.obsm["X_pca"].shape == (pred.n_obs, 5)
    assert difference.loc[first, "left"] > difference.loc[first, "right"]
    sc.tl.rank_genes_groups(pred, "half", layer="measured", key_added="of_the_measurement")


def test_squidpy_takes_the_prediction_with_its_graph(predicted: SpatialData) -> None:
    import squidpy as sq

    pred = hx.get.prediction(predicted)
    for name in ("spatial_connectivities", "spatial_distances"):
        assert (pred.obsp[name] != predicted["table"].obsp[name]).nnz == 0
    sq.gr.spatial_autocorr(pred, mode="moran", show_progress_bar=False)
    moran = pred.uns["moranI"]["I"]
    assert set(moran.index) == set(pred.var_names)
    assert moran.max() > 0.3
    pred.obs["half"] = np.where(pred.obsm["spatial"][:, 0] < 400, "left", "right")
    pred.obs["half"] = pred.obs["half"].astype("category")
    sq.gr.nhood_enrichment(pred, "half", n_perms=20, seed=0, show_progress_bar=False)
    enrichment = pred.uns["half_nhood_enrichment"]["zscore"]
    assert enrichment[0, 0] > enrichment[0, 1]


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of matplotlib, about spatialdata-plot
def test_spatialdata_plot_draws_the_prediction(predicted: SpatialData) -> None:
    import matplotlib.pyplot as plt
    import spatialdata_plot  # noqa: F401  registers the accessor

    predicted["pred"] = hx.get.prediction(predicted)
    gene = genes_of(predicted)[0]
    figure, axes = plt.subplots(1, 2)
    for layer, ax in zip((None, "measured"), axes, strict=True):
        predicted.pl.render_images("image").pl.render_shapes(
            "spots", color=gene, table_name="pred", table_layer=layer
        ).pl.show(coordinate_systems="microns", ax=ax, show=False)
    figure.canvas.draw()
    assert all(ax.images for ax in axes)
    for ax, values in zip(axes, (predicted["pred"].X, predicted["pred"].layers["measured"]), strict=True):
        bars = [c.colorbar for c in (*ax.collections, *ax.images) if getattr(c, "colorbar", None) is not None]
        column = values[:, list(predicted["pred"].var_names).index(gene)]
        assert (bars[0].vmin, bars[0].vmax) == pytest.approx((column.min(), column.max()), abs=1e-4)
    plt.close(figure)


# -- storage -----------------------------------------------------------------------------------------------------------


def same_arrays(one: Any, other: Any) -> None:
    if sparse.issparse(one):
        one, other = one.toarray(), other.toarray()
    assert np.asarray(one).dtype == np.asarray(other).dtype
    np.testing.assert_array_equal(other, one)


def same_table(one: AnnData, other: AnnData) -> None:
    """Everything in order: rows, genes, arrays, columns and, in plain Python, the notes."""
    assert list(one.obs_names) == list(other.obs_names)
    assert list(one.var_names) == list(other.var_names)
    same_arrays(one.X, other.X)
    for slot in ("layers", "obsm", "obsp"):
        before, after = dict(getattr(one, slot)), dict(getattr(other, slot))
        before.pop(None, None)
        after.pop(None, None)
        assert before.keys() == after.keys()
        for key, values in before.items():
            same_arrays(values, after[key])
    for slot in ("obs", "var"):
        before, after = getattr(one, slot), getattr(other, slot)
        assert list(before.columns) == list(after.columns)
        for column in before:
            assert before[column].tolist() == after[column].tolist()
    assert from_uns(one.uns["hespotex"]) == from_uns(other.uns["hespotex"])


@pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")
def test_a_section_with_everything_attached_survives_zarr(predicted: SpatialData, tmp_path: Path) -> None:
    from spatialdata import read_zarr
    from spatialdata.transformations import get_transformation

    sdata = predicted
    some = hx.tl.train(sdata, "ridge", genes=genes_of(sdata)[::-1])
    hx.tl.predict(sdata, some, key_added="some")
    hx.pp.segment_nuclei(sdata, n_jobs=1)
    hx.pp.detect_tissue(sdata)
    hx.pp.make_tiles(sdata, diameter_um=40.0, pitch_um=80.0)
    hx.tl.predict(sdata, some, shapes_key="tiles", key_added="some")
    assert set(sdata.tables) == {"table", "morphology_tiles", "some_tiles", "nuclei_features"}
    assert set(sdata.shapes) == {"spots", "tiles", "tissue", "nuclei"}

    sdata.write(tmp_path / "section.zarr")
    back = read_zarr(tmp_path / "section.zarr")
    assert from_uns(back.attrs["hespotex"]) == from_uns(sdata.attrs["hespotex"])
    assert {name for _, name, _ in back.gen_elements()} == {name for _, name, _ in sdata.gen_elements()}
    for name, table in sdata.tables.items():
        same_table(table, back[name])
    for name, shapes in sdata.shapes.items():
        assert list(shapes.index) == list(back[name].index)
        assert list(shapes.columns) == list(back[name].columns)
        assert shapes.geometry.geom_equals(back[name].geometry).all()
    for name in ("image", "nuclei_labels"):
        np.testing.assert_array_equal(back[name].values, sdata[name].values)
    for _, name, element in sdata.gen_spatial_elements():
        before, after = (get_transformation(each, get_all=True) for each in (element, back[name]))
        assert before.keys() == after.keys()
        for system, way in before.items():
            one, other = (each.to_affine_matrix(("x", "y"), ("x", "y")) for each in (way, after[system]))
            np.testing.assert_allclose(one, other)

    for key, table in (("ridge", None), ("some", "table"), ("some", "some_tiles")):
        before, after = (hx.get.prediction(each, key, table_key=table) for each in (sdata, back))
        same_table(before, after)
    again = hx.tl.predict(back, table_key="table", copy=True)  # by the model that the attributes name
    np.testing.assert_allclose(again.X, hx.get.prediction(sdata, "some", table_key="table").X, atol=1e-6)


# -- sections in other guises ------------------------------------------------------------------------------------------


def rebuilt(sdata: SpatialData, pixels: np.ndarray, centres: np.ndarray, mpp: float, **options: Any) -> SpatialData:
    """The section with other pixels (c, y, x) and its spots at `centres`."""
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel
    from spatialdata.transformations import Identity, Scale

    systems = {"global": Identity(), "microns": Scale([mpp, mpp], axes=("x", "y"))}
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=dict(systems), **options)
    spots = ShapesModel.parse(
        centres, geometry=0, radius=20 / mpp, index=sdata["spots"].index, transformations=dict(systems)
    )
    return SpatialData(images={"image": image}, shapes={"spots": spots}, tables={"table": sdata["table"].copy()})


CROP_UM = 64.0  # whole pixels of the coarsest map, so that the maps of the crop are those of the whole


def cropped(sdata: SpatialData) -> SpatialData:
    """Without what lies to the left and above."""
    return sdata.subset(["image", "spots", "table"]).query.bounding_box(
        axes=("x", "y"),
        min_coordinate=[CROP_UM, CROP_UM],
        max_coordinate=[400, 400],
        target_coordinate_system="microns",
    )


def scaled(sdata: SpatialData) -> SpatialData:
    """Every pixel as four, of half the size."""
    pixels, centres = contents(sdata)
    return rebuilt(sdata, pixels.repeat(2, axis=1).repeat(2, axis=2), 2 * centres, 0.25)


def multiscale(sdata: SpatialData) -> SpatialData:
    """Twice as fine as the encoder works, which then reads the second level."""
    pixels, centres = contents(sdata)
    fine = pixels.repeat(2, axis=1).repeat(2, axis=2)
    return rebuilt(sdata, fine, 2 * centres, 0.25, scale_factors=[2, 2])


def rotated(sdata: SpatialData) -> SpatialData:
    """Laid askew in its coordinate systems, as by an alignment."""
    from spatialdata.transformations import Affine, Sequence, get_transformation, set_transformation

    askew = Affine(np.array([[0.6, -0.8, 300], [0.8, 0.6, -40], [0, 0, 1]]), ("x", "y"), ("x", "y"))
    for name in ("image", "spots"):
        systems = get_transformation(sdata[name], get_all=True)
        moved = {system: Sequence([before, askew]) for system, before in systems.items()}
        set_transformation(sdata[name], moved, set_all=True)
    return sdata


def contents(sdata: SpatialData) -> tuple[np.ndarray, np.ndarray]:
    geometry = sdata["spots"].geometry
    return np.asarray(sdata["image"].data), np.column_stack([geometry.x, geometry.y])


@pytest.mark.parametrize("change", [cropped, scaled, multiscale, rotated], ids=lambda change: change.__name__)
def test_a_section_in_another_guise_has_the_same_embedding(section: SpatialData, change: Any) -> None:
    import pandas as pd

    def features(sdata: SpatialData) -> pd.DataFrame:
        values = hx.pp.embed(sdata, "morphology", mpp=0.5, tile_um=40.0, context_um=80.0, copy=True)
        return pd.DataFrame(values, index=sdata["table"].obs_names)

    before, places = features(section), section["table"].to_df()[[]].assign(**_centres_um(section))
    after = features(change(section))
    if change is cropped:  # the rest sees the cut
        after = after[(places.loc[after.index] > CROP_UM + 100).all(axis=1)]
    assert len(after) >= 20
    difference = (after - before.loc[after.index]).abs() / (before.std() + 1e-6)
    assert float(difference.to_numpy().max()) < 0.05


def test_a_crop_at_any_pixel_has_nearly_the_same_embedding() -> None:
    """The working grid begins with the crop, by a fraction of its pixel elsewhere: textures are sampled anew.

    Features of spots that do not see the cut then differ by 0.04 standard deviations in the median, 0.18 as root mean
    square, and by less than one in 99 of 100.
    """
    import pandas as pd

    sdata = hx.datasets.synthetic(size_px=1500, pitch_um=40.0, diameter_um=40.0, n_genes=30, seed=2)
    offset = np.array([53, 107])  # pixels of 0.5 µm
    crop = sdata.subset(["image", "spots", "table"]).query.bounding_box(
        axes=("x", "y"), min_coordinate=offset, max_coordinate=[1500, 1500], target_coordinate_system="global"
    )
    one, other = (
        pd.DataFrame(hx.pp.embed(each, "morphology", copy=True), index=each["table"].obs_names)
        for each in (sdata, crop)
    )
    far = (sdata["table"].obsm["spatial"] > offset + 2 * (240 + 40)).all(axis=1)  # half the context and a margin
    difference = ((other.loc[one.index[far]] - one[far]).abs() / (one.std() + 1e-6)).to_numpy()
    assert len(difference) > 50
    assert np.median(difference) < 0.06
    assert np.sqrt((difference**2).mean()) < 0.25
    assert np.quantile(difference, 0.99) < 1


def _centres_um(sdata: SpatialData) -> dict[str, np.ndarray]:
    x, y = sdata["table"].obsm["spatial"].T / 2  # 0.5 µm/px
    return {"x": x, "y": y}


@pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")
def test_a_visium_folder_read_by_spatialdata_io_goes_all_the_way(tmp_path: Path) -> None:
    """As it is read: with its two previews and without a scale, which follows from the spots, 100 µm apart."""
    from spatialdata_io import visium

    section = hx.datasets.synthetic(size_px=1400, pitch_um=100.0, diameter_um=55.0, n_genes=30, seed=2)
    path = write_visium_folder(tmp_path / "outs", section, mpp=0.5)
    sdata = visium(tmp_path / "outs", dataset_id="sample", fullres_image_file=path)
    assert len(sdata.images) == 3
    assert "microns" not in sdata.coordinate_systems
    image = {"image_key": "sample_full_image"}
    assert resolve_slide(sdata, **image).mpp == pytest.approx(0.5, rel=1e-3)
    hx.pp.embed(sdata, "morphology", tile_um=100.0, **image)
    hx.pp.spatial_graph(sdata)
    model = hx.tl.train(sdata, "ridge", genes=genes_of(sdata), **image)
    hx.tl.predict(sdata, model, **image)
    pred = hx.get.prediction(sdata)
    hx.pp.embed(section, "morphology", tile_um=100.0)
    hx.pp.spatial_graph(section)
    own = hx.tl.predict(section, hx.tl.train(section, "ridge", genes=genes_of(section)), copy=True)
    r = [np.corrcoef(one, other)[0, 1] for one, other in zip(pred.X.T, own.X.T, strict=True)]
    assert min(r) > 0.98  # spots are rounded to whole pixels on disk


# -- no look at what is to be predicted --------------------------------------------------------------------------------


def noise(sdata: SpatialData) -> SpatialData:
    """The section with counts that mean nothing."""
    rng = np.random.default_rng(0)
    table = sdata["table"]
    depth = rng.gamma(0.5, 20, size=table.n_vars)
    table.X = sparse.csr_matrix(rng.poisson(depth, size=table.shape).astype(np.float32))
    return sdata


@pytest.mark.parametrize(("name", "config"), [("ridge", {}), ("hespotex", TINY)])
def test_the_counts_of_the_section_to_be_predicted_change_nothing(
    patients: list[SpatialData], name: str, config: dict[str, Any]
) -> None:
    *train, test = [prepare(sdata) for sdata in patients]
    fitted, predictions = [], []
    for section in (test, noise(fresh(test))):
        model = hx.tl.train(train, name, config=config, genes=genes_of(test), device="cpu")
        fitted.append(train[0].attrs["hespotex"]["model"])  # hashes all that was fitted
        hx.tl.predict(section, model)
        predictions.append(hx.get.prediction(section, name))
    assert fitted[0] == fitted[1]
    np.testing.assert_array_equal(predictions[0].X, predictions[1].X)
    assert not np.array_equal(predictions[0].layers["measured"], predictions[1].layers["measured"])


def test_in_cross_validation_the_counts_of_the_test_section_change_nothing(patients: list[SpatialData]) -> None:
    sections = [prepare(sdata) for sdata in patients]
    models = {"ridge": "ridge", "hespotex": {"name": "hespotex", "config": TINY}}
    predictions: list[dict[str, Any]] = []
    for test in (sections[2], noise(fresh(sections[2]))):
        hx.tl.cross_validate([*sections[:2], test], models, n_top_genes=8, gene_selection="high_mean", nulls=False)
        predictions.append({name: hx.get.prediction(test, f"{name}_cv") for name in models})
    for name in models:
        one, other = (each[name] for each in predictions)
        assert list(one.var_names) == list(other.var_names)
        np.testing.assert_array_equal(one.X, other.X)
