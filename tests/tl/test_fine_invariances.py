"""What must not matter to a prediction below the spot: where the grid begins, which way is up, what lies far away."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from geopandas import GeoDataFrame
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

import hespotex as hx

SIDE, SIZE_UM, MPP = 960, 16, 0.5
CELL = int(SIZE_UM / MPP)
GENES = ("TUMOUR1", "T_CELL1", "FIBROBLAST1")


@pytest.fixture(scope="module")
def original():
    sdata = hx.datasets.synthetic(size_px=SIDE, n_genes=40, pitch_um=60, seed=5)
    hx.pp.detect_tissue(sdata)
    return sdata


def rebuilt(sdata, image, move):
    """The section with another image and its spots and tissue moved by `move`, a function of pixels (n, 2)."""
    table = sdata["table"].copy()
    table.obsm["spatial"] = move(np.asarray(table.obsm["spatial"]))
    table.uns.clear()
    del table.obs["region"], table.obs["spot_id"]
    other = hx.io.from_anndata(table, image, mpp=MPP, spot_diameter_um=55.0, name="moved")
    tissue = GeoDataFrame(geometry=[shapely.transform(each, move) for each in sdata["tissue"].geometry])
    other["tissue"] = ShapesModel.parse(tissue, transformations=get_transformation(other["image"], get_all=True))
    return other


def pixels(sdata):
    return np.moveaxis(np.asarray(sdata["image"]), 0, -1)


def with_parts(sdata):
    hx.pp.superpixels(sdata, SIZE_UM)
    hx.pp.embed(sdata, "rgb", shapes_key="superpixels", tile_um=SIZE_UM, progress_bar=False)
    return sdata


def predicted(sdata, name, **options):
    """Prediction of a method fitted on the section, and its sums (or means) over the spots."""
    model: object = name
    if hx.models.create(name).info.trained:
        model = hx.tl.train(sdata, hx.models.create(name, **options), genes=GENES, parts_key="superpixels", seed=0)
    hx.tl.predict(sdata, model, genes=GENES, parts_key="superpixels", key_added="p")
    spots = hx.tl.aggregate(sdata, "p_superpixels", "spots", copy=True)
    return sdata["p_superpixels"], spots


# Other methods draw by the order of spots and parts; which penalty ridge chooses depends on how blocks of spots lie.
TURN = [("interpolate", {}), ("tesla", {}), ("ridge_parts", {"penalties": [1.0]})]
SHIFT = [
    *TURN,
    ("istar", {"epochs": 1, "n_members": 1, "width": 16}),
    ("histex", {"epochs": 1}),
    ("stage", {"max_epochs": 20, "patience": None}),
]


@pytest.mark.parametrize(("name", "options"), SHIFT)
def test_shifting_the_grid_by_a_cell_shifts_the_map(original, name, options):
    image = pixels(original)
    wider = np.concatenate([np.repeat(image[:, :1], CELL, axis=1), image], axis=1)
    wider = np.concatenate([np.repeat(wider[:1], CELL, axis=0), wider], axis=0)
    here = with_parts(rebuilt(original, image, lambda xy: xy))
    there = with_parts(rebuilt(original, wider, lambda xy: xy + CELL))
    rows = here["superpixels"][["row", "col"]].to_numpy()
    np.testing.assert_array_equal(there["superpixels"][["row", "col"]].to_numpy(), rows + 1)
    (fine, spots), (fine_there, spots_there) = predicted(here, name, **options), predicted(there, name, **options)
    np.testing.assert_allclose(fine_there.X, fine.X, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(spots_there.X, spots.X, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "options"), TURN)
def test_turning_the_section_leaves_the_sums_of_spots(original, name, options):
    image = pixels(original)
    here = with_parts(rebuilt(original, image, lambda xy: xy))
    turned = np.ascontiguousarray(np.rot90(image, -1))  # clockwise: (x, y) goes to (height - y, x)
    there = with_parts(rebuilt(original, turned, lambda xy: np.column_stack([SIDE - xy[:, 1], xy[:, 0]])))
    (fine, spots), (fine_there, spots_there) = predicted(here, name, **options), predicted(there, name, **options)
    assert len(fine_there) == len(fine)
    np.testing.assert_allclose(spots_there.X, spots.X, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "options"), [("ridge_parts", {}), ("stand", {"max_epochs": 10})])
def test_a_nucleus_far_from_all_spots_changes_nothing(original, name, options):
    sdata = rebuilt(original, pixels(original), lambda xy: xy)
    hx.pp.segment_nuclei(sdata)
    hx.pp.embed_nuclei(sdata)
    centre = np.column_stack([sdata["nuclei"].centroid.x, sdata["nuclei"].centroid.y])
    distance = np.linalg.norm(centre[:, None] - sdata["table"].obsm["spatial"][None], axis=2).min(axis=1)
    far = int(distance.argmax())
    assert distance[far] * MPP > 27.5  # under none
    without = np.delete(np.arange(len(centre)), far)
    before = _at_nuclei(sdata, name, options)
    table = next(key for key in sdata.tables if key.startswith("nuclei"))
    kept = sdata["nuclei"].iloc[without]
    features = sdata[table][without].copy()
    del sdata.tables[table]
    sdata["nuclei"] = kept
    sdata[table] = features
    after = _at_nuclei(sdata, name, options)
    np.testing.assert_allclose(after, before[without], rtol=1e-5, atol=1e-6)


def _at_nuclei(sdata, name, options):
    model = hx.tl.train(sdata, hx.models.create(name, **options), genes=GENES, parts_key="nuclei", seed=0)
    hx.tl.predict(sdata, model, parts_key="nuclei", key_added="p")
    return np.asarray(sdata["p_nuclei"].X)
