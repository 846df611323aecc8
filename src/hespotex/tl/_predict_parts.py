"""Predict below the spot: nuclei, superpixels or positions between the spots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..data.blockwise import TableStore
from ..data.bridge import PartsWanted, SectionView, attributes, embedding_entry, views_of
from ..data.geometry import find_image_key, resolve_slide
from ..data.parts import PartsView, default_parts, parts_view
from ..data.provenance import from_uns
from ..data.section import Level, Prediction, Section
from ..data.stored import COMPANIONS
from ..data.tables import mark_table, resolve_table, table_role
from ..encoders import identifying
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError, ModelMismatchError
from ..models import Model, Recipe, create
from ._blocks import arrays_of, chosen_genes, record_prediction, store_blocks
from ._prepare import check_room, encoder_of
from ._train import fit_model

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["fit_untrained", "predict_parts"]

_SIZE_UM = 8.0  # of superpixels, where nothing says otherwise
_PLURAL: dict[str, str] = {"superpixel": "superpixels", "nucleus": "nuclei", "spot": "positions of a lattice"}


def fit_untrained(
    sdata: SpatialData | AnnData, name: str, genes: Sequence[str] | None, where_from: Mapping[str, Any]
) -> Model:
    """A method that has nothing to learn, made ready for the section at hand."""
    model = create(name)
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"{name!r} predicts below the spot and needs a SpatialData, got {type(sdata).__name__}")
    parts_key = where_from["parts_key"] or default_parts(model.level)
    recipe = Recipe(genes=(), unit="", parts={"level": model.level, "shapes": parts_key, "size_um": _SIZE_UM})
    _prepare(sdata, model, recipe, parts_key, image_key=where_from["image_key"])
    return fit_model([sdata], model, genes=genes, **where_from)


def predict_parts(
    sdata: SpatialData | AnnData,
    model: Model,
    recipe: Recipe,
    key: str,
    *,
    table_key: str | None,
    shapes_key: str | None,
    image_key: str | None,
    parts_key: str | None,
    counts_layer: str | None,
    genes: Sequence[str] | None,
    weights: str | Path | None,
    batch_size: int | None,
    block_rows: int,
    raster: bool,
    target: str | Path | None,
    progress_bar: bool,
) -> str:
    """Predict at all parts and write the result; returns the name of its table."""
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(
            f"{model.info.name!r} predicts below the spot and needs the SpatialData that holds the image and the nuclei or "
            f"superpixels, got {type(sdata).__name__}"
        )
    if block_rows < 1:
        raise DataValueError(f"block_rows={block_rows} must be at least 1")
    parts_key = parts_key or str(recipe.parts.get("shapes") or default_parts(model.level))
    panel, columns = chosen_genes(recipe, genes)
    name = Keys.prediction_table(key, parts_key)
    if name in sdata.tables and table_role(name, sdata.tables[name]) != "prediction":
        raise DataValueError(
            f"the prediction would replace table {name!r}, which is no prediction; choose another key_added="
        )
    options: dict[str, Any] = {"weights": weights, "batch_size": batch_size, "progress_bar": progress_bar}
    options["n_genes"] = len(panel) if target is None else None
    _prepare(sdata, model, recipe, parts_key, image_key=image_key, **options)
    wanted = PartsWanted(model.level, model.needs, parts_key, recipe.embedding_key or None)
    view, section = _section(sdata, model, recipe, wanted, table_key, shapes_key, image_key, counts_layer)
    _check(view, model, recipe)
    if raster and view.parts.grid is None:
        raise DataValueError(f"raster=True: shapes {parts_key!r} are no superpixels; only a grid makes an image")
    table = _new_table(view, panel)
    blocks = model.predict_blocks(section, block_rows=block_rows)
    if target is not None:
        _to_disk(target, sdata, view, table, name, key, blocks, columns, model, recipe, panel)
        return f"{target}"
    check_room(view.parts.n_parts, len(panel), model)
    _fill(table, key, blocks, columns)
    record_prediction(table, key, "X", model, recipe, panel, parts=view.shapes_key)
    mark_table(table, "prediction")
    sdata[name] = table
    if raster:
        from ..get import raster as to_raster

        to_raster(sdata, key, table_key=name, write=True)
    return name


def _prepare(
    sdata: SpatialData,
    model: Model,
    recipe: Recipe,
    parts_key: str,
    *,
    image_key: str | None,
    weights: str | Path | None = None,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    n_genes: int | None = None,
) -> None:
    """Run the ``pp`` steps that are missing, with the model's parameters; `n_genes` are to fit into memory."""
    from .. import pp

    image_key = image_key or find_image_key(sdata, shapes_key=parts_key if parts_key in sdata.shapes else None)
    if parts_key not in sdata.shapes:
        _lay(sdata, recipe, parts_key, image_key, progress_bar=progress_bar)
    held = _held(sdata, parts_key)
    if n_genes and not held:  # an embedding of hours must not come before the refusal of what it is for
        check_room(len(sdata.shapes[parts_key]), n_genes, model)
    shared: dict[str, Any] = {
        "image_key": image_key,
        "shapes_key": parts_key,
        "batch_size": batch_size,
        "progress_bar": progress_bar,
    }
    if "colour" in model.needs and Keys.COLOUR not in held:
        options = dict(
            recipe.parts.get("colour") or {"name": "rgb", "tile_um": recipe.parts.get("size_um") or _SIZE_UM}
        )
        pp.embed(sdata, options.pop("name"), key_added=Keys.COLOUR, **shared, **options)
    if "parts" in model.needs and recipe.embedding_key not in held:
        name, options = encoder_of(recipe, f"the table of shapes {parts_key!r}", weights)
        embed = pp.embed_nuclei if recipe.parts.get("level") == "nucleus" else pp.embed
        embed(sdata, name, key_added=recipe.embedding_key, **shared, **options)


