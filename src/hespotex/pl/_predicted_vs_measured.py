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
    column_count,
    entry_of,
    figure_of,
    is_measured,
    predicted_genes,
    save_figure,
    stored_score,
    title_list,
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

    Both axes of a panel have the same range, and the dashed line is equality: a cloud flatter than it shows a prediction that shrinks towards the mean.
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
    DataValueError
        If the number of titles or axes is wrong.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, pitch_um=40, diameter_um=40, n_genes=20, seed=0)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=sdata["table"].var_names))
    >>> figure = hx.pl.predicted_vs_measured(sdata, ["TUMOUR1", "T_CELL1"])
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    pred, names = predicted_genes(data, genes, key, table_key)
    if missing := [name for name in names if not is_measured(pred, name)]:
        raise MissingKeyError(
            f"genes={missing}: prediction {entry_of(pred)[0]!r} has no measurement of them to compare with in this object"
        )
    titles = title_list(title, names)
    if ax is None:
        columns = column_count(ncols, len(names))
        rows = -(-len(names) // columns)
        figure, grid = plt.subplots(
            rows, columns, squeeze=False, layout="constrained", figsize=(columns * panel_size, rows * panel_size)
        )
        axes = list(grid.ravel())
        for spare in axes[len(names) :]:
            spare.set_axis_off()
    else:
        axes = axes_array(ax, len(names))
        figure = figure_of(axes[0])
    dense = pred.n_obs >= DENSE if hexbin is None else hexbin
    for panel, gene, label in zip(axes, names, titles, strict=True):
        x, y = column(pred, gene, Keys.MEASURED), column(pred, gene)
        low, high = _range(x, y)
        if dense:
            # The same range on both axes: else a flat prediction turns the hexagons into slivers.
            cells = panel.hexbin(
                x, y, gridsize=40, extent=(low, high, low, high), cmap=cmap, bins="log", mincnt=1, linewidths=0
            )
            bar = figure.colorbar(cells, ax=panel, shrink=0.7)
            bar.set_label("spots", fontsize=8)
            bar.ax.yaxis.set_major_formatter(LogFormatter())  # 1, 10, 100 and not powers of ten
            bar.ax.yaxis.set_minor_formatter(LogFormatter())
            bar.ax.tick_params(which="both", labelsize=7)
        else:
            panel.scatter(x, y, s=6, alpha=0.5, color=PALETTE[0], linewidths=0)
        panel.plot([low, high], [low, high], "--", color="0.4", linewidth=1)
        panel.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        panel.set_xlabel(f"measured ({unit_label(pred)})", fontsize=8)
        panel.set_ylabel(f"predicted ({unit_label(pred)})", fontsize=8)
        panel.tick_params(labelsize=7)
        score = stored_score(pred, gene)
        panel.set_title(label + (f"\n{score}" if score else ""), fontsize=9)
    save_figure(figure, save)
    return figure


def _range(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Ends of both axes: all values and a little room."""
    low, high = float(min(np.nanmin(x), np.nanmin(y))), float(max(np.nanmax(x), np.nanmax(y)))
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room
