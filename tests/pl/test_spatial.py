from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import EllipseCollection

import hespotex as hx
from hespotex.errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError

from .conftest import GENES, make_section


def _titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def _colours(ax):
    (spots,) = [artist for artist in ax.collections if isinstance(artist, EllipseCollection)]
    return np.asarray(spots.get_array())


def test_measured_stands_above_predicted_on_the_image_in_microns(section):
    figure = hx.pl.spatial(section, ["EPCAM", "CD4"])
    assert _titles(figure) == ["EPCAM, measured", "CD4, measured", "EPCAM, predicted", "CD4, predicted"]
    panels = figure.axes[:4]
    assert all(len(ax.images) == 1 for ax in panels)
    assert panels[2].get_xlabel() == "x (µm)"
    assert panels[0].get_ylabel() == "y (µm)"
    assert panels[0].get_xlim() == pytest.approx((3.8, 76.2), abs=0.1)  # spots reach from 6.5 to 73.5 µm
    assert panels[0].get_ylim() == pytest.approx((56.2, 3.8), abs=0.1)  # y runs down


def _seen(ax):
    """Share of the panel that the image covers, and pixels of it per unit of the axes."""
    (image,) = ax.images
    left, right, bottom, top = image.get_extent()
    corners = (image.get_transform() - ax.transData).transform([[left, top], [right, bottom]])
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    (x0, x1), (y1, y0) = ax.get_xlim(), ax.get_ylim()
    width, height = min(right, x1) - max(left, x0), min(bottom, y1) - max(top, y0)
    return width * height / ((x1 - x0) * (y1 - y0)), image.get_array().shape[1] / (right - left)


@pytest.mark.parametrize("scale_factors", [None, [2, 2, 2]])
def test_a_small_tissue_on_a_large_slide_fills_the_panel_and_is_sharp(section, scale_factors):
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    pixels = np.random.default_rng(0).integers(150, 250, (3, 1500, 2000), dtype=np.uint8)
    to = {"microns": Scale([0.5, 0.5], axes=("x", "y"))}
    section["image"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=to, scale_factors=scale_factors
    )
    covered, pixels_per_um = _seen(hx.pl.spatial(section, "CD4", measured=False).axes[0])
    assert covered == pytest.approx(1)
    assert pixels_per_um > 1.5  # of the 2 that the image has


def test_the_panel_ends_where_the_image_does(section):
    section["spots"]["radius"] = 25.0  # beyond the image on all sides
    ax = hx.pl.spatial(section, "CD4", measured=False).axes[0]
    assert ax.get_xlim() == pytest.approx((0, 80))
    assert _seen(ax)[0] == pytest.approx(1, abs=0.01)  # spatialdata-plot draws half a pixel off


def test_colour_bars_point_where_values_are_cut_off(section):
    def ends(**limits):
        bar = hx.pl.spatial(section["table"], "EPCAM", measured=False, **limits).axes[-1]._colorbar
        return bar.extend

    assert ends(vmin=1, vmax=2) == "both"
    assert ends(vmin=-1, vmax=99) == "neither"
    assert ends(vmin=-1, vmax=2) == "max"


def test_drawing_leaves_the_object_as_it_was(section):
    before = section["table"].copy()
    hx.pl.spatial(section, "EPCAM")
    after = section["table"]
    assert list(section.tables) == ["table"]
    assert list(after.obsm) == list(before.obsm)
    assert after.uns.keys() == before.uns.keys()
    assert (after.obs == before.obs).all().all()


def test_an_anndata_is_drawn_as_circles_with_the_values_of_the_prediction(section):
    figure = hx.pl.spatial(section["table"], "EPCAM")
    pred = hx.get.prediction(section["table"])
    assert _colours(figure.axes[0]) == pytest.approx(pred[:, "EPCAM"].layers["measured"].ravel())
    assert _colours(figure.axes[1]) == pytest.approx(pred[:, "EPCAM"].X.ravel())
    assert figure.axes[1].get_xlabel() == "x"  # in a unit that nothing says


