from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

import hespotex as hx
from hespotex.errors import DataTypeError, DataValueError, MissingKeyError


def _model(history):
    return SimpleNamespace(history=history, info=SimpleNamespace(name="hespotex"))


HISTORY = [{"epoch": epoch, "loss": 1 / epoch, "val_loss": abs(epoch - 3) + 1} for epoch in range(1, 6)]
STAGES = [{"epoch": epoch, "expression_loss": 1 / epoch} for epoch in range(1, 8)] + [
    {"epoch": epoch, "loss": 2 / epoch, "mse": 1 / epoch, "align": 1.0, "val_mse": 3 / epoch} for epoch in range(1, 4)
]


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_one_line_per_column_and_a_mark_at_the_epoch_of_least_error():
    (ax,) = hx.pl.training(_model(HISTORY), logy=True).axes
    assert _legend(ax) == ["loss", "loss, left-out groups", "best: epoch 3"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert ax.get_xlabel() == "epoch"
    assert ax.get_yscale() == "log"


def test_each_stage_of_a_fit_has_a_panel():
    figure = hx.pl.training(_model(STAGES))
    assert [ax.get_title() for ax in figure.axes] == ["hespotex, stage 1 of 2", "hespotex, stage 2 of 2"]
    assert [len(ax.lines[0].get_xdata()) for ax in figure.axes] == [7, 3]
    assert _legend(figure.axes[0]) == ["loss of the expression embedding"]
    assert all(ax.get_ylabel() == "loss" for ax in figure.axes)
    assert len(hx.pl.training(_model(STAGES), "mse").axes) == 1
    _, axes = plt.subplots(1, 2)
    assert hx.pl.training(_model(STAGES), ax=axes) is axes[0].figure


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(DataValueError, match="no training history"):
        hx.pl.training(_model([]))
    with pytest.raises(MissingKeyError, match="'accuracy'.*'loss'"):
        hx.pl.training(_model(HISTORY), "accuracy")
    with pytest.raises(DataTypeError, match=r"got str; read a saved one with hx\.models\.load"):
        hx.pl.training("model.hx")
    with pytest.raises(DataValueError, match="columns is empty"):
        hx.pl.training(_model(HISTORY), [])


def test_the_best_epoch_of_a_correlation_is_its_highest():
    model = hx.models.create("mean")
    model.history = [{"epoch": n, "loss": 1.0, "val_pearson": r} for n, r in enumerate((0.1, 0.3, 0.2), start=1)]
    model._fitted = True
    labels = [text.get_text() for text in hx.pl.training(model).axes[0].get_legend().get_texts()]
    assert "best: epoch 2" in labels
