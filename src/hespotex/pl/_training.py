"""Curves of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import DataTypeError, DataValueError, MissingKeyError
from ._common import PALETTE, axes_array, figure_of, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..models import Model

__all__ = ["training"]

EPOCH = "epoch"
VALIDATION = "val_"
SCORES = ("pearson", "spearman")  # of which more is better
LABELS = {
    "loss": "loss",
    "mse": "squared error",
    "align": "alignment of image and expression",
    "expression_loss": "loss of the expression embedding",
    "val_loss": "loss, left-out groups",
    "val_mse": "squared error, left-out groups",
}


def training(
    model: Model,
    columns: str | Sequence[str] | None = None,
    *,
    logy: bool = False,
    title: str | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw what a model recorded while it was fitted, against the epoch, one panel per stage of the fit.

    HESpotEx has two stages: first the expression of the training spots is embedded, then the network of the image is
    fitted. Where errors or correlations on left-out training groups were recorded, a dotted line marks the best epoch.

    Parameters
    ----------
    model
        Fitted model, or one that was loaded.
    columns
        Columns of ``model.history``; all by default. Stages that recorded none of them are left out.
    logy
        Whether the y axis is logarithmic.
    title
        Title; the model's name by default.
    ax
        Axes to draw in, one per stage.
    save
        File to write the figure to.

    Returns
    -------
    The figure.

    Raises
    ------
    DataTypeError
        If `model` is no model.
    DataValueError
        If the model kept no history, as those without epochs do, or `columns` is empty.
    MissingKeyError
        If a column is not in the history.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, pitch_um=40, diameter_um=40, n_genes=20, seed=0)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> model = hx.tl.train(sdata, "mlp", genes=sdata["table"].var_names, config={"max_epochs": 3}, progress_bar=False)
    >>> figure = hx.pl.training(model)
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not hasattr(model, "history"):
        raise DataTypeError(
            f"model must be a fitted model, got {type(model).__name__}; read a saved one with hx.models.load(path)"
        )
    if not model.history:
        raise DataValueError(
            f"model {model.info.name!r} has no training history: it is not fitted, or is fitted without epochs"
        )
    history = pd.DataFrame(model.history)
    if EPOCH not in history:
        history[EPOCH] = np.arange(1, len(history) + 1)
    possible = [str(name) for name in history if name != EPOCH and history[name].notna().any()]
    names = possible if columns is None else [columns] if isinstance(columns, str) else list(columns)
    if not names:
        raise DataValueError(f"columns is empty; name at least one of {possible}")
    if missing := [name for name in names if name not in possible]:
        raise MissingKeyError(f"columns={missing} are not in the history, which holds {possible}")
    stage = (history[EPOCH].diff() <= 0).cumsum()  # each stage counts its epochs from 1
    stages = [part for _, part in history.groupby(stage) if part[names].notna().any(axis=None)]
    if ax is None:
        figure, grid = plt.subplots(
            1, len(stages), squeeze=False, figsize=(4.2 * len(stages), 3.2), layout="constrained"
        )
        axes = list(grid.ravel())
    else:
        axes = axes_array(ax, len(stages))
        figure = figure_of(axes[0])
    for number, (panel, part) in enumerate(zip(axes, stages, strict=True), start=1):
        for position, name in enumerate(names):
            known = part[part[name].notna()]
            if known.empty:
                continue
            epochs, values = known[EPOCH].to_numpy(), known[name].to_numpy()
            colour, label = PALETTE[position % len(PALETTE)], LABELS.get(name, name.replace("_", " "))
            marker = "o" if len(values) == 1 else None
            panel.plot(epochs, values, color=colour, linewidth=1.6, marker=marker, label=label)
            if name.startswith(VALIDATION):
                is_score = name.removeprefix(VALIDATION) in SCORES
                best = epochs[values.argmax() if is_score else values.argmin()]
                panel.axvline(best, color=colour, linestyle=":", linewidth=1.2, label=f"best: epoch {best:.0f}")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("epoch")
        panel.set_ylabel("loss" if all(name in LABELS for name in names) else "loss or score")
        if logy:
            panel.set_yscale("log")
        where = f", stage {number} of {len(stages)}" if len(stages) > 1 else ""
        panel.set_title((title or model.info.name) + where, fontsize=10)
        panel.legend(frameon=False, fontsize=8)
    save_figure(figure, save)
    return figure
