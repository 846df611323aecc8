"""What a model reads of a slide, made where it is missing and checked where it is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._keys import Keys
from ..data.blockwise import check_fits
from ..data.bridge import embedding_entry
from ..data.provenance import from_uns
from ..data.tables import AnnotatedTable, is_derived, resolve_shapes_key, resolve_table
from ..encoders import identifying
from ..errors import MissingKeyError, ModelMismatchError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import Model, Recipe

__all__ = ["check_room", "encoder_of", "prepare"]


def prepare(
    data: SpatialData | AnnData,
    model: Model,
    *,
    table_key: str | None,
    shapes_key: str | None,
    image_key: str | None,
    weights: str | Path | None,
    batch_size: int | None,
    device: str | None,
    progress_bar: bool,
    n_genes: int | None,
) -> AnnotatedTable:
    """Run the ``pp`` steps that are missing, with the model's parameters; the table to predict for.

    Of `n_genes` a prediction has to fit into memory.
    """
    from anndata import AnnData

    from .. import pp

    recipe = model.recipe
    assert recipe is not None
    if isinstance(data, AnnData):
        table = resolve_table(data)
        check_room(table.adata.n_obs, n_genes, model)
        _check_embedding(table.adata, recipe)
        _require_on_anndata(table.adata, model, recipe)
        return table

    has_table = table_key is not None or any(
        "spatialdata_attrs" in t.uns and not is_derived(t) for t in data.tables.values()
    )
    if not has_table and shapes_key is None and Keys.TILES not in data.shapes:
        if not recipe.tiles:
            raise MissingKeyError(
                "the slide has no spots or tiles, and the model does not know the lattice of its training spots; lay "
                "tiles with hx.pp.make_tiles(sdata, diameter_um=..., pitch_um=...)"
            )
        if not {Keys.TISSUE, Keys.TISSUE_LAZYSLIDE} & set(data.shapes):
            pp.detect_tissue(data, image_key=image_key)
        pp.make_tiles(data, image_key=image_key, **recipe.tiles)
    if has_table and shapes_key is None:
        table_key = resolve_table(data, table_key=table_key).key  # all regions of the one measured table
    else:
        shapes_key = resolve_shapes_key(data, shapes_key, table_key)
    embedded = _table_of(data, shapes_key, table_key, recipe)
    # An embedding of hours must not come before the refusal of what it is for.
    check_room(len(data.shapes[str(shapes_key)]) if embedded is None else embedded.adata.n_obs, n_genes, model)
    if embedded is None or recipe.embedding_key not in embedded.adata.obsm:
        encoder, options = encoder_of(recipe, "the table", weights)
        pp.embed(
            data,
            encoder,
            image_key=image_key,
            shapes_key=shapes_key,
            table_key=table_key,
            batch_size=batch_size,
            device=device,
            key_added=recipe.embedding_key,
            progress_bar=progress_bar,
            **options,
        )
        embedded = _table_of(data, shapes_key, table_key, recipe)
    if embedded is None:
        raise MissingKeyError(f"no table annotates shapes_key={shapes_key!r}; make one with hx.pp.embed(sdata)")
    _check_embedding(embedded.adata, recipe)
    if "graph" in model.needs and Keys.CONNECTIVITIES not in embedded.adata.obsp:
        pp.spatial_graph(data, table_key=embedded.key, **recipe.graph)
    if "nuclei" in model.needs and recipe.nuclei and Keys.N_NUCLEI not in embedded.adata.obs:
        pp.segment_nuclei(
            data,
            image_key=image_key,
            shapes_key=shapes_key,
            table_key=embedded.key,
            progress_bar=progress_bar,
            **recipe.nuclei,
        )
    return resolve_table(data, table_key=embedded.key)


def _table_of(
    sdata: SpatialData, shapes_key: str | None, table_key: str | None, recipe: Recipe
) -> AnnotatedTable | None:
    """The table to predict for: the measured one, or the one that holds the embedding of tiles."""
    if table_key is not None:
        return resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    own = [
        name
        for name, table in sdata.tables.items()
        if "spatialdata_attrs" in table.uns
        and shapes_key in set(table.obs[table.uns["spatialdata_attrs"]["region_key"]])
    ]
    measured = [name for name in own if not is_derived(sdata.tables[name])]
    holding = [name for name in own if recipe.embedding_key in sdata.tables[name].obsm]
    if len(measured) > 1:
        return resolve_table(sdata, shapes_key=shapes_key)  # raises, listing the candidates
    for name in (*measured, *holding):
        return resolve_table(sdata, table_key=name, shapes_key=shapes_key)
    return None


def _check_embedding(adata: AnnData, recipe: Recipe) -> None:
    """Raise unless the stored embedding is the one the model was trained on."""
    key = recipe.embedding_key
    if key not in adata.obsm:
        raise MissingKeyError(
            f"obsm[{key!r}] is missing, which the model reads; obsm holds {sorted(adata.obsm)}. Make it with "
            "hx.pp.embed(sdata) on the SpatialData that holds the image"
        )
    width = adata.obsm[key].shape[1]
    if width != recipe.n_features:
        raise ModelMismatchError(
            f"obsm[{key!r}] has {width} features, the model was trained on {recipe.n_features}: another encoder or "
            "version; embed again with the model's own, under another key if you want to keep yours"
        )
    stored = from_uns(embedding_entry(adata, key).get("encoder", {}))
    trained = dict(recipe.encoder)
    if stored and trained and identifying(stored) != identifying(trained):
        differing = sorted(k for k in {*stored, *trained} if stored.get(k) != trained.get(k))
        shown = "; ".join(f"{k}: {stored.get(k)!r} here, {trained.get(k)!r} in training" for k in differing)
        raise ModelMismatchError(f"obsm[{key!r}] was made by another encoder setting than the model's ({shown})")


def _require_on_anndata(adata: AnnData, model: Model, recipe: Recipe) -> None:
    if "graph" in model.needs and Keys.CONNECTIVITIES not in adata.obsp:
        raise MissingKeyError(f"obsp[{Keys.CONNECTIVITIES!r}] is missing; make it with hx.pp.spatial_graph(adata)")
    if "nuclei" in model.needs and recipe.nuclei and Keys.N_NUCLEI not in adata.obs:
        raise MissingKeyError(
            f"obs[{Keys.N_NUCLEI!r}] is missing; make it with hx.pp.segment_nuclei(sdata) on the SpatialData"
        )


def encoder_of(recipe: Recipe, where: str, weights: str | Path | None) -> tuple[str, dict[str, Any]]:
    """Name and options of the encoder that the model was trained on, whose features `where` lacks.

    Raises
    ------
    MissingKeyError
        If the model does not know it.
    """
    if not recipe.encoder:
        raise MissingKeyError(
            f"{where} has no obsm[{recipe.embedding_key!r}] and the model does not know which encoder made it; store the same "
            "embedding there"
        )
    options = dict(recipe.encoder) | ({} if weights is None else {"weights": weights})
    return options.pop("name"), options


def check_room(n_obs: int, n_genes: int | None, model: Model) -> None:
    """Raise if a prediction of `n_genes` would not fit into memory; ``None`` goes to disk."""
    if n_genes is not None:
        check_fits(n_obs, n_genes, 2 if model.info.uncertainty else 1, "a prediction")
