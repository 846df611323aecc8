"""Cross-validation of models on plain sections: the core of :func:`hespotex.tl.cross_validate`.

Per fold the panel is chosen, and everything is fitted, on the training sections alone; a model never sees the
targets of a test section, which are taken off before it predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from .. import metrics as scores
from .._keys import Keys
from .._settings import settings
from ..data.section import Prediction, Section, Targets, rows_of
from ..data.shares import aggregate
from ..data.splits import Fold
from ..data.units import normalize
from ..errors import DataValueError
from ..models import Model, Run, create
from ._nulls import Evidence, nulls_of_prediction, nulls_of_training
from ._rows import scored_rows
from ._windows import windows_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ARRAY", "HANDCRAFTED", "CrossValidation", "FittedFold", "cross_validate_sections"]

# Names in Section.extras of what only the protocol reads.
ARRAY: Final = "array"  # array positions (n, 2), for null_coordinate
HANDCRAFTED: Final = "handcrafted"  # colour and texture statistics (n, d), for null_handcrafted

Panel = Sequence[str] | Callable[[Sequence[Section]], Sequence[str]]
ModelSource = Callable[[], Model]


@dataclass(frozen=True, eq=False)
class FittedFold:
    """What was fitted in one fold: its panel and its models by label."""

    fold: Fold
    genes: tuple[str, ...]
    models: Mapping[str, Model]


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Scores, out-of-fold predictions by (label, section index), and what each fold fitted."""

    table: pd.DataFrame
    predictions: Mapping[tuple[str, int], Prediction]
    folds: Sequence[FittedFold]


def cross_validate_sections(
    sections: Sequence[Section],
    models: Mapping[str, ModelSource],
    folds: Sequence[Fold],
    *,
    panel: Panel,
    unit: str = "log1p_cp10k",
    run: Run | None = None,
    metrics: Sequence[str] = scores.DEFAULT_METRICS,
    min_counts: int = 1,
    nulls: bool = True,
    n_thinning: int = 3,
) -> CrossValidation:
    """Fit and score every model in every fold.

    Parameters
    ----------
    sections
        Sections whose targets hold *all* genes of their assay as counts; a panel is taken out of them per fold.
    models
        A function that makes an unfitted model, by label.
    folds
        Folds of section indices; each section is tested at most once.
    panel
        Genes, or a function that chooses them from the training sections of a fold.
    unit
        Unit of the targets for all models.
    run
        Seed and device.
    metrics
        Names of metrics; see :data:`hespotex.metrics.METRICS`.
    min_counts
        Observations with fewer counts are neither trained on nor scored (they are predicted).
    nulls
        Whether to run the nulls.
    n_thinning
        Random halvings for the ceiling.

    Returns
    -------
    Scores (``model``, ``seed``, ``fold``, ``patient``, ``section``, ``gene``, ``n_spots``, the metrics, ``undefined``,
    ``flat``, ``split_half``, ``ceiling``, ``pearson_se``), predictions and fitted models.

    Raises
    ------
    DataValueError
        If a section is tested twice, or no gene of the panel is in the training sections.
    """
    import pandas as pd

    run = run or Run()
    tested = np.concatenate([fold.test for fold in folds])
    if len(np.unique(tested)) < len(tested):
        raise DataValueError("a section is tested in two folds")
    usable = [np.flatnonzero(section.require_targets().library_size >= min_counts) for section in sections]
    if empty := [section.name for section, rows in zip(sections, usable, strict=True) if not len(rows)]:
        raise DataValueError(f"sections {empty} have no observation with at least {min_counts} counts")
    trimmed = [_take(section, rows) for section, rows in zip(sections, usable, strict=True)]
    tables: list[pd.DataFrame] = []
    predictions: dict[tuple[str, int], Prediction] = {}
    fitted_folds: list[FittedFold] = []
    for fold in folds:
        candidates = [trimmed[index] for index in fold.train]
        genes = _panel(panel, candidates)
        train = [_with_genes(section, genes, unit) for section in candidates]
        fitted = {label: _fit(make(), train, unit, run) for label, make in models.items()}
        fitted_folds.append(FittedFold(fold, genes, fitted))
        baselines = _model_nulls(train, run) if nulls else {}
        evidence = [_evidence(section, _measured(section, genes, unit)) for section in train] if nulls else []
        training_mean = _training_mean(train)
        for index in fold.test:
            blind = replace(sections[index], targets=None)
            test, rows = trimmed[index], usable[index]
            measured = _measured(test, genes, unit)
            guesses: dict[str, np.ndarray] = {}
            for label, model in fitted.items():
                with settings.override(device=run.device):
                    found = _at_spots(model, blind, train, unit) if model.reads_parts else model.predict(blind)
                prediction = _checked(found, genes, unit, label)
                predictions[label, int(index)] = prediction
                guesses[label] = rows_of(prediction.mean, rows)
            windows = None
            if "ssim" in metrics:
                windows = windows_of(test.extras.get(ARRAY), test.coordinates, test.name)
            if nulls:
                for label in list(fitted):
                    guesses |= nulls_of_prediction(guesses[label], label, seed=run.seed)
                guesses |= nulls_of_training(evidence, _evidence(test, measured))
                for name, (model, view) in baselines.items():
                    guesses[name] = rows_of(model.predict(view(blind)).mean, rows)
            halves = _split_half(test, genes, unit, n_thinning, run.seed)
            for label, guess in guesses.items():
                front = {"model": label, "seed": run.seed, "fold": fold.name}
                front |= {"patient": test.group, "section": test.name}
                tables.append(
                    scored_rows(
                        measured,
                        guess,
                        genes,
                        front=front,
                        halves=halves,
                        coordinates=test.coordinates,
                        seed=[run.seed, int(index)],
                        metrics=metrics,
                        training_mean=training_mean,
                        windows=windows,
                    )
                )
    table = pd.concat(tables, ignore_index=True)
    table["ceiling"] = scores.gene_ceiling(table)
    return CrossValidation(table, predictions, fitted_folds)


