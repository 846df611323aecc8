"""Train a model on sections that have both image and expression."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._settings import settings
from .._version import __version__
from ..data.bridge import (
    PartsWanted,
    Region,
    SectionView,
    as_list,
    embedding_entry,
    find_embedding,
    regions_of,
    views_of,
)
from ..data.lattice import detect_lattice
from ..data.panel import METHODS
from ..data.provenance import from_uns
from ..encoders import identifying
from ..errors import DataValueError, HespotexWarning, ModelMismatchError
from ..models import Model, Recipe, Run, create
from ..models._store import remember

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["make_recipe", "train"]


def train(
    sdatas: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    model: str | Model = "hespotex",
    *,
    preset: str | None = None,
    config: Any | Mapping[str, Any] | None = None,
    genes: Sequence[str] | None = None,
    n_top_genes: int | None = None,
    gene_selection: str | None = None,
    unit: str | None = None,
    groups: Sequence[str] | str | None = None,
    embedding_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    parts_key: str | None = None,
    counts_layer: str | None = None,
    min_counts: int = 1,
    device: str | None = None,
    precision: str | None = None,
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    accumulate_grad_batches: int = 1,
    checkpoint_dir: str | Path | None = None,
    seed: int | None = None,
    progress_bar: bool | None = None,
) -> Model:
    """Train `model` on sections that have both image and expression.

    Everything fitted, the gene panel included, is fitted on these sections alone and travels inside the model.

    Parameters
    ----------
    sdatas
        One or many sections with an embedding (:func:`hespotex.pp.embed`) and, for models that need them, a
        graph (:func:`hespotex.pp.spatial_graph`) and nuclei (:func:`hespotex.pp.segment_nuclei`). An AnnData
        suffices when these are there. Counts may stay on disk (:func:`hespotex.io.read_lazy`). Models below the spot need a SpatialData with superpixels
        (:func:`hespotex.pp.superpixels`) or nuclei, and their embedding.
    model
        Name in :func:`hespotex.models.available`, or an unfitted model.
    preset, config
        Named settings of the model (``"default"``, ``"paper"``), or its own config dataclass or mapping.
    genes
        Genes to predict. By default those marked in ``var["hespotex_target"]`` of every section, else chosen
        here by :func:`hespotex.pp.select_genes`.
    n_top_genes, gene_selection
        Size and method of that choice; by default the model's own (for HESpotEx the union of 1,000 highly
        variable genes per section).
    unit
        Unit to learn and predict; log1p of counts per 10,000 of the full library by default.
    groups
        Patient of each section, or the ``obs`` column naming it; used by models that validate inside training.
    embedding_key, table_key, shapes_key, image_key, counts_layer
        What to read; each may be left out where there is one candidate. For models below the spot the embedding is
        that of the parts.
    parts_key
        Shapes of the parts, for models below the spot; ``"superpixels"`` or ``"nuclei"`` by default.
    min_counts
        Spots with fewer counts are left out of training, with a warning.
    device
        ``"auto"`` picks CUDA, then MPS, then CPU; the setting by default.
    precision
        Lightning's word, such as ``"32-true"`` or ``"bf16-mixed"``; by default 16-bit mixed on CUDA (not for
        ``preset="paper"``) and 32-bit elsewhere.
    devices
        Devices of each machine to train on, each with a process of its own: CUDA devices, or on the CPU processes that
        share its cores; ``"auto"`` takes all CUDA devices. Only for models that :func:`hespotex.models.available` calls
        distributed.
    num_nodes
        Machines; on each of them the script is started with torchrun, and afterwards all processes have the model.
    accumulate_grad_batches
        Batches of each process whose mean gradient makes one step. A step thus sees ``devices * num_nodes *
        accumulate_grad_batches`` of the model's batches, and only that product changes the result.
    checkpoint_dir
        Folder from which an interrupted training resumes; several machines must share it.
    seed
        Seed of everything random; the global random state is left alone.
    progress_bar
        Whether to show progress.

    Returns
    -------
    The fitted model; ``model.save(path)`` writes it. Each of `sdatas` remembers it in
    ``attrs["hespotex"]["model"]`` (SpatialData) or ``uns["hespotex"]["model"]`` (AnnData), so that
    ``hx.tl.predict(sdata)`` finds it; nothing else in them changes.

    Raises
    ------
    MissingKeyError
        If a section lacks something the model needs; the call that makes it is named.
    CountsError
        If ``X`` does not hold raw counts.
    DataValueError
        Among others, if there are not as many devices, or the model is none to train on several; or if the expression would
        not fit into memory, with a method that reads all of it at once.
    WorkerError
        If one of several processes died.

    See Also
    --------
    hespotex.tl.predict, hespotex.tl.cross_validate

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1600)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> model = hx.tl.train(sdata, "ridge", genes=sdata["table"].var_names[:20])
    >>> model
    Ridge(20 genes, unit 'log1p_cp10k')
    """
    items = as_list(sdatas)
    if isinstance(model, str):
        model = create(model, preset=preset, config=config)
    elif preset is not None or config is not None:
        raise DataValueError("preset= and config= go with a model's name; model is already an object")
    model = fit_model(
        items,
        model,
        genes=genes,
        n_top_genes=n_top_genes,
        gene_selection=gene_selection,
        unit=unit,
        groups=groups,
        embedding_key=embedding_key,
        table_key=table_key,
        shapes_key=shapes_key,
        image_key=image_key,
        parts_key=parts_key,
        counts_layer=counts_layer,
        min_counts=min_counts,
        device=device,
        precision=precision,
        devices=devices,
        num_nodes=num_nodes,
        accumulate_grad_batches=accumulate_grad_batches,
        checkpoint_dir=checkpoint_dir,
        seed=seed,
        progress_bar=progress_bar,
    )
    try:
        identity = remember(model)
    except OSError as error:  # the model itself must not be lost for want of room in the cache
        warnings.warn(
            f"the trained model could not be kept in the cache {str(settings.cache_dir)!r} ({error}), so that "
            "hx.tl.predict(sdata) will not find it by itself; keep it with model.save(path)",
            HespotexWarning,
            stacklevel=2,
        )
        return model
    for item in items:
        _note(item, identity)
    logger.info("trained %s (%s), %d genes", model.info.name, identity, len(model.genes))
    return model


def fit_model(
    items: Sequence[SpatialData | AnnData],
    model: Model,
    *,
    genes: Sequence[str] | None = None,
    n_top_genes: int | None = None,
    gene_selection: str | None = None,
    unit: str | None = None,
    groups: Sequence[str] | str | None = None,
    embedding_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    parts_key: str | None = None,
    counts_layer: str | None = None,
    min_counts: int = 1,
    device: str | None = None,
    precision: str | None = None,
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    accumulate_grad_batches: int = 1,
    checkpoint_dir: str | Path | None = None,
    seed: int | None = None,
    progress_bar: bool | None = None,
) -> Model:
    """Fit an unfitted model on sections and give it its recipe; arguments as in :func:`train`. Nothing is noted."""
    items = list(items)
    keys: dict[str, Any] = {
        "table_key": table_key,
        "shapes_key": shapes_key,
        "image_key": image_key,
        "groups": groups,
        "embedding_key": embedding_key,
        "with_edges": "graph" in model.needs,
    }
    if model.reads_parts:
        keys["parts"] = PartsWanted(model.level, model.needs, parts_key, keys.pop("embedding_key"))
        found: Sequence[Region | SectionView] = regions_of(
            items, table_key=table_key, shapes_key=shapes_key, groups=groups
        )
    elif parts_key is not None:
        raise DataValueError(f"parts_key={parts_key!r}: {model.info.name!r} predicts spots and reads no parts")
    else:
        found = views_of(items, **keys)  # fails early, before genes are chosen
    tables = list({id(each.table.adata): each.table.adata for each in found}.values())
    panel = _panel(items, tables, model, genes, n_top_genes, gene_selection, counts_layer, table_key)
    own_unit = getattr(model.config, "unit", None)
    if model.reads_parts and own_unit == "counts" and unit not in (None, own_unit):
        raise DataValueError(
            f"unit={unit!r}: {model.info.name!r} learns from sums over its parts and predicts counts; leave unit= out"
        )
    unit = unit or own_unit or "log1p_cp10k"
    views = views_of(items, genes=panel, unit=unit, counts_layer=counts_layer, min_counts=min_counts, **keys)
    seed = settings.seed if seed is None else seed
    recipe = make_recipe(views, panel, unit, embedding_key, seed, model)
    run = Run(
        seed=seed,
        device=device or settings.device,
        precision=precision,
        progress_bar=settings.progress_bar if progress_bar is None else progress_bar,
        checkpoint_dir=Path(checkpoint_dir) if checkpoint_dir is not None else None,
        devices=devices,
        num_nodes=num_nodes,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    model.fit([view.section for view in views], run)
    # A method bound to its section reads the same spots of it again.
    bound = {"min_counts": min_counts, "counts_layer": counts_layer} if model.info.task == "in-sample" else {}
    model.recipe = replace(recipe, scores=model.scores, training={**recipe.training, **bound})
    return model


def _note(data: SpatialData | AnnData, identity: str) -> None:
    from anndata import AnnData

    store = data.uns if isinstance(data, AnnData) else data.attrs
    store[Keys.NAMESPACE] = {**store.get(Keys.NAMESPACE, {}), "model": identity}


def _panel(
    items: list[SpatialData | AnnData],
    tables: list[AnnData],
    model: Model,
    genes: Sequence[str] | None,
    n_top_genes: int | None,
    gene_selection: str | None,
    counts_layer: str | None,
    table_key: str | None,
) -> tuple[str, ...]:
    """Genes to learn: those given, those marked, or those chosen from these sections."""
    if genes is not None:
        given = list(dict.fromkeys([genes] if isinstance(genes, str) else map(str, genes)))
        shared = [gene for gene in given if all(gene in table.var_names for table in tables)]
        if missing := sorted(set(given) - set(shared)):
            warnings.warn(
                f"{len(missing)} of {len(given)} genes are not in every section and are left out: "
                f"{', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}",
                HespotexWarning,
                stacklevel=3,
            )
        if not shared:
            raise DataValueError("genes: none of the genes given is in every section")
        return tuple(shared)
    chosen_here = n_top_genes is not None or gene_selection is not None
    if not chosen_here and all(Keys.TARGET in table.var for table in tables):
        marked = [set(table.var_names[table.var[Keys.TARGET].to_numpy(dtype=bool)].astype(str)) for table in tables]
        if shared_marks := set.intersection(*marked):
            return tuple(sorted(shared_marks))
        raise DataValueError(f"var[{Keys.TARGET!r}] marks no gene common to all sections; run hx.pp.select_genes again")
    from ..pp import select_genes

    if gene_selection is not None and gene_selection not in METHODS:
        raise DataValueError(f"gene_selection={gene_selection!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
    options: dict[str, Any] = dict(getattr(model.config, "gene_selection", None) or {})
    if gene_selection is not None:
        options = {"method": gene_selection}
    if n_top_genes is not None:
        options["n_top"] = n_top_genes
    return tuple(select_genes(items, layer=counts_layer, table_key=table_key, copy=True, **options) or ())


def _shared(entries: list[Mapping[str, Any]], what: str, remedy: str) -> dict[str, Any]:
    """The one entry all sections agree on."""
    first = dict(entries[0])
    for entry in entries[1:]:
        if identifying(entry) != identifying(first):
            differing = sorted({key for key in {*first, *entry} if first.get(key) != dict(entry).get(key)})
            raise ModelMismatchError(f"the sections differ in {what} ({', '.join(differing)}); {remedy}")
    return first


def make_recipe(
    views: list[SectionView], genes: tuple[str, ...], unit: str, embedding_key: str | None, seed: int, model: Model
) -> Recipe:
    """What prediction has to know of how these sections were prepared."""
    notes = [view.table.adata.uns.get(Keys.NAMESPACE, {}) for view in views]
    graph = nuclei = {}
    if "graph" in model.needs:
        graph = _graph_arguments([from_uns(note.get(Keys.CONNECTIVITIES, {})) for note in notes])
    if "nuclei" in model.needs or model.level == "nucleus":
        nuclei = dict(from_uns(notes[0].get(Keys.N_NUCLEI, {})).get("params", {}))
    embedding_key, encoder, n_features = _embedding(views, embedding_key)
    return Recipe(
        genes=genes,
        unit=unit,
        embedding_key=embedding_key,
        encoder=encoder,
        n_features=n_features,
        tiles={} if model.reads_parts else _tiles(views, embedding_key),
        graph=graph,
        nuclei=nuclei,
        parts=_parts(views, model),
        training={
            "sections": [
                {"name": view.section.name, "group": view.section.group, "n_obs": view.section.n_obs} for view in views
            ],
            "seed": seed,
            "hespotex_version": __version__,
        },
    )


def _embedding(views: list[SectionView], embedding_key: str | None) -> tuple[str, dict[str, Any], int]:
    """Key, encoder and width of the one embedding that the model reads; of the parts, where it reads those."""
    first = views[0]
    if first.parts is None:
        keys = {find_embedding(view.table.adata, embedding_key) for view in views}
        tables = [view.table.adata for view in views]
        n_features = int(first.section.features.shape[1])
    elif first.parts.embedding_key is None:
        return "", {}, 0
    else:
        keys = {view.parts.embedding_key or "" for view in views if view.parts is not None}
        tables = [view.parts.table.adata for view in views if view.parts is not None and view.parts.table is not None]
        n_features = int(first.parts.parts.require("features").shape[1])
    if len(keys) > 1:
        raise DataValueError(f"the sections hold different embeddings {sorted(keys)}; name one with embedding_key=")
    key = keys.pop()
    encoders = [from_uns(embedding_entry(table, key).get("encoder", {})) for table in tables]
    return (
        key,
        _shared(encoders, f"the encoder of {key!r}", "embed all of them with the same call of hx.pp.embed"),
        n_features,
    )


def _parts(views: list[SectionView], model: Model) -> dict[str, Any]:
    """What the parts were, for laying the same on other slides."""
    found = [view.parts for view in views if view.parts is not None]
    if not found:
        return {}
    sizes = {view.parts.size_um for view in found}
    if len(sizes) > 1:
        raise ModelMismatchError(
            f"the sections differ in the size of their parts ({sorted(map(str, sizes))}); lay them alike"
        )
    entry: dict[str, Any] = {"level": found[0].parts.level, "shapes": found[0].shapes_key, "size_um": sizes.pop()}
    if "colour" in model.needs:
        tables = [view.table.adata for view in found if view.table is not None]
        encoders = [from_uns(embedding_entry(table, Keys.COLOUR).get("encoder", {})) for table in tables]
        entry["colour"] = _shared(
            encoders, "the size of the colour tiles", "embed them with the same call of hx.pp.embed"
        )
    return entry


def _graph_arguments(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(entries[0].get("params", {}))


def _tiles(views: list[SectionView], embedding_key: str) -> dict[str, Any]:
    """Pitch, diameter and lattice of the training spots, for laying tiles on a slide without any."""
    lattices = [detect_lattice(view.section.coordinates) for view in views]
    known = [lattice for lattice in lattices if lattice is not None]
    if not known:
        return {}
    kinds = [lattice.kind for lattice in known]
    radii = [
        float(radius)
        for view in views
        if (radius := embedding_entry(view.table.adata, embedding_key).get("spot_radius_um")) is not None
    ]
    pitch = float(np.median([lattice.pitch for lattice in known]))
    diameter = 2 * float(np.median(radii)) if radii else pitch / 2
    return {"pitch_um": pitch, "lattice": max(set(kinds), key=kinds.count), "diameter_um": diameter}
