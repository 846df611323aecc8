"""Scores of genes, models and nulls side by side."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import DataTypeError, DataValueError, HespotexWarning, MissingKeyError
from ..metrics import METRICS, aggregate
from ..metrics._aggregate import MIN_SPOTS
from ._common import NULL_COLOUR, PALETTE, UNIT_LABELS, figure_of, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gene_correlation"]

NULL_PREFIX = "null"
CORRELATIONS = ("pearson", "spearman")
ERRORS = ("mse", "rmse", "mae", "nrmse")  # the least is the best
AXIS_LABELS = {
    "pearson": "Pearson r",
    "spearman": "Spearman ρ",
    "mse": "mean squared error",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "nrmse": "RMSE / standard deviation of the gene",
    "variance_ratio": "predicted / measured variance",
    "r2": "R²",
    "ssim": "SSIM",
}


def gene_correlation(
    scores: pd.DataFrame,
    *,
    metric: str = "pearson",
    models: str | Sequence[str] | None = None,
    ceiling: bool = True,
    min_spots: int = MIN_SPOTS,
    title: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the distribution over genes of a score, one row per model, nulls in grey, the noise ceiling as a line.

    Each dot is a gene: its score averaged over the sections of a patient, then over patients. Violins show their
    distribution. The bar, with its number, is the mean over the genes of a section, the sections of a patient, the
    patients, as in :func:`hespotex.metrics.aggregate`: where every fold has a panel of its own, a gene of a single fold does
    not count like one of all. The dashed line is the ceiling of that mean: what the best possible model could reach
    given how noisy the measurement is.

    Parameters
    ----------
    scores
        Tidy table of :func:`hespotex.tl.cross_validate` or :func:`hespotex.tl.evaluate`: one row per
        model, section and gene, with columns ``model``, ``gene``, `metric` and, where known, ``section``, ``patient``.
    metric
        Score to draw, one of :data:`hespotex.metrics.METRICS`.
    models
        Models to draw, top to bottom; by default models from best to worst, then nulls (``null_…``) without those made
        of a constant prediction, which say nothing.
    ceiling
        Whether to draw the ceiling of the mean correlation, where the table has ``split_half``.
    min_spots
        Sections with fewer spots are left out, as in :func:`hespotex.metrics.aggregate`.
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
        If `metric` is no score, `models` is empty, all sections are too small, or no gene has a defined score.

    Examples
    --------
    >>> import pandas as pd
    >>> import hespotex as hx
    >>> scores = pd.DataFrame({"model": "ridge", "gene": ["A", "B", "C"], "pearson": [0.1, 0.3, 0.5]})
    >>> ax = hx.pl.gene_correlation(scores)
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not isinstance(scores, pd.DataFrame):
        raise DataTypeError(f"scores must be the DataFrame of hx.tl.evaluate or cross_validate, got {type(scores)}")
    if metric not in METRICS:
        raise DataValueError(f"metric={metric!r} is no score; possible: {', '.join(map(repr, METRICS))}")
    for name in ("model", "gene", metric):
        if name not in scores:
            raise MissingKeyError(f"scores has no column {name!r}; it has {list(scores)}")
    asked = [models] if isinstance(models, str) else models
    if asked is not None and not len(asked):
        raise DataValueError("models is empty; name at least one model, or leave models= out to draw all")
    large = _large(scores, min_spots)
    per_gene = _per_gene(large, metric)
    if per_gene.empty:
        raise DataValueError(f"no gene has a defined {metric!r} in scores")
    summary = _summary(large, metric, min_spots)
    order = _order(summary[metric], asked, metric, hidden=_nulls_of_constants(large))
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 1.1 + 0.5 * len(order)), layout="constrained")
    colours = _colours(scores["model"])
    generator = np.random.default_rng(0)
    for row, model in enumerate(order):
        values = per_gene[model].to_numpy()
        if len(values) > 2 and np.ptp(values) > 0:
            violin = ax.violinplot(values, [row], orientation="horizontal", widths=0.8, showextrema=False)
            bodies: Any = violin["bodies"]
            for body in bodies:
                body.set(facecolor=colours[model], alpha=0.35, linewidth=0)
        heights = row + generator.uniform(-0.12, 0.12, len(values))
        ax.scatter(values, heights, s=4, color=colours[model], alpha=0.5, linewidths=0, rasterized=True)
        mean = summary[metric][model]
        ax.plot([mean, mean], [row - 0.38, row + 0.38], color="black", linewidth=1.6)
        ax.annotate(
            f"{mean:.3f}".replace("-", "−"), (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    above = 6.0  # points between axes and title
    if ceiling and metric in CORRELATIONS and "ceiling" in summary and summary["ceiling"].notna().any():
        value = summary["ceiling"].max()  # of the measurement alone: the same for every model
        ax.axvline(value, color="black", linestyle="--", linewidth=1)
        label = f"noise ceiling {value:.2f}"
        ax.annotate(label, (value, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        above = 18.0  # the ceiling's label is in between
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.tick_params(axis="x", labelsize=8)
    unit = scores.attrs.get("unit", "") if metric in ERRORS and metric != "nrmse" else ""
    ax.set_xlabel(
        f"{AXIS_LABELS[metric]} per gene, within sections" + (f" ({UNIT_LABELS.get(unit, unit)})" if unit else "")
    )
    n_genes = per_gene[order[0]].size
    protocol = scores.attrs.get("protocol", "")
    default = f"{n_genes} genes" + (f", {protocol}" if protocol else "")
    ax.set_title(default if title is None else title, fontsize=9, loc="left", pad=above)
    save_figure(figure_of(ax), save)
    return ax


def _per_gene(scores: pd.DataFrame, metric: str) -> pd.Series:
    """Mean over sections, then over patients, of each model and gene; undefined scores left out."""
    by = ["model", "gene"]
    table = scores[scores[metric].notna()]
    if "patient" in table:
        table = table.groupby([*by, "patient"], observed=True, sort=False)[metric].mean().reset_index()
    return table.groupby(by, observed=True, sort=False)[metric].mean()


def _large(scores: pd.DataFrame, min_spots: int) -> pd.DataFrame:
    """The scores of sections that are large enough."""
    if "n_spots" not in scores:
        return scores
    large = scores[scores["n_spots"] >= min_spots]
    if large.empty and len(scores):
        raise DataValueError(
            f"scores: no section has min_spots={min_spots} spots, the largest has {scores['n_spots'].max():.0f}; "
            "a smaller min_spots= draws them all the same"
        )
    return large


def _summary(scores: pd.DataFrame, metric: str, min_spots: int) -> pd.DataFrame:
    """Mean over genes, sections, patients, seeds, and the ceiling of each model; scores without sections are of several."""
    table = scores if "patient" in scores else scores.assign(patient="")
    if "section" not in table:
        table = table.assign(section=table.groupby(["model", "patient", "gene"], observed=True).cumcount())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HespotexWarning)  # about few patients: said where the scores were made
        by = ["model", *(["seed"] if "seed" in table else [])]
        summary = aggregate(table, metrics=[metric], by=by, min_spots=min_spots)
    return summary.groupby("model", observed=True, sort=False).mean(numeric_only=True)


def _nulls_of_constants(scores: pd.DataFrame) -> set[str]:
    """Nulls made of a constant prediction: shuffled or exchanged, it is constant still."""
    if "flat" not in scores:
        return set()
    constant = (scores["flat"] | scores.get("undefined", False)).groupby(scores["model"], observed=True).all()
    return {name for name in constant.index[constant] if name.startswith(NULL_PREFIX) and ":" in name}


def _order(means: pd.Series, models: Sequence[str] | None, metric: str, *, hidden: set[str]) -> list[str]:
    known = means.dropna()
    if models is not None:
        if missing := [name for name in models if name not in known]:
            raise MissingKeyError(f"models={missing} have no {metric!r} in scores, which holds {sorted(known.index)}")
        return list(models)
    if metric == "variance_ratio":
        badness = (known - 1).abs()
    else:
        badness = known if metric in ERRORS else -known
    names = [name for name in known.index if name not in hidden]
    return sorted(names, key=lambda name: (str(name).startswith(NULL_PREFIX), badness[name]))


def _colours(names: pd.Series) -> dict[str, str]:
    """A colour for each model of the table: the same in every plot of it."""
    unique = sorted(map(str, names.unique()))
    real = [name for name in unique if not name.startswith(NULL_PREFIX)]
    return {name: PALETTE[real.index(name) % len(PALETTE)] if name in real else NULL_COLOUR for name in unique}
