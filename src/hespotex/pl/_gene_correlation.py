"""Scores of genes, models and nulls side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import DataTypeError, DataValueError, MissingKeyError
from ._common import NULL_COLOUR, PALETTE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gene_correlation"]

NULL_PREFIX = "null"
CORRELATIONS = ("pearson", "spearman")
SPLIT_HALF = "split_half"


def gene_correlation(
    scores: pd.DataFrame,
    *,
    metric: str = "pearson",
    models: Sequence[str] | None = None,
    ceiling: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the distribution over genes of a score, one row per model, nulls in grey, the noise ceiling as a line.

    Each dot is a gene: its score averaged over the sections of a patient, then over patients. Violins show the
    distribution, the bar the mean. The dashed line is the mean ceiling: what the best possible model could
    reach given how noisy the measurement is.

    Parameters
    ----------
    scores
        Tidy table of :func:`hespotex.tl.cross_validate` or :func:`hespotex.tl.evaluate`: one row per
        model, section and gene, with columns ``model``, ``gene``, `metric` and, where known, ``section``, ``patient``.
    metric
        Column to draw.
    models
        Models to draw, top to bottom; by default models by falling mean, then nulls (``null_…``).
    ceiling
        Whether to draw the ceiling of the mean correlation, where the table has ``split_half``.
    title
        Title; by default the protocol of ``scores.attrs["protocol"]``, where there is one.
    ax
        Axes to draw in.
    save
        File to write the figure to.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingKeyError
        If a column or a model is not in `scores`.
    DataValueError
        If no gene has a defined score.

    Examples
    --------
    >>> import pandas as pd
    >>> import hespotex as hx
    >>> scores = pd.DataFrame({"model": "ridge", "gene": ["A", "B", "C"], "pearson": [0.1, 0.3, 0.5]})
    >>> ax = hx.pl.gene_correlation(scores)
    """
    import matplotlib.pyplot as plt

    from ..metrics import ceiling as noise_ceiling

    if not isinstance(scores, pd.DataFrame):
        raise DataTypeError(f"scores must be the DataFrame of hx.tl.evaluate or cross_validate, got {type(scores)}")
    for name in ("model", "gene", metric):
        if name not in scores:
            raise MissingKeyError(f"scores has no column {name!r}; it has {list(scores)}")
    per_gene = _per_gene(scores, metric, by=("model", "gene"))
    if per_gene.empty:
        raise DataValueError(f"no gene has a defined {metric!r} in scores")
    order = _order(per_gene, models)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 1.1 + 0.5 * len(order)), layout="constrained")
    colours = _colours(order)
    generator = np.random.default_rng(0)
    for row, model in enumerate(order):
        values = per_gene[model].to_numpy()
        if len(values) > 2 and np.ptp(values) > 0:
            violin = ax.violinplot(values, [row], orientation="horizontal", widths=0.8, showextrema=False)
            for body in violin["bodies"]:
                body.set(facecolor=colours[model], alpha=0.35, linewidth=0)
        heights = row + generator.uniform(-0.12, 0.12, len(values))
        ax.scatter(values, heights, s=4, color=colours[model], alpha=0.5, linewidths=0, rasterized=True)
        mean = values.mean()
        ax.plot([mean, mean], [row - 0.38, row + 0.38], color="black", linewidth=1.6)
        ax.annotate(f"{mean:.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    if ceiling and metric in CORRELATIONS and SPLIT_HALF in scores and scores[SPLIT_HALF].notna().any():
        halves = _per_gene(scores, SPLIT_HALF, by=("gene",))  # measurement alone: the same for every model
        value = noise_ceiling(halves.to_numpy()).mean_first
        ax.axvline(value, color="black", linestyle="--", linewidth=1)
        label = f"noise ceiling {value:.2f}"
        ax.annotate(label, (value, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel("Pearson r per gene, within sections" if metric == "pearson" else f"{metric} per gene")
    n_genes = per_gene[order[0]].size
    protocol = scores.attrs.get("protocol", "")
    default = f"{n_genes} genes" + (f", {protocol}" if protocol else "")
    ax.set_title(default if title is None else title, fontsize=9, loc="left", pad=18)  # above the ceiling's label
    save_figure(ax.figure, save)
    return ax


def _per_gene(scores: pd.DataFrame, value: str, by: Sequence[str]) -> pd.Series:
    """Mean over sections, then over patients, per entry of `by`; undefined scores left out."""
    table = scores[scores[value].notna()]
    if "patient" in table:
        table = table.groupby([*by, "patient"], observed=True, sort=False)[value].mean().reset_index()
    return table.groupby(list(by), observed=True, sort=False)[value].mean()


def _order(per_gene: pd.Series, models: Sequence[str] | None) -> list[str]:
    means: dict[Any, float] = per_gene.groupby(level="model", observed=True).mean().to_dict()
    if models is not None:
        if missing := [name for name in models if name not in means]:
            raise MissingKeyError(f"models={missing} are not in scores, which holds {sorted(means)}")
        return list(models)
    return sorted(means, key=lambda name: (str(name).startswith(NULL_PREFIX), -means[name]))


def _colours(order: Sequence[str]) -> dict[str, str]:
    real = [name for name in order if not str(name).startswith(NULL_PREFIX)]
    return {name: PALETTE[real.index(name) % len(PALETTE)] if name in real else NULL_COLOUR for name in order}
