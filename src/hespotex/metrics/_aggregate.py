"""From a table of scores per gene and section to one number per model: genes, then section, patient, cohort."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from ..errors import DataTypeError, DataValueError, HespotexWarning, MissingKeyError
from ._ceiling import reliable
from ._score import METRICS
from ._spread import is_oversmoothed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MIN_PATIENTS", "MIN_SPOTS", "aggregate"]

MIN_SPOTS: Final = 20  # a section with fewer is reported but not averaged
MIN_PATIENTS: Final = 3  # a cohort mean over fewer comes with a warning
_DISTRIBUTION: Final = ("pearson", "spearman")  # metrics whose spread over genes is shown
ERROR: Final = "pearson_se"  # of the mean correlation of a section, from bootstrapped spatial blocks
_NORMAL: Final = 1.959964  # quantile of the normal distribution that leaves 2.5 % above
_QUANTILES: Final = {"median": 0.5, "q05": 0.05, "q25": 0.25, "q75": 0.75, "q95": 0.95}


def aggregate(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = ("model",),
    level: Literal["section", "patient", "cohort"] = "cohort",
    min_spots: int = MIN_SPOTS,
    seed: int = 0,
) -> pd.DataFrame:
    """Average scores in the one legal order: genes, then section, patient, cohort; patients weigh equally.

    Parameters
    ----------
    table
        Scores of :func:`hespotex.tl.cross_validate`, :func:`hespotex.tl.evaluate` or :func:`score`: one row per gene and
        section, with ``section``, ``patient``, ``gene`` and the columns of `by`. Further read where there:
        ``n_spots``, ``undefined``, ``flat``, ``split_half``, ``pearson_se``.
    metrics
        Columns to average; all known metrics by default.
    by
        What is kept apart: ``("model",)``, or ``("model", "seed")``.
    level
        Where to stop.
    min_spots
        A section with fewer observations is listed at level ``"section"`` and left out of patients and cohort.
    seed
        Seed of the bootstrap over patients.

    Returns
    -------
    One row per entry of `by` (and patient, section), with

    - each metric: its mean; NaN (undefined) genes are left out and counted in ``n_undefined``;
    - ``pearson_lower`` and ``pearson_upper``, where ``pearson_se`` was scored: 95 % interval of the mean r from spatial blocks,
      that is for these sections and not for other patients;
    - for correlations: ``_median``, ``_q05`` … ``_q95``, ``_positive`` (share of genes above 0); at the level of the
      cohort, ``_sd`` over patients and, from three patients on, ``_above_zero``: share of genes whose 95 %
      interval over bootstrapped patients lies above 0;
    - ``rvd`` and ``oversmoothed`` (share of genes) where the variance ratio was scored;
    - ``ceiling``, ``ceiling_pessimistic`` and ``pearson_of_ceiling`` where split-half correlations were taken;
    - ``n_genes`` (different genes scored), ``n_undefined`` and ``n_flat`` (summed over sections), ``n_sections``, ``n_small``
      (sections left out), ``n_patients``.

    Warns
    -----
    HespotexWarning
        If a cohort has fewer than three patients, or sections are left out.

    Examples
    --------
    >>> import pandas as pd
    >>> from hespotex.metrics import aggregate
    >>> table = pd.DataFrame({"model": "ridge", "patient": ["P1", "P1", "P2"], "section": ["a", "b", "c"],
    ...                       "gene": "G", "pearson": [0.0, 0.2, 0.5]})
    >>> aggregate(table, level="patient")["pearson"].tolist()
    [0.1, 0.5]
    """
    import pandas as pd

    if not isinstance(table, pd.DataFrame):
        raise DataTypeError(f"table must be a DataFrame of scores, got {type(table).__name__}")
    if level not in ("section", "patient", "cohort"):
        raise DataValueError(f"level={level!r} is unknown; possible: 'section', 'patient', 'cohort'")
    by = list(by)
    if missing := [name for name in (*by, "patient", "section", "gene") if name not in table]:
        raise MissingKeyError(f"table has no column {', '.join(map(repr, missing))}; it has {list(table)}")
    metrics = [name for name in METRICS if name in table] if metrics is None else list(metrics)
    if not metrics or (missing := [name for name in metrics if name not in table]):
        raise MissingKeyError(f"table has no scores {missing if metrics else list(METRICS)}; it has {list(table)}")
    if twice := int(table.duplicated([*by, "patient", "section", "gene"]).sum()):
        raise DataValueError(
            f"table has {twice} repeated rows of one {', '.join(by)}, section and gene; add to by= what differs"
        )

    sections = _per_section(table, metrics, [*by, "patient", "section"])
    if level == "section":
        return _with_interval(sections).reset_index()
    small = sections["n_spots"] < min_spots if "n_spots" in sections else pd.Series(data=False, index=sections.index)
    if small.any():
        names = sorted(set(sections.index.get_level_values("section")[small]))
        warnings.warn(
            f"{len(names)} sections have fewer than {min_spots} observations and are left out of the mean: {names}",
            HespotexWarning,
            stacklevel=2,
        )
    kept = sections[~small]
    values = [name for name in sections if not str(name).startswith("n_") and name != ERROR]
    counts = [name for name in ("n_undefined", "n_flat") if name in sections]
    per_patient = kept.groupby([*by, "patient"], sort=False, observed=True)
    patients = per_patient[values].mean().join(per_patient[counts].sum())
    patients["n_sections"] = per_patient.size()
    if ERROR in sections:  # sections are drawn apart, so that variances add
        patients[ERROR] = per_patient[ERROR].agg(_error_of_mean)
    keys = [*by, "patient"] if level == "patient" else by
    if level == "patient":
        result = patients
    else:
        cohort = patients.groupby(by, sort=False, observed=True)
        result = cohort[values].mean().join(cohort[[*counts, "n_sections"]].sum())
        for name in metrics:
            result[f"{name}_sd"] = cohort[name].std()
        if ERROR in patients:
            result[ERROR] = cohort[ERROR].agg(_error_of_mean)
        result["n_patients"] = cohort.size()
    result["n_small"] = small.groupby(keys, sort=False, observed=True).sum().reindex(result.index).fillna(0).astype(int)

    used = table.set_index([*by, "patient", "section"]).index.isin(kept.index)
    scores = table[used]
    defined = scores[~_undefined(scores, metrics)]
    result["n_genes"] = (
        defined.groupby(keys, sort=False, observed=True)["gene"].nunique().reindex(result.index).fillna(0)
    )
    result["n_genes"] = result["n_genes"].astype(int)
    if "split_half" in table:
        result["ceiling"] = _ceiling(scores, by, keys).reindex(result.index)
        if "pearson" in result:
            result["pearson_of_ceiling"] = result["pearson"] / result["ceiling"].where(result["ceiling"] > 0)
    if level == "cohort":
        _check_patients(result["n_patients"])
        for name in (name for name in _DISTRIBUTION if name in metrics):
            result[f"{name}_above_zero"] = _above_zero(scores, name, by, seed).reindex(result.index)
    return _with_interval(result).reset_index()


def _error_of_mean(errors: pd.Series) -> float:
    return float(np.sqrt((errors**2).sum(skipna=False)) / len(errors))


def _with_interval(result: pd.DataFrame) -> pd.DataFrame:
    if ERROR not in result:
        return result
    half = _NORMAL * result.pop(ERROR)
    if "pearson" in result:
        result["pearson_lower"], result["pearson_upper"] = result["pearson"] - half, result["pearson"] + half
    return result


def _undefined(scores: pd.DataFrame, metrics: Sequence[str]) -> pd.Series:
    """Rows whose measurement is constant or missing."""
    return (scores["undefined"] if "undefined" in scores else scores[metrics[0]].isna()).astype(bool)


def _per_section(table: pd.DataFrame, metrics: Sequence[str], keys: list[str]) -> pd.DataFrame:
    scores = table.copy()
    extra = []
    if "variance_ratio" in table:
        scores["rvd"] = (scores["variance_ratio"] - 1) ** 2
        extra.append("rvd")
        if "pearson" in table:
            defined = scores["pearson"].notna()
            flags = is_oversmoothed(scores["pearson"].to_numpy(), scores["variance_ratio"].to_numpy())
            scores["oversmoothed"] = np.where(defined, flags, np.nan)
            extra.append("oversmoothed")
    if "split_half" in table:
        scores["ceiling_pessimistic"] = reliable(scores["split_half"].to_numpy(dtype=np.float64))
        extra.append("ceiling_pessimistic")
    grouped = scores.groupby(keys, sort=False, observed=True)
    result = grouped[[*metrics, *extra]].mean()
    for name in (name for name in _DISTRIBUTION if name in metrics):
        for suffix, quantile in _QUANTILES.items():
            result[f"{name}_{suffix}"] = grouped[name].quantile(quantile)
        above = scores[name].gt(0).astype(float).where(scores[name].notna())
        result[f"{name}_positive"] = above.groupby([scores[key] for key in keys], sort=False, observed=True).mean()
    undefined = _undefined(scores, metrics)
    of_row = [scores[key] for key in keys]
    result["n_undefined"] = undefined.astype(int).groupby(of_row, sort=False, observed=True).sum()
    result["n_genes"] = grouped.size() - result["n_undefined"]
    if ERROR in table:
        result[ERROR] = grouped[ERROR].first()
    if "flat" in table:
        result["n_flat"] = scores["flat"].astype(int).groupby(of_row, sort=False, observed=True).sum()
    if "n_spots" in table:
        result["n_spots"] = grouped["n_spots"].first()
    return result


def _ceiling(scores: pd.DataFrame, by: list[str], keys: list[str]) -> pd.Series:
    """Ceiling of the mean correlation, averaged over the same genes of the same sections as the correlation."""
    # Split-half correlations are averaged over sections before the root: less biased than a root per section.
    half = scores.groupby([*by, "patient", "gene"], sort=False, observed=True)["split_half"].mean()
    half = half.groupby([*keys, "gene"], sort=False, observed=True).mean()
    genes = reliable(half.to_numpy(dtype=np.float64))
    scores = scores.join(half.to_frame("_ceiling").assign(_ceiling=genes), on=[*keys, "gene"])
    if "pearson" in scores:
        scores = scores[scores["pearson"].notna()]
    sections = scores.groupby([*by, "patient", "section"], sort=False, observed=True)["_ceiling"].mean()
    patients = sections.groupby([*by, "patient"], sort=False, observed=True).mean()
    return patients if len(keys) > len(by) else patients.groupby(by, sort=False, observed=True).mean()


def _check_patients(n_patients: pd.Series) -> None:
    few = n_patients[n_patients < MIN_PATIENTS]
    if len(few):
        names = ", ".join(" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in few.index)
        warnings.warn(
            f"the cohort mean of {names} rests on {int(few.min())} patient(s); below {MIN_PATIENTS} it says nothing about "
            "other patients",
            HespotexWarning,
            stacklevel=3,
        )


def _above_zero(scores: pd.DataFrame, metric: str, by: list[str], seed: int, n_draws: int = 1000) -> pd.Series:
    """Share of genes whose 95 % interval of the mean over bootstrapped patients lies above 0."""
    import pandas as pd

    per_patient = scores.groupby([*by, "gene", "patient"], sort=False, observed=True)[metric].mean().unstack("patient")
    shares: dict[Any, float] = {}
    for name, group in per_patient.groupby(by, sort=False, observed=True):
        values = group.to_numpy(dtype=np.float64)
        values = values[:, ~np.isnan(values).all(axis=0)]
        n_patients = values.shape[1]
        enough = (~np.isnan(values)).sum(axis=1) >= MIN_PATIENTS
        if n_patients < MIN_PATIENTS or not enough.any():
            continue
        values = values[enough]
        rng = np.random.default_rng(seed)
        times = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n_draws).T.astype(np.float64)
        known = ~np.isnan(values)
        weight = known @ times
        means = np.divide(np.nan_to_num(values) @ times, weight, out=np.full(weight.shape, np.nan), where=weight > 0)
        shares[name if len(by) > 1 else name[0]] = float((np.nanquantile(means, 0.025, axis=1) > 0).mean())
    index = (
        pd.MultiIndex.from_tuples(list(shares), names=by)
        if len(by) > 1 and shares
        else pd.Index(list(shares), name=by[0])
    )
    return pd.Series(list(shares.values()), index=index, dtype=np.float64)
