"""Predicted against measured values of genes, spot by spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..errors import MissingKeyError
from ._common import (
    PALETTE,
    axes_array,
    column,
    entry_of,
    gene_list,
    is_measured,
    save_figure,
    stored_score,
    unit_label,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["predicted_vs_measured"]

DENSE = 2000  # spots from which single dots hide each other and hexagons are drawn


def predicted_vs_measured(
    data: SpatialData | AnnData,
    genes: str | Sequence[str],
    key: str | None = None,
    *,
    table_key: str | None = None,
    hexbin: bool | None = None,
    cmap: str | Colormap = "cividis",
    ncols: int = 4,
    panel_size: float = 2.8,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw predicted against measured expression, one panel per gene, one dot per spot.

    The dashed line is equality: a cloud flatter than it shows a prediction that shrinks towards the mean.
    Titles carry the score that :func:`hespotex.tl.evaluate` stored, with its protocol.

    Parameters
    ----------
    data
        Object with a prediction of :func:`hespotex.tl.predict` and the measurement.
    genes
        Predicted genes.
    key
        Key of the prediction; may be omitted when there is only one.
    table_key
        Table that holds it; all are searched by default.
    hexbin
        Whether to draw the density of spots as hexagons; by default from 2,000 spots.
    cmap
        Colour map of the hexagons.
    ncols
        Panels per row.
    panel_size
        Side of a panel in inches.
    title
        Titles of the genes; their names by default.
    ax
        Axes to draw in, one per gene.
    save
        File to write the figure to.

    Returns
    -------
    The figure.

    Raises
    ------
    MissingKeyError
        If the prediction, a gene or its measurement is not there.
    """
    import matplotlib.pyplot as plt

    from ..get import prediction

    pred = prediction(data, key, table_key=table_key)
    names = gene_list(genes, pred)
    if missing := [name for name in names if not is_measured(pred, name)]:
        raise MissingKeyError(
            f"genes={missing}: prediction {entry_of(pred)[0]!r} has no measurement of them to compare with in this object"
        )
    titles = [title] if isinstance(title, str) else list(title) if title is not None else names
    if ax is None:
        columns = min(ncols, len(names))
        rows = -(-len(names) // columns)
        figure, grid = plt.subplots(
            rows, columns, squeeze=False, layout="constrained", figsize=(columns * panel_size, rows * panel_size)
        )
        axes = list(grid.ravel())
        for spare in axes[len(names) :]:
            spare.set_axis_off()
    else:
        axes = axes_array(ax, len(names))
        figure = axes[0].figure
    dense = pred.n_obs >= DENSE if hexbin is None else hexbin
    for panel, gene, label in zip(axes, names, titles, strict=False):
        x, y = column(pred, gene, Keys.MEASURED), column(pred, gene)
        if dense:
            panel.hexbin(x, y, gridsize=40, cmap=cmap, bins="log", mincnt=1, linewidths=0)
        else:
            panel.scatter(x, y, s=6, alpha=0.5, color=PALETTE[0], linewidths=0)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        panel.plot([low, high], [low, high], "--", color="0.4", linewidth=1)
        panel.set_xlabel(f"measured ({unit_label(pred)})", fontsize=8)
        panel.set_ylabel(f"predicted ({unit_label(pred)})", fontsize=8)
        panel.tick_params(labelsize=7)
        score = stored_score(pred, gene)
        panel.set_title(label + (f"\n{score}" if score else ""), fontsize=9)
    save_figure(figure, save)
    return figure
