from __future__ import annotations

from types import SimpleNamespace

import pytest

import hespotex as hx
from hespotex.errors import DataValueError, MissingKeyError


def _model(history):
    return SimpleNamespace(history=history, info=SimpleNamespace(name="hespotex"))


HISTORY = [{"epoch": epoch, "loss": 1 / epoch, "val_loss": 2 / epoch} for epoch in range(1, 6)]


def test_one_line_per_column():
    ax = hx.pl.training(_model(HISTORY))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss", "val loss"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert ax.get_xlabel() == "epoch"


def test_members_of_an_ensemble_share_colour_and_legend_entry():
    history = [{**row, "member": member} for member in range(3) for row in HISTORY]
    ax = hx.pl.training(_model(history), "loss", logy=True)
    assert len(ax.lines) == 3
    assert len({line.get_color() for line in ax.lines}) == 1
    assert len(ax.get_legend().get_texts()) == 1
    assert ax.get_yscale() == "log"


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(DataValueError, match="no training history"):
        hx.pl.training(_model([]))
    with pytest.raises(MissingKeyError, match="'accuracy'.*'loss'"):
        hx.pl.training(_model(HISTORY), "accuracy")