def _lay(sdata: SpatialData, recipe: Recipe, parts_key: str, image_key: str, *, progress_bar: bool | None) -> None:
    """Make the parts that are not there yet."""
    from .. import pp

    level: Level = recipe.parts.get("level", "superpixel")
    if level == "nucleus":
        pp.segment_nuclei(sdata, image_key=image_key, key_added=parts_key, progress_bar=progress_bar, **recipe.nuclei)
    elif level == "superpixel":
        if not {Keys.TISSUE, Keys.TISSUE_LAZYSLIDE} & set(sdata.shapes):
            pp.detect_tissue(sdata, image_key=image_key)
        size_um = recipe.parts.get("size_um") or _SIZE_UM
        pp.superpixels(sdata, size_um, image_key=image_key, key_added=parts_key)
    else:
        raise MissingKeyError(
            f"shapes[{parts_key!r}] are not there (shapes: {list(sdata.shapes)}); lay the positions to predict at with "
            "hx.pp.densify(sdata), or name shapes with parts_key="
        )


def _held(sdata: SpatialData, parts_key: str) -> set[str]:
    """``obsm`` keys of the table that holds features of the parts."""
    try:
        return set(resolve_table(sdata, shapes_key=parts_key).adata.obsm)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        return set()


def _section(
    sdata: SpatialData,
    model: Model,
    recipe: Recipe,
    wanted: PartsWanted,
    table_key: str | None,
    shapes_key: str | None,
    image_key: str | None,
    counts_layer: str | None,
) -> tuple[PartsView, Section]:
    """The section as the model sees it: with its spots where the method is bound to them, else its parts alone."""
    with_expression = "expression" in model.needs
    if with_expression or model.info.task == "in-sample":
        # Its counts say which spots it was fitted on, also to a method that does not read them again.
        views = views_of(
            sdata,
            genes=recipe.genes,
            unit=recipe.unit,
            table_key=table_key,
            shapes_key=shapes_key,
            image_key=image_key,
            counts_layer=counts_layer or recipe.training.get("counts_layer"),
            min_counts=int(recipe.training.get("min_counts", 1)),
            parts=wanted,
        )
        view: SectionView = views[0]
        assert view.parts is not None
        return view.parts, view.section if with_expression else replace(view.section, targets=None)
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=wanted.key))
    parts = parts_view(
        sdata,
        slide,
        None,
        level=wanted.level,
        needs=wanted.needs,
        parts_key=wanted.key,
        embedding_key=wanted.embedding_key,
    )
    section = Section(
        name=str(attributes(sdata).get("name") or "section"),
        ids=np.empty(0, dtype=object),
        features=np.zeros((0, 0), dtype=np.float32),
        coordinates=np.zeros((0, 2)),
        parts=parts.parts,
    )
    return parts, section


