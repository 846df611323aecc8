from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import MissingKeyError

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