@pytest.mark.parametrize("shared", [True, False])
def test_colour_scale_is_shared_on_request(section, shared):
    figure = hx.pl.spatial(section["table"], "EPCAM", shared_scale=shared)
    measured, predicted = (ax.collections[0].norm for ax in figure.axes[:2])
    assert (measured.vmax == predicted.vmax) is shared
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert len(bars) == (1 if shared else 2)
    assert bars[0].get_ylabel() == "log1p CP10k"


def test_limits_given_are_kept_and_a_constant_gene_is_drawn(section):
    figure = hx.pl.spatial(section["table"], "COL1A1", measured=False, vmin=-1, vmax=5)
    assert (figure.axes[0].collections[0].norm.vmin, figure.axes[0].collections[0].norm.vmax) == (-1, 5)
    figure = hx.pl.spatial(section["table"], "COL1A1", measured=False)
    assert figure.axes[0].collections[0].norm.vmax > figure.axes[0].collections[0].norm.vmin


def test_the_stored_score_and_its_protocol_stand_in_the_title(section):
    table = section["table"]
    table.var["ridge_pearson"] = [0.456, 0.1, np.nan, np.nan]
    table.uns["hespotex"]["ridge"]["protocol"] = "leave one patient out"
    titles = _titles(hx.pl.spatial(section, ["EPCAM", "COL1A1"]))
    assert "EPCAM, predicted\nr = 0.46 (leave one patient out)" in titles
    assert "COL1A1, predicted" in titles


def test_only_the_prediction_is_drawn_where_nothing_was_measured():
    section = make_section(measured_genes=("EPCAM", "ACTB"))
    assert _titles(hx.pl.spatial(section, "CD4")) == ["CD4, predicted"]
    with pytest.raises(DataValueError, match="measured=True"):
        hx.pl.spatial(section, "CD4", measured=True)


def test_each_gene_is_drawn_with_the_measurement_it_has():
    section = make_section(measured_genes=("EPCAM", "ACTB"))
    titles = _titles(hx.pl.spatial(section, ["EPCAM", "CD4"]))
    assert titles == ["EPCAM, measured", "CD4, not measured", "EPCAM, predicted", "CD4, predicted"]


def test_genes_wrap_into_bands(section):
    figure = hx.pl.spatial(section["table"], list(GENES), ncols=2)
    assert _titles(figure) == [
        "EPCAM, measured", "CD4, measured", "EPCAM, predicted", "CD4, predicted", "COL1A1, measured", "COL1A1, predicted",
    ]  # fmt: skip


def test_draws_in_the_axes_given_and_saves(section, tmp_path):
    figure, axes = plt.subplots(2, 1)
    path = tmp_path / "new" / "map.png"
    assert hx.pl.spatial(section["table"], "CD4", ax=axes, title="helper T", save=path) is figure
    assert axes[0].get_title() == "helper T, measured"
    assert path.stat().st_size > 0
    with pytest.raises(DataValueError, match="ax holds 1 axes, the plot has 2"):
        hx.pl.spatial(section["table"], "CD4", ax=axes[0])


def test_what_is_missing_is_named(section):
    with pytest.raises(MissingKeyError, match="ACTB.*EPCAM, CD4, COL1A1"):
        hx.pl.spatial(section, "ACTB")
    with pytest.raises(MissingKeyError, match="no such prediction"):
        hx.pl.spatial(section, "CD4", "hespotex")
    with pytest.raises(MissingKeyError, match="'slide' is not among the images"):
        hx.pl.spatial(section, "CD4", image_key="slide")
    with pytest.raises(MissingKeyError, match="'aligned' is not shared"):
        hx.pl.spatial(section, "CD4", coordinate_system="aligned")
    with pytest.raises(MissingKeyError, match="spatial_key='X_umap'"):
        hx.pl.spatial(section["table"], "CD4", spatial_key="X_umap")
    section["second"] = section["image"]
    with pytest.raises(AmbiguousKeyError, match="image_key="):
        hx.pl.spatial(section, "CD4")
    with pytest.raises(DataValueError, match="ncols=0"):
        hx.pl.spatial(section["table"], "CD4", ncols=0)
    with pytest.raises(DataTypeError, match="got list"):
        hx.pl.spatial([section], "CD4")