def _check(view: PartsView, model: Model, recipe: Recipe) -> None:
    """Raise unless the parts and their features are such as the model was trained on."""
    trained_level = recipe.parts.get("level", view.parts.level)
    if "parts" in model.needs and trained_level != view.parts.level:
        raise ModelMismatchError(
            f"shapes {view.shapes_key!r} are {_PLURAL[view.parts.level]}, and the model was trained on "
            f"{_PLURAL[trained_level]}: what it learned of one says nothing of the other. Name such shapes with parts_key="
        )
    trained_size = recipe.parts.get("size_um")
    size = view.parts.size_um
    if trained_size and size and abs(size / trained_size - 1) > 0.01 and "parts" in model.needs:
        raise ModelMismatchError(
            f"shapes {view.shapes_key!r} are cells of {size:g} µm, the model was trained on {trained_size:g} µm; lay them anew: "
            f"hx.pp.superpixels(sdata, {trained_size:g}, key_added='superpixels_{trained_size:g}'), and name them with parts_key="
        )
    if "parts" not in model.needs or view.table is None:
        return
    stored = from_uns(embedding_entry(view.table.adata, recipe.embedding_key).get("encoder", {}))
    trained = dict(recipe.encoder)
    if stored and trained and identifying(stored) != identifying(trained):
        differing = sorted(k for k in {*stored, *trained} if stored.get(k) != trained.get(k))
        shown = "; ".join(f"{k}: {stored.get(k)!r} here, {trained.get(k)!r} in training" for k in differing)
        raise ModelMismatchError(
            f"obsm[{recipe.embedding_key!r}] of shapes {view.shapes_key!r} was made by another encoder setting than the model's "
            f"({shown})"
        )


def _new_table(view: PartsView, genes: Sequence[str]) -> AnnData:
    """An empty table of a prediction for the parts."""
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel

    ids = view.parts.ids
    obs = pd.DataFrame(
        {Keys.REGION: pd.Categorical([view.shapes_key] * len(ids)), Keys.PART_ID: ids},
        index=pd.Index(ids.astype(str), dtype=object),
    )
    if view.parts.grid is not None:
        obs[Keys.ARRAY_ROW], obs[Keys.ARRAY_COL] = view.parts.grid.T
    table = AnnData(
        obs=obs, var=pd.DataFrame(index=pd.Index(list(genes), dtype=object)), obsm={Keys.SPATIAL: view.pixels}
    )
    return TableModel.parse(table, region=view.shapes_key, region_key=Keys.REGION, instance_key=Keys.PART_ID)


def _fill(table: AnnData, key: str, blocks: Iterator[Prediction], columns: np.ndarray | None) -> None:
    """Put a prediction into its table, block by block."""
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for block in blocks:
        rows = slice(start, start + len(block.ids))
        start = rows.stop
        for name, part in arrays_of(block, columns):
            if name not in arrays:
                arrays[name] = np.empty((table.n_obs, *part.shape[1:]), dtype=np.float32)
            arrays[name][rows] = part
    _check_whole(start, table.n_obs)
    table.X = arrays.pop("mean")
    for name in COMPANIONS:
        if name in arrays:
            table.layers[Keys.derived(key, name)] = arrays[name]
    if "samples" in arrays:
        table.obsm[Keys.derived(key, "samples")] = arrays["samples"]
    if "latent" in arrays:
        table.obsm[Keys.embedding(key)] = arrays["latent"]
    if "ood" in arrays:
        table.obs[Keys.derived(key, "ood")] = arrays["ood"].ravel()


def _to_disk(
    target: str | Path,
    sdata: SpatialData,
    view: PartsView,
    table: AnnData,
    name: str,
    key: str,
    blocks: Iterator[Prediction],
    columns: np.ndarray | None,
    model: Model,
    recipe: Recipe,
    panel: Sequence[str],
) -> None:
    """Write a prediction to a store of its own, block by block; latent and samples are left out."""
    from spatialdata import SpatialData

    record_prediction(table, key, "X", model, recipe, panel, parts=view.shapes_key)
    mark_table(table, "prediction")
    skeleton = SpatialData.init_from_elements(
        {view.shapes_key: sdata.shapes[view.shapes_key], name: table}, attrs=dict(sdata.attrs)
    )
    with TableStore(target, skeleton, name) as store:
        _check_whole(store_blocks(store, key, blocks, columns, np.arange(table.n_obs)), table.n_obs)


def _check_whole(filled: int, n_obs: int) -> None:
    if filled != n_obs:
        raise ModelMismatchError(f"the model left {n_obs - filled} of {n_obs} parts without a prediction")
