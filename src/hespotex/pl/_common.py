"""What the plots share: words for units, checks of names and axes, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from .._keys import Keys
from ..errors import DataTypeError, DataValueError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

UNIT_LABELS = {
    "log1p_cp10k": "log1p CP10k",
    "log1p_cpm_panel": "log1p CPM of the panel",
    "log1p_counts": "log1p counts",
    "log2_counts": "log2 (counts + 1)",
    "counts": "counts",
}

# Okabe & Ito's colours, told apart by all common kinds of colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
NULL_COLOUR = "#B3B3B3"


def check_data(data: object) -> None:
    """Raise unless `data` is what predictions are stored in."""
    from anndata import AnnData
    from spatialdata import SpatialData

    if not isinstance(data, SpatialData | AnnData):
        raise DataTypeError(
            f"data must be the SpatialData or AnnData with a prediction of hx.tl.predict, got {type(data).__name__}"
        )


def entry_of(pred: AnnData) -> tuple[str, dict]:
    """Key and provenance of the prediction that :func:`hespotex.get.prediction` returned."""
    (item,) = pred.uns[Keys.NAMESPACE].items()
    return item


def unit_label(pred: AnnData) -> str:
    """The prediction's unit in words for an axis."""
    unit = str(entry_of(pred)[1].get("unit", ""))
    return UNIT_LABELS.get(unit, unit)


def predicted_genes(
    data: SpatialData | AnnData, genes: str | Sequence[str], key: str | None, table_key: str | None
) -> tuple[AnnData, list[str]]:
    """The prediction meant, as an AnnData, and the names of the genes asked for, all of them in it."""
    from ..get import prediction

    check_data(data)
    pred = prediction(data, key, table_key=table_key)
    return pred, gene_list(genes, pred)


def gene_list(genes: str | Sequence[str], pred: AnnData) -> list[str]:
    """The genes asked for, all of them predicted."""
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise DataValueError("genes is empty: name at least one predicted gene")
    missing = [name for name in names if name not in pred.var_names]
    if missing:
        shown = ", ".join(map(str, pred.var_names[:8])) + (", …" if pred.n_vars > 8 else "")
        raise MissingKeyError(
            f"genes={missing} are not predicted by {entry_of(pred)[0]!r}; its {pred.n_vars} genes are: {shown}"
        )
    return names


def title_list(title: str | Sequence[str] | None, genes: Sequence[str]) -> list[str]:
    """One title per gene, the genes' names by default."""
    titles = list(genes) if title is None else [title] if isinstance(title, str) else list(title)
    if len(titles) != len(genes):
        raise DataValueError(f"title has {len(titles)} entries for {len(genes)} genes; give one per gene")
    return titles


def column_count(ncols: int, n: int) -> int:
    """Columns of a grid of `n` panels."""
    if ncols < 1:
        raise DataValueError(f"ncols={ncols} must be at least 1")
    return min(ncols, n)


def column(pred: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Values of one gene, (n,)."""
    matrix = pred.X if layer is None else pred.layers[layer]
    values = matrix[:, pred.var_names.get_loc(gene)]
    return np.asarray(values.todense() if hasattr(values, "todense") else values, dtype=float).ravel()


def is_measured(pred: AnnData, gene: str) -> bool:
    """Whether there is a measurement of `gene` to compare with."""
    return Keys.MEASURED in pred.layers and bool(pred.var[Keys.MEASURED][gene])


def stored_score(pred: AnnData, gene: str) -> str:
    """Score of a gene and its protocol as :func:`hespotex.tl.evaluate` stored them; empty if it was not run."""
    key, entry = entry_of(pred)
    name = Keys.derived(key, "pearson")
    if name not in pred.var or pd.isna(pred.var[name].get(gene, np.nan)):
        return ""
    protocol = entry.get("protocol") or "this section"
    return f"r = {pred.var[name][gene]:.2f} ({protocol})"


def axes_array(ax: Axes | Sequence[Axes] | np.ndarray, n: int) -> list[Axes]:
    """The axes given, as a list of just `n`."""
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != n:
        raise DataValueError(f"ax holds {len(axes)} axes, the plot has {n} panels")
    return axes


def figure_of(ax: Axes) -> Figure:
    """The figure that holds `ax`."""
    return cast("Figure", ax.figure)


def save_figure(figure: Figure, save: str | Path | None) -> None:
    """Write the figure where asked, making the folder."""
    if save is None:
        return
    path = Path(save)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