def _panel(panel: Panel, train: Sequence[Section]) -> tuple[str, ...]:
    """Genes of a fold: chosen from its training sections, or those of the fixed list that all of them measured."""
    wanted = panel(train) if callable(panel) else panel
    shared = set.intersection(*(set(section.require_targets().genes) for section in train))
    genes = tuple(gene for gene in dict.fromkeys(map(str, wanted)) if gene in shared)
    if not genes:
        raise DataValueError("genes: none of the panel is measured in all training sections of a fold")
    return genes


def _take(section: Section, rows: np.ndarray) -> Section:
    """`rows` of a section."""
    if len(rows) == section.n_obs:
        return section
    targets, parts = section.targets, section.parts
    return replace(
        section,
        ids=np.asarray(section.ids)[rows],
        features=section.features[rows],
        coordinates=section.coordinates[rows],
        edges=None if section.edges is None else sparse.csr_array(sparse.csr_array(section.edges)[rows][:, rows]),
        targets=None
        if targets is None
        else replace(targets, counts=targets.counts[rows], library_size=targets.library_size[rows]),
        region=None if section.region is None else section.region[rows],
        parts=None if parts is None else replace(parts, share=sparse.csr_array(parts.share[rows])),
        extras={name: np.asarray(values)[rows] for name, values in section.extras.items()},
    )


def _with_genes(section: Section, genes: Sequence[str], unit: str) -> Section:
    """The section with targets of `genes` alone; its library size stays that of the whole assay."""
    targets = section.require_targets()
    place = {gene: column for column, gene in enumerate(targets.genes)}
    counts = sparse.csr_array(targets.counts[:, [place[gene] for gene in genes]])
    return replace(section, targets=Targets(counts, targets.library_size, tuple(genes), unit))


def _measured(section: Section, genes: Sequence[str], unit: str) -> np.ndarray:
    """Measured expression (n, G); genes that the section's assay lacks are NaN, that is unmeasured and not zero."""
    available = set(section.require_targets().genes)
    known = np.array([gene in available for gene in genes])
    if unit == "log1p_cpm_panel" and not known.all():
        missing = [gene for gene, there in zip(genes, known, strict=True) if not there]
        raise DataValueError(
            f"section {section.name!r} does not measure {len(missing)} genes of the panel ({', '.join(missing[:5])}), so "
            f"unit={unit!r}, which divides by the whole panel, is undefined there; use unit='log1p_cp10k'"
        )
    values = np.full((section.n_obs, len(genes)), np.nan, dtype=np.float32)
    if known.any():
        subset = _with_genes(section, [gene for gene, there in zip(genes, known, strict=True) if there], unit)
        values[:, known] = rows_of(subset.require_targets())
    return values


