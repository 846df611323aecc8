"""Curves of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ..errors import DataValueError, MissingKeyError
from ._common import PALETTE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..models import Model

__all__ = ["training"]

X_AXIS = "epoch"


def training(
    model: Model,
    columns: str | Sequence[str] | None = None,
    *,
    logy: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw what a model recorded while it was fitted, against the epoch.

    Parameters
    ----------
    model
        Fitted model, or one that was loaded.
    columns
        Columns of ``model.history``; all by default. Members of an ensemble are thin lines of one colour.
    logy
        Whether the y axis is logarithmic.
    title
        Title; the model's name by default.
    ax
        Axes to draw in.
    save
        File to write the figure to.

    Returns
    -------
    The axes.

    Raises
    ------
    DataValueError
        If the model kept no history, as those without epochs do.
    MissingKeyError
        If a column is not in the history.
    """
    import matplotlib.pyplot as plt

    if not model.history:
        raise DataValueError(
            f"model {model.info.name!r} has no training history: it is not fitted, or is fitted without epochs"
        )
    history = pd.DataFrame(model.history)
    x = history[X_AXIS] if X_AXIS in history else history.index.to_series(name=X_AXIS)
    groups = [name for name in ("stage", "member") if name in history]
    possible = [name for name in history if name not in {X_AXIS, *groups} and history[name].notna().any()]
    names = possible if columns is None else [columns] if isinstance(columns, str) else list(columns)
    if missing := [name for name in names if name not in possible]:
        raise MissingKeyError(f"columns={missing} are not in the history, which holds {possible}")
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    runs = [run for _, run in history.groupby(groups, sort=False)] if groups else [history]
    for number, name in enumerate(names):
        colour = PALETTE[number % len(PALETTE)]
        for position, run in enumerate(runs):
            values = run[name].dropna()
            ax.plot(
                x[values.index],
                values,
                color=colour,
                linewidth=1.6 if len(runs) == 1 else 0.9,
                label=name.replace("_", " ") if position == 0 else None,
            )
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss or score")
    if logy:
        ax.set_yscale("log")
    ax.set_title(title or model.info.name)
    ax.legend(frameon=False, fontsize=8)
    save_figure(ax.figure, save)
    return ax
