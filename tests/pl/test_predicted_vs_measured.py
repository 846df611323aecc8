from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import DataTypeError, DataValueError, MissingKeyError

from .conftest import make_section


def test_each_dot_is_a_spot_and_axes_carry_the_unit(section):
    figure = hx.pl.predicted_vs_measured(section, ["EPCAM", "CD4"])
    pred = hx.get.prediction(section)
    offsets = np.asarray(figure.axes[1].collections[0].get_offsets())
    assert offsets[:, 0] == pytest.approx(pred[:, "CD4"].layers["measured"].ravel())
    assert offsets[:, 1] == pytest.approx(pred[:, "CD4"].X.ravel())
    assert figure.axes[0].get_xlabel() == "measured (log1p CP10k)"
    assert [ax.get_title() for ax in figure.axes] == ["EPCAM", "CD4"]


def test_many_spots_become_hexagons_and_axes_are_accepted(section):
    _, ax = plt.subplots()
    figure = hx.pl.predicted_vs_measured(section["table"], "CD4", hexbin=True, ax=ax)
    assert figure is ax.figure
    assert ax.collections[0].get_array().sum() == section["table"].n_obs


def test_measured_genes_are_drawn_and_unmeasured_ones_named():
    section = make_section(measured_genes=("EPCAM", "ACTB"))
    assert [ax.get_title() for ax in hx.pl.predicted_vs_measured(section, "EPCAM").axes] == ["EPCAM"]
    with pytest.raises(MissingKeyError, match=r"genes=\['CD4'\].*no measurement of them"):
        hx.pl.predicted_vs_measured(section, ["EPCAM", "CD4"])


def test_a_flat_prediction_keeps_regular_hexagons_with_a_scale(section):
    figure = hx.pl.predicted_vs_measured(section, "COL1A1", hexbin=True)
    ax, bar = figure.axes
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_aspect() == 1
    hexagon = ax.collections[0].get_paths()[0].get_extents()
    assert hexagon.height / hexagon.width == pytest.approx(2 / np.sqrt(3), rel=0.05)
    assert bar.get_ylabel() == "spots"


def test_arguments_that_cannot_be_drawn_are_named(section):
    with pytest.raises(DataValueError, match="title has 1 entries for 2 genes"):
        hx.pl.predicted_vs_measured(section, ["EPCAM", "CD4"], title="x")
    with pytest.raises(DataValueError, match="ncols=0"):
        hx.pl.predicted_vs_measured(section, "CD4", ncols=0)
    with pytest.raises(DataTypeError, match=r"data must be the SpatialData or AnnData.*got str"):
        hx.pl.predicted_vs_measured("section.zarr", "CD4")
