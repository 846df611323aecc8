"""Cross-validate models over patients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .._keys import Keys, sanitize
from .._logging import logger
from .._settings import settings
from ..data.bridge import PartsWanted, Region, SectionView, as_list, find_embedding, regions_of, views_of
from ..data.counts import check_counts, check_names, counts_of, library_size
from ..data.panel import METHODS, Method, PanelSource, choose_panel
from ..data.provenance import record
from ..data.section import Section, Targets, rows_of
from ..data.splits import Fold, check_folds, group_folds
from ..data.stored import check_free, write_prediction
from ..data.transaction import restored_on_error
from ..data.units import check_unit
from ..errors import DataTypeError, DataValueError, HespotexWarning
from ..metrics import DEFAULT_METRICS
from ..models import Model, Run, create
from ._protocol import ARRAY, HANDCRAFTED, CrossValidation, ModelSource, cross_validate_sections

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["cross_validate"]

ModelSpec = str | Model | Mapping[str, Any]


def cross_validate(
    sdatas: Sequence[SpatialData | AnnData],
    model: ModelSpec | Sequence[str | Model] | Mapping[str, ModelSpec] = "hespotex",
    *,
    groups: Sequence[str] | str | None = None,
    n_splits: int | None = None,
    force: bool = False,
    genes: Sequence[str] | None = None,
    n_top_genes: int = 1000,
    gene_selection: Method = "hvg",
    unit: str = "log1p_cp10k",
    metrics: Sequence[str] = DEFAULT_METRICS,
    nulls: bool = True,
    embedding_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    parts_key: str | None = None,
    parts_embedding_key: str | None = None,
    counts_layer: str | None = None,
    min_counts: int = 1,
    device: str | None = None,
    precision: str | None = None,
    seed: int | None = None,
    progress_bar: bool | None = None,
    key_added: str = "cv",
    copy: bool = False,
) -> pd.DataFrame:
    """Score models on patients they were not fitted on.

    In every fold the gene panel is chosen and every model fitted on the training sections alone; a model sees
    nothing of the counts of a test section. Genes and unit are set here, for all models alike. Models that predict
    nuclei or superpixels are scored at the spots: their counts are summed there and normalised by the library that
    they predict themselves.

    Parameters
    ----------
    sdatas
        Sections with expression, an embedding (:func:`hespotex.pp.embed`) and whatever else the models need.
    model
        Name of a model, an unfitted model, a list of these, or a mapping from a label to one of them or to keyword
        arguments of :func:`hespotex.models.create`, such as
        ``{"paper": {"name": "hespotex", "preset": "paper"}, "ridge": "ridge"}``.
    groups
        What must not be split, one name per object of `sdatas` or an ``obs`` column; the patient by default.
    n_splits
        Number of folds; by default one group is left out at a time.
    force
        Allow `groups` that put one patient on both sides, such as adjacent sections of one tumour; warns.
    genes
        Fixed list of genes, which then must not have been chosen on these sections; by default chosen per fold.
    n_top_genes, gene_selection
        Size and method of the choice; see :func:`hespotex.pp.select_genes`.
    unit
        Unit to learn, predict and score.
    metrics
        Scores to compute: ``"pearson"``, ``"spearman"``, ``"mse"``, ``"rmse"``, ``"mae"``, ``"nrmse"``, ``"r2"`` (against
        the training mean), ``"variance_ratio"``, ``"ssim"``.
    nulls
        Whether to add rows for the nulls (``null_…``). ``null_depth`` reads test counts:
        it is a diagnostic of the target, not a predictor.
    embedding_key, table_key, shapes_key, image_key, counts_layer
        What to read; each may be left out where there is one candidate.
    parts_key, parts_embedding_key
        Shapes and embedding of the parts, for models below the spot.
    min_counts
        Spots with fewer counts are neither trained on nor scored.
    device, precision
        As in :func:`hespotex.tl.train`.
    seed
        Seed of models, folds and nulls.
    progress_bar
        Whether to show progress.
    key_added
        Suffix of the keys of out-of-fold predictions.
    copy
        Store nothing; the scores are returned either way.

    Returns
    -------
    One row per model, section and gene: ``model``, ``seed``, ``fold``, ``patient``, ``section``, ``gene``, ``n_spots``, the
    metrics, ``undefined`` (constant or unmeasured: metrics are NaN), ``flat`` (constant prediction),
    ``split_half`` and ``ceiling`` (of the gene), ``pearson_se`` (standard error of the section's mean r, from bootstrapped
    spatial blocks). Average it with :func:`hespotex.metrics.aggregate`. Written unless `copy`:

    ``layers["<label>_cv"]`` or ``obsm["<label>_cv"]`` : float32
        out-of-fold prediction (:func:`hespotex.get.prediction` reads either); where the panels of a table's
        folds differ, the genes they share;
    ``obs["<label>_cv_fold"]`` : categorical
        fold in which a spot was tested;
    ``uns["hespotex"]["<label>_cv"]``
        genes, unit and protocol.

    Raises
    ------
    LeakageError
        If a patient would be in training and test of a fold, unless `force`.
    DataValueError
        If there is a single group, or a panel is empty.
    MissingKeyError
        If a section lacks what a model needs; the call that makes it is named.

    Warns
    -----
    HespotexWarning
        If the patient of a section is unknown (it then counts as one of its own), or with `force`.

    See Also
    --------
    hespotex.metrics.aggregate, hespotex.pl.gene_correlation

    Examples
    --------
    >>> import hespotex as hx
    >>> patients = hx.datasets.synthetic(n_patients=3, size_px=1000, n_genes=60)
    >>> for sdata in patients:
    ...     hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> scores = hx.tl.cross_validate(patients, ["ridge", "mean"], n_top_genes=20, gene_selection="high_mean")
    >>> sorted(scores["fold"].unique()) == sorted(scores["patient"].unique())
    True
    """
    items = as_list(sdatas)
    check_unit(unit)
    if gene_selection not in METHODS:
        raise DataValueError(f"gene_selection={gene_selection!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
    sources = _model_sources(model)
    keys: dict[str, Any] = {"table_key": table_key, "shapes_key": shapes_key}
    regions = regions_of(items, **keys)
    grouped = regions if groups is None else regions_of(items, groups=groups, **keys)
    patients = _patients(regions, grouped, is_named=groups is not None)
    seed = settings.seed if seed is None else seed
    folds = group_folds([region.patient for region in grouped], n_splits, seed=seed)
    check_folds(folds, patients, force=force)

    fresh = {label: make() for label, make in sources.items()}
    needs = {need for model in fresh.values() for need in model.needs}
    wanted = _parts_wanted(fresh, parts_key, parts_embedding_key)
    views = views_of(
        items,
        embedding_key=embedding_key,
        image_key=image_key,
        with_edges="graph" in needs or gene_selection == "svg",
        **keys,
    )
    embeddings = {find_embedding(view.table.adata, embedding_key) for view in views}
    if len(embeddings) > 1:
        raise DataValueError(
            f"the sections hold different embeddings {sorted(embeddings)}; name one with embedding_key="
        )
    used = embeddings.pop()
    sections = [
        _complete(view, patient, counts_layer, unit, used) for view, patient in zip(views, patients, strict=True)
    ]
    if wanted is not None:
        fine = views_of(items, image_key=image_key, parts=wanted, **keys)
        if len(fine) != len(sections):
            raise DataValueError(
                "a table annotates several regions; split it by region to cross-validate below the spot"
            )
        sections = [replace(own, parts=view.section.parts) for own, view in zip(sections, fine, strict=True)]
    keys_of = {label: sanitize(f"{label}_{key_added}") for label in sources}
    if not copy:
        for view in views:
            for key in keys_of.values():
                check_free(view.table.adata, key)
    given = [genes] if isinstance(genes, str) else genes
    panel = given if given is not None else lambda train: _choose(train, gene_selection, n_top_genes)
    result = cross_validate_sections(
        sections,
        sources,
        folds,
        panel=panel,
        unit=unit,
        run=Run(
            seed=seed,
            device=device or settings.device,
            precision=precision,
            progress_bar=settings.progress_bar if progress_bar is None else progress_bar,
        ),
        metrics=metrics,
        min_counts=min_counts,
        nulls=nulls,
    )
    table = result.table
    table.attrs["protocol"] = protocol = _protocol(folds, patients, n_splits)
    table.attrs["unit"] = unit
    if not copy:
        with ExitStack() as stack:
            for item in items:
                stack.enter_context(restored_on_error(item))
            for label in sources:
                _store(label, keys_of[label], views, folds, result, unit, protocol)
    logger.info("cross-validated %s: %s", ", ".join(sources), protocol)
    return table


def _parts_wanted(models: Mapping[str, Model], parts_key: str | None, embedding_key: str | None) -> PartsWanted | None:
    """What the models below the spot read; ``None`` if there is none.

    Raises
    ------
    DataValueError
        If one predicts only the section it was fitted on, or they differ in level.
    """
    if bound := [label for label, model in models.items() if model.info.task == "in-sample"]:
        raise DataValueError(
            f"model: {bound} predict only the section they were fitted on and cannot be cross-validated over patients; hold out "
            "spots of one section in place of it: hx.tl.coarsen(sdata, merge=2)"
        )
    below = {label: model for label, model in models.items() if model.reads_parts}
    if not below:
        return None
    levels = {model.level for model in below.values()}
    if len(levels) > 1:
        raise DataValueError(
            f"model: {sorted(below)} predict at several levels {sorted(levels)}; cross-validate one at a time"
        )
    needs = tuple(sorted({need for model in below.values() for need in model.needs}))
    return PartsWanted(levels.pop(), needs, parts_key, embedding_key)


def _model_sources(model: ModelSpec | Sequence[str | Model] | Mapping[str, ModelSpec]) -> dict[str, ModelSource]:
    """A function that makes an unfitted model, by label."""
    specs: list[tuple[str, ModelSpec]]
    if isinstance(model, str | Model):
        specs = [(_label(model), model)]
    elif isinstance(model, Mapping) and "name" in model:
        specs = [(str(model["name"]), model)]
    elif isinstance(model, Mapping):
        specs = [(str(label), spec) for label, spec in model.items()]
    elif isinstance(model, Sequence):
        specs = [(_label(spec), spec) for spec in model]
    else:
        raise DataTypeError(f"model must be a name, a model, a list or a mapping of them, got {type(model).__name__}")
    if not specs:
        raise DataValueError("model is empty: give at least one")
    labels = [label for label, _ in specs]
    if len({sanitize(label) for label in labels}) < len(labels):
        raise DataValueError(f"model: labels {labels} are not unique; give a mapping from labels to models")
    if wrong := [label for label in labels if label.startswith("null_")]:
        raise DataValueError(f"model: labels {wrong} must not start with 'null_', which marks the nulls")
    return {label: _source(spec) for label, spec in specs}


def _label(spec: Any) -> str:
    if isinstance(spec, Model):
        return spec.info.name
    if isinstance(spec, str):
        return spec
    raise DataTypeError(f"model holds a {type(spec).__name__}; give names or unfitted models, or a mapping with labels")


def _source(spec: ModelSpec) -> ModelSource:
    if isinstance(spec, str):
        create(spec)  # an unknown name is an error now, not after the first fold
        return lambda: create(spec)
    if isinstance(spec, Model):
        if spec.is_fitted:
            raise DataValueError("model is already fitted; give an unfitted one, as all is refitted in every fold")
        return lambda: type(spec)(spec.config)
    if isinstance(spec, Mapping) and "name" in spec:
        options = dict(spec)
        create(**options)
        return lambda: create(**options)
    raise DataTypeError(
        "a model must be a name, an unfitted model, or a mapping with 'name' and options of models.create"
    )


def _patients(regions: Sequence[Region], grouped: Sequence[Region], *, is_named: bool) -> list[str]:
    """Patient of each section: the one noted, else its group, else itself, with a warning."""
    unknown = [region.name for region in regions if not region.patient_known]
    if unknown and not is_named:
        warnings.warn(
            f"the patient of sections {unknown} is unknown, so that each counts as one of its own; name them with "
            "groups=, or note them in attrs['hespotex']['patient']",
            HespotexWarning,
            stacklevel=3,
        )
    return [
        region.patient if region.patient_known else group.patient
        for region, group in zip(regions, grouped, strict=True)
    ]


def _complete(view: SectionView, patient: str, counts_layer: str | None, unit: str, embedding_key: str) -> Section:
    """The section of a view with the counts of all its genes and what the nulls read."""
    adata, rows, section = view.table.adata, view.rows, view.section
    where = f"section {section.name!r}"
    counts = counts_of(adata, counts_layer, where)
    check_counts(counts, where)
    check_names(adata.var_names, f"{where}: gene names")
    own = sparse.csr_array(counts if len(rows) == adata.n_obs else counts[rows])
    extras = dict(section.extras)
    if Keys.ARRAY_ROW in adata.obs and Keys.ARRAY_COL in adata.obs:
        array = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy(dtype=np.float64)[rows]
        if np.isfinite(array).all():
            extras[ARRAY] = array
    handcrafted = Keys.embedding("morphology")
    if handcrafted in adata.obsm and handcrafted != embedding_key:
        extras[HANDCRAFTED] = np.asarray(adata.obsm[handcrafted])[rows]
    targets = Targets(own, library_size(own), tuple(adata.var_names.astype(str)), unit)
    return replace(section, targets=targets, group=patient, extras=extras)


def _choose(train: Sequence[Section], method: str, n_top: int) -> tuple[str, ...]:
    """Panel of a fold from its training sections."""
    sources = []
    for section in train:
        targets = section.require_targets()
        sources.append(
            PanelSource(
                targets.counts, targets.genes, total=targets.library_size, graph=section.edges, name=section.name
            )
        )
    return choose_panel(sources, method=method, n_top=n_top)


def _protocol(folds: Sequence[Fold], patients: Sequence[str], n_splits: int | None) -> str:
    n_patients = len(set(patients))
    of_section = np.asarray(patients)
    if any(set(of_section[fold.train]) & set(of_section[fold.test]) for fold in folds):
        kind = "sections of the same patient in training and test"
        return f"{len(folds)} folds, {kind} ({n_patients} patient{'s' if n_patients > 1 else ''})"
    return (
        f"leave one group out, {n_patients} patients"
        if n_splits is None
        else f"{n_splits} folds of {n_patients} patients"
    )


def _store(
    label: str,
    key: str,
    views: Sequence[SectionView],
    folds: Sequence[Fold],
    result: CrossValidation,
    unit: str,
    protocol: str,
) -> None:
    """Write the out-of-fold predictions of one model into every table."""
    import pandas as pd

    fold_of = {int(index): fold.name for fold in folds for index in fold.test}
    tables: dict[int, list[int]] = {}
    for index, view in enumerate(views):
        tables.setdefault(id(view.table.adata), []).append(index)
    for indices in tables.values():
        adata = views[indices[0]].table.adata
        found = {index: result.predictions[label, index] for index in indices}
        shared = set.intersection(*(set(prediction.genes) for prediction in found.values()))
        genes = tuple(gene for gene in found[indices[0]].genes if gene in shared)
        values = np.empty((adata.n_obs, len(genes)), dtype=np.float32)
        tested = np.empty(adata.n_obs, dtype=object)
        for index, prediction in found.items():
            place = {gene: column for column, gene in enumerate(prediction.genes)}
            values[views[index].rows] = rows_of(prediction.mean)[:, [place[gene] for gene in genes]]
            tested[views[index].rows] = fold_of[index]
        form = write_prediction(adata, key, values, genes, {}, own_table=False)
        adata.obs[Keys.derived(key, "fold")] = pd.Categorical(tested)
        record(
            adata,
            key,
            created_by="hespotex.tl.cross_validate",
            kind="prediction",
            form=form,
            unit=unit,
            genes=list(genes),
            model=label,
            protocol=protocol,
        )
