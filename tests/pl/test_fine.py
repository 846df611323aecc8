"""Maps below the spot."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import CountsError, DataValueError, MissingKeyError


@pytest.fixture(scope="module")
def sdata():
    sdata = hx.datasets.synthetic(size_px=800, n_genes=20, pitch_um=60, seed=2)
    hx.pp.detect_tissue(sdata)
    hx.pp.superpixels(sdata, 16)
    hx.tl.predict(sdata, "tesla", genes=["TUMOUR1", "T_CELL1"])
    hx.pp.segment_nuclei(sdata, progress_bar=False)
    return sdata


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_superresolution_shows_spots_map_and_close_up(sdata, tmp_path):
    figure = hx.pl.superresolution(sdata, ["TUMOUR1", "T_CELL1"], crop_um=150, save=tmp_path / "f.png")
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == 8
    drawn = panels[1].images[0].get_array()
    image = hx.get.raster(sdata, "tesla", genes="TUMOUR1")
    np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), image.values[0])
    assert len(panels[0].collections[0].get_array()) == sdata["table"].n_obs
    left, right = panels[3].get_xlim()
    assert right - left == pytest.approx(150)
    assert (tmp_path / "f.png").stat().st_size > 0


def test_the_map_lies_where_the_cells_lie(sdata):
    figure = hx.pl.superresolution(sdata, "TUMOUR1", crop_um=100)
    extent = [ax for ax in figure.axes if ax.get_title()][1].images[0].get_extent()
    bounds = sdata["superpixels"].total_bounds * 0.5
    assert abs(extent[0] - bounds[0]) < 16
    assert abs(extent[3] - bounds[1]) < 16


def test_superresolution_without_a_measurement_leaves_its_panel_out():
    slide = hx.datasets.synthetic(size_px=600, with_expression=False, seed=1)
    section = hx.datasets.synthetic(size_px=800, n_genes=20, pitch_um=60)
    hx.pp.detect_tissue(section)
    hx.pp.superpixels(section, 16)
    hx.pp.embed(section, "morphology", shapes_key="superpixels", tile_um=32, progress_bar=False)
    hx.tl.predict(slide, hx.tl.train(section, "ridge_parts", genes=["TUMOUR1"]))
    figure = hx.pl.superresolution(slide, "TUMOUR1", crop_um=100)
    assert len([ax for ax in figure.axes if ax.get_title()]) == 3


def test_all_spots_are_shown_whole_and_on_the_scale_of_the_map(sdata):
    figure = hx.pl.superresolution(sdata, "TUMOUR1", crop_um=100)
    spots, fine, *_ = (ax for ax in figure.axes if ax.get_title())
    limits = spots.collections[0].get_clim()
    assert fine.images[0].get_clim() == limits
    counts = sdata["table"].X.toarray()
    column = sdata["table"].var_names.get_loc("TUMOUR1")
    measured = np.log1p(counts[:, column] / counts.sum(axis=1) * 1e4)
    assert limits[1] == pytest.approx(np.percentile(measured, 99), rel=1e-4)  # means of spots lie within their range
    assert spots.get_xlim() == fine.get_xlim()
    assert spots.get_ylim() == fine.get_ylim()
    x, y = (np.asarray(each) * 0.5 for each in (sdata["spots"].geometry.x, sdata["spots"].geometry.y))
    radius = float(sdata["spots"]["radius"].iloc[0]) * 0.5
    (left, right), (bottom, top) = spots.get_xlim(), spots.get_ylim()
    assert left <= x.min() - radius + 0.1
    assert right >= x.max() + radius - 0.1
    assert top <= y.min() - radius + 0.1
    assert bottom >= y.max() + radius - 0.1


def test_counts_of_spots_and_superpixels_have_scales_of_their_own(sdata):
    table = sdata["tesla_superpixels"].copy()
    table.uns["hespotex"]["tesla"]["unit"] = "counts"
    other = type(sdata).init_from_elements(
        {**{name: each for _, name, each in sdata.gen_spatial_elements()}, "table": sdata["table"], "t": table}
    )
    panels = [ax for ax in hx.pl.superresolution(other, "TUMOUR1", crop_um=100).axes if ax.get_title()]
    assert panels[0].collections[0].get_clim() != panels[1].images[0].get_clim()


def test_spots_that_hold_no_counts_are_refused(sdata):
    other = type(sdata).init_from_elements(
        {name: each for _, name, each in sdata.gen_spatial_elements()}
        | {"table": sdata["table"].copy(), "tesla_superpixels": sdata["tesla_superpixels"]}
    )
    other["table"].X = other["table"].X * 0.3
    with pytest.raises(CountsError, match="not whole numbers"):
        hx.pl.superresolution(other, "TUMOUR1")


def test_superresolution_names_what_is_wrong(sdata):
    with pytest.raises(MissingKeyError, match="not predicted"):
        hx.pl.superresolution(sdata, "NOPE")
    with pytest.raises(MissingKeyError, match="level 'superpixel'"):
        hx.pl.superresolution(sdata, "TUMOUR1", "nothing")
    with pytest.raises(DataValueError, match="crop_um"):
        hx.pl.superresolution(sdata, "TUMOUR1", crop_um=0)


def test_nuclei_are_drawn_by_feature_and_by_type(sdata):
    table = sdata["nuclei_features"]
    figure = hx.pl.nuclei(sdata, "area_um2", table_key="nuclei_features", crop_um=None)
    assert len(figure.axes[1].collections[0].get_paths()) == table.n_obs
    table.obs["kind"] = np.where(np.arange(table.n_obs) % 2, "odd", "even")
    figure = hx.pl.nuclei(sdata, "kind", table_key="nuclei_features", crop_um=200)
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["even", "odd"]
    table.obs["cluster"] = np.arange(table.n_obs) % 12
    table.obs["cluster"] = table.obs["cluster"].astype(str).astype("category")
    figure = hx.pl.nuclei(sdata, "cluster", table_key="nuclei_features", crop_um=None)
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(map(str, range(12)))
    assert len({handle.get_color() for handle in legend.legend_handles}) == 12


def test_nuclei_name_what_is_wrong(sdata):
    with pytest.raises(MissingKeyError, match="neither a column"):
        hx.pl.nuclei(sdata, "nope", table_key="nuclei_features")
    with pytest.raises(MissingKeyError, match="no table holds a prediction at nuclei"):
        hx.pl.nuclei(sdata, "TUMOUR1")
    with pytest.raises(DataValueError, match="no nucleus lies in the window"):
        hx.pl.nuclei(sdata, "area_um2", table_key="nuclei_features", centre_um=(-900, -900), crop_um=50)