def _training_mean(train: Sequence[Section]) -> np.ndarray:
    total = sum(rows_of(section.require_targets()).sum(axis=0, dtype=np.float64) for section in train)
    return np.asarray(total / sum(section.n_obs for section in train))


def _checked(prediction: Prediction, genes: tuple[str, ...], unit: str, label: str) -> Prediction:
    if prediction.genes != genes or prediction.unit != unit:
        raise DataValueError(f"model {label!r} predicts other genes or another unit than the protocol sets")
    return prediction


def _fit(model: Model, train: Sequence[Section], unit: str, run: Run) -> Model:
    """Fit on targets in the protocol's unit; a model below the spot learns in its own."""
    own = getattr(model.config, "unit", None) if model.reads_parts else None
    if own is None or own == unit:
        return model.fit(train, run)
    return model.fit([replace(each, targets=each.require_targets().in_unit(own)) for each in train], run)


def _at_spots(model: Model, section: Section, train: Sequence[Section], unit: str) -> Prediction:
    """What a model predicts for parts, gathered block by block at the observations, in the protocol's unit.

    Counts are summed. The library that they are normalised by is predicted, too: the panel's sum over the share that the
    panel has of the libraries of the training sections.

    Raises
    ------
    DataValueError
        If a prediction of parts is in another unit than counts or the protocol's.
    """
    if model.unit not in ("counts", unit):
        raise DataValueError(
            f"a prediction of parts in {model.unit!r} cannot be scored in {unit!r}; set unit= to its own"
        )
    share = sparse.csc_array(section.require_parts().share)
    total, start = np.zeros((section.n_obs, len(model.genes))), 0
    for block in model.predict_blocks(section):
        stop = start + len(block.ids)
        total += aggregate(sparse.csr_array(share[:, start:stop]), rows_of(block.mean))
        start = stop
    if model.unit == unit != "counts":
        covered = np.asarray(share.sum(axis=1)).reshape(-1, 1)
        mean = np.divide(total, covered, out=np.zeros_like(total), where=covered > 0)
        return Prediction(section.ids, model.genes, unit, mean.astype(np.float32))
    counts = np.maximum(total, 0.0)
    panel = sum(float(rows_of(each.require_targets().counts).sum()) for each in train)
    library = sum(float(each.require_targets().library_size.sum()) for each in train)
    mean = normalize(counts, counts.sum(axis=1) * library / max(panel, 1e-12), unit)
    return Prediction(section.ids, model.genes, unit, mean)


def _evidence(section: Section, values: np.ndarray) -> Evidence:
    return Evidence(
        patient=str(section.group),
        values=values,
        library_size=section.require_targets().library_size,
        positions=np.asarray(section.extras.get(ARRAY, section.coordinates), dtype=np.float64),
        scalars={
            name: section.extras[name] for name in (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW) if name in section.extras
        },
    )


def _split_half(section: Section, genes: tuple[str, ...], unit: str, n_draws: int, seed: int) -> np.ndarray:
    available = set(section.require_targets().genes)
    known = np.array([gene in available for gene in genes])
    result = np.full(len(genes), np.nan)
    if known.any():
        targets = _with_genes(section, np.asarray(genes)[known].tolist(), unit).require_targets()
        result[known] = scores.split_half(
            rows_of(targets.counts), targets.library_size, unit, n_draws=n_draws, seed=seed
        )
    return result


def _same(section: Section) -> Section:
    return section


def _handcrafted(section: Section) -> Section:
    return replace(section, features=np.asarray(section.extras[HANDCRAFTED]))


def _model_nulls(train: Sequence[Section], run: Run) -> dict[str, tuple[Model, Callable[[Section], Section]]]:
    """Fitted nulls and the view of a section that each takes: ridge on 256 components, ridge on image statistics."""

    def ridge(view: Callable[[Section], Section], **options: Any) -> tuple[Model, Callable[[Section], Section]]:
        return create("ridge", **options).fit([view(section) for section in train], run), view

    found = {"null_encoder_ridge": ridge(_same, components=(256,))}
    if all(HANDCRAFTED in section.extras for section in train):
        found["null_handcrafted"] = ridge(_handcrafted)
    return found
