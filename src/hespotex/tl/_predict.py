"""Predict expression from the image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys, check_key, sanitize
from .._logging import logger
from .._settings import settings
from ..data.blockwise import TableStore, check_target
from ..data.bridge import SectionView, as_list, attributes, views_of
from ..data.stored import COMPANIONS, check_free, write_prediction
from ..data.tables import is_derived, mark_table
from ..data.transaction import restored_on_error
from ..errors import DataTypeError, DataValueError, HespotexWarning, MissingKeyError, ModelMismatchError
from ..models import Model, Recipe, get
from ..models._registry import names
from ..models._store import recall
from ._blocks import arrays_of, chosen_genes, record_prediction, store_blocks
from ._predict_parts import fit_untrained, predict_parts
from ._prepare import prepare

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..data.tables import AnnotatedTable

__all__ = ["predict"]


def predict(
    data: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    model: Model | str | Path | None = None,
    *,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    parts_key: str | None = None,
    counts_layer: str | None = None,
    genes: Sequence[str] | None = None,
    mpp: float | None = None,
    weights: str | Path | None = None,
    batch_size: int | None = None,
    block_rows: int = 8192,
    device: str | None = None,
    key_added: str | None = None,
    raster: bool = False,
    target: str | Path | None = None,
    copy: bool = False,
    progress_bar: bool | None = None,
    **options: Any,
) -> AnnData | list[AnnData] | None:
    """Predict the expression of every spot (or tile), nucleus or superpixel.

    Steps the model needs and the object lacks are run first, with the parameters the model was trained with:
    tissue and tiles on a slide without spots, the embedding, the neighbour graph, the nuclei, the superpixels. Measured
    expression, where there is any, is looked at by in-sample methods alone: those that
    :func:`hespotex.models.available` lists with the need ``"expression"``.

    Parameters
    ----------
    data
        One or many slides. An AnnData suffices when the embedding (and what else the model needs) is there.
    model
        The fitted model, the folder it was saved to, the name of a method that needs no training (such as ``"tesla"``),
        or ``None`` for the one the object names (written by :func:`hespotex.tl.train`), else
        ``hx.settings.default_model``.
    table_key, shapes_key, image_key
        What to predict for; each may be left out where there is one candidate.
    parts_key
        For methods below the spot, the shapes to predict at; those of the model's training by default.
    counts_layer
        Raw counts for in-sample methods; ``X`` by default.
    genes
        Genes to keep of the model's, in this order; all by default.
    mpp
        µm per pixel of the image, where the object does not say.
    weights
        Local weights file of the encoder, where the embedding has to be made and needs one.
    batch_size
        Tiles embedded at a time.
    device
        Where to embed and predict; the setting by default.
    block_rows
        Observations predicted at a time.
    key_added
        Key of the prediction; the model's name by default.
    raster
        Write a superpixel prediction as an image, too.
    target
        Folder of a zarr store, for a prediction that is larger than memory: it is written there block by block as a
        SpatialData with the shapes and one table ``"<key>_<shapes>"``, without latent representation, samples and domain
        score, and `data` stays as it is. It appears only when whole.
    copy
        Return the prediction as AnnData and leave `data` as it was.
    progress_bar
        Whether to show progress.
    options
        Settings of prediction that the model has, such as ``n_samples=50`` of a generative one.

    Returns
    -------
    ``None``, or with ``copy=True`` what :func:`hespotex.get.prediction` returns (a list for several slides).
    Written otherwise, (n, G) float32 each:

    ``layers[key]``
        if the model predicts just the genes of the table,
    ``obsm[key]``
        if it predicts some of them or others (genes in ``uns["hespotex"][key]["genes"]``),
    ``tables["<key>_<shapes>"]``
        if nothing was measured on these shapes, as for tiles, nuclei and superpixels,
    ``images["<key>_<shapes>_raster"]``
        (genes, y, x) with ``raster=True``; NaN off tissue,
    ``<key>_std``, ``<key>_lower``, ``<key>_upper``
        beside it, where the model gives them,
    ``obsm["<key>_samples"]``
        (n, genes, draws), where a generative model was asked for them,
    ``obs["<key>_ood"]``, ``obsm["X_<key>"]``
        domain score and latent representation, where the model gives them,
    ``uns["hespotex"][key]``
        unit, genes, model id, versions.

    Raises
    ------
    MissingKeyError
        If no model is named anywhere; the ways to name one are listed.
    ModelMismatchError
        If the embedding of the object is not the one the model was trained on, or an in-sample method was fitted on
        another section.
    DataValueError
        If the result would not fit into memory; `genes` and `target` are the ways out.

    See Also
    --------
    hespotex.tl.train, hespotex.get.prediction

    Examples
    --------
    >>> import hespotex as hx
    >>> train, test = hx.datasets.synthetic(n_patients=2, size_px=1600)
    >>> hx.pp.embed(train, "morphology", progress_bar=False)
    >>> model = hx.tl.train(train, "ridge", genes=train["table"].var_names[:20])
    >>> hx.tl.predict(test, model)
    >>> hx.get.prediction(test, "ridge").n_vars
    20
    """
    items = as_list(data, "data")
    several = not (len(items) == 1 and items[0] is data)
    shown = settings.progress_bar if progress_bar is None else progress_bar
    results: list[AnnData] = []
    if target is not None and (several or copy or raster):
        raise DataValueError("target= takes one object at a time, and neither copy=True nor raster=True")
    if target is not None:
        check_target(target)
    for item in items:
        where_from: dict[str, Any] = {
            "table_key": table_key,
            "shapes_key": shapes_key,
            "image_key": image_key,
            "parts_key": parts_key,
            "counts_layer": counts_layer,
        }
        apart = copy or target is not None
        own = _shallow_copy(item) if apart else item
        with (
            restored_on_error(own),
            settings.override(device=device or settings.device),
            _scaled(own, mpp, image_key, keep=not apart),
        ):
            chosen = _resolve_model(own, model, genes, where_from)
            chosen = chosen.with_options(**options) if options else chosen
            if chosen.recipe is None:
                raise ModelMismatchError(
                    "model was fitted on bare sections and does not know how to prepare data; "
                    "fit it with hx.tl.train(sdatas, model)"
                )
            key = sanitize(chosen.info.name) if key_added is None else key_added
            check_key(key)
            if chosen.reads_parts:
                where = predict_parts(
                    own,
                    chosen,
                    chosen.recipe,
                    key,
                    genes=genes,
                    weights=weights,
                    batch_size=batch_size,
                    block_rows=block_rows,
                    raster=raster,
                    target=target,
                    progress_bar=shown,
                    **where_from,
                )
            elif raster or parts_key is not None:
                raise DataValueError(
                    f"raster= and parts_key= are for methods below the spot; {chosen.info.name!r} predicts spots"
                )
            else:
                if target is not None:
                    _check_has_shapes(own)
                panel, columns = chosen_genes(chosen.recipe, genes)
                table = prepare(
                    own,
                    chosen,
                    table_key=table_key,
                    shapes_key=shapes_key,
                    image_key=image_key,
                    weights=weights,
                    batch_size=batch_size,
                    device=device,
                    progress_bar=shown,
                    n_genes=len(panel) if target is None else None,
                )
                if block_rows < 1:
                    raise DataValueError(f"block_rows={block_rows} must be at least 1")
                if target is not None:
                    _predict_to_disk(own, table, chosen, key, image_key, block_rows, panel, columns, target)
                    where = f"{target}"
                else:
                    where = _predict_one(own, table, chosen, key, image_key, block_rows, panel, columns)
        logger.info("predicted %d genes with %s: %s", len(chosen.genes), chosen.info.name, where)
        if copy:
            from ..get import prediction

            results.append(prediction(own, key, table_key=where.partition(":")[0] or None))
    if not copy:
        return None
    return results if several else results[0]


@contextmanager
def _scaled(data: SpatialData | AnnData, mpp: float | None, image_key: str | None, *, keep: bool) -> Iterator[None]:
    """Give the image its scale; taken back after an error, or if it is not to stay.

    Elements carry their transformations, so that those of a container of its own are the user's.
    """
    if mpp is None or not hasattr(data, "shapes"):
        yield
        return
    from spatialdata.transformations import get_transformation, set_transformation

    from ..pp import set_scale

    before = [
        (element, dict(get_transformation(element, get_all=True))) for _, _, element in data.gen_spatial_elements()
    ]
    done = False
    try:
        set_scale(data, mpp=mpp, image_key=image_key)
        yield
        done = True
    finally:
        if not (done and keep):
            for element, transformations in before:
                set_transformation(element, transformations, set_all=True)


def _resolve_model(
    data: SpatialData | AnnData,
    model: Model | str | Path | None,
    genes: Sequence[str] | None,
    where_from: Mapping[str, Any],
) -> Model:
    if isinstance(model, str) and not Path(model).exists() and model in names() and not get(model).info.trained:
        return fit_untrained(data, model, genes, where_from)
    if isinstance(model, Model):
        if not model.is_fitted:
            raise ModelMismatchError(f"this {model.info.name!r} model is not fitted; call hx.tl.train first")
        return model
    if model is not None and not isinstance(model, str | Path):
        raise DataTypeError(f"model must be a fitted model or the path of a saved one, got {type(model).__name__}")
    name = model or attributes(data).get("model") or settings.default_model
    if name is None:
        raise MissingKeyError(
            "model is not given and the object names none. Give a fitted model or the path of a saved one "
            "(hx.tl.predict(sdata, model)), train on this object (hx.tl.train), or set hx.settings.default_model"
        )
    return recall(name)


def _shallow_copy(data: SpatialData | AnnData) -> SpatialData | AnnData:
    """A container of its own around the same arrays, so that what is added does not reach the original."""
    from anndata import AnnData
    from spatialdata import SpatialData

    def own(adata: AnnData) -> AnnData:
        mappings = {name: dict(getattr(adata, name)) for name in ("obsm", "varm", "obsp", "varp")}
        layers = {name: value for name, value in adata.layers.items() if name is not None}
        uns = dict(adata.uns)
        uns[Keys.NAMESPACE] = dict(uns.get(Keys.NAMESPACE, {}))
        return AnnData(X=adata.X, obs=adata.obs.copy(), var=adata.var.copy(), uns=uns, layers=layers, **mappings)

    if isinstance(data, AnnData):
        return own(data)
    elements = {name: element for _, name, element in data.gen_spatial_elements()}
    tables = {name: own(table) for name, table in data.tables.items()}
    return SpatialData.init_from_elements({**elements, **tables}, attrs={**data.attrs})


def _check_has_shapes(data: SpatialData | AnnData) -> None:
    if not hasattr(data, "shapes"):
        raise DataTypeError(
            f"target= writes a SpatialData with the shapes that are predicted, and {type(data).__name__} holds none; give the "
            "SpatialData"
        )


def _views(
    data: SpatialData | AnnData, table: AnnotatedTable, model: Model, recipe: Recipe, image_key: str | None
) -> list[SectionView]:
    return views_of(
        data,
        table_key=table.key,
        image_key=image_key,
        embedding_key=recipe.embedding_key,
        with_edges="graph" in model.needs,
    )


def _predict_to_disk(
    data: SpatialData,
    table: AnnotatedTable,
    model: Model,
    key: str,
    image_key: str | None,
    block_rows: int,
    panel: tuple[str, ...],
    columns: np.ndarray | None,
    target: str | Path,
) -> None:
    """Predict all rows of `table` into a store of their own, which holds them and their shapes."""
    from spatialdata import SpatialData

    assert model.recipe is not None
    views = _views(data, table, model, model.recipe, image_key)
    name = Keys.prediction_table(key, table.regions[0])
    fresh = _new_table(table, panel, views)
    record_prediction(fresh, key, "X", model, model.recipe, panel)
    mark_table(fresh, "prediction")
    shapes = {region: data.shapes[region] for region in table.regions}
    skeleton = SpatialData.init_from_elements({**shapes, name: fresh}, attrs=dict(data.attrs))
    with TableStore(target, skeleton, name) as store:
        written = 0
        for view in views:
            blocks = model.predict_blocks(view.section, block_rows=block_rows)
            written += store_blocks(store, key, blocks, columns, view.rows)
        _check_whole(written, fresh.n_obs)


def _check_whole(filled: int, n_obs: int) -> None:
    if filled != n_obs:
        raise ModelMismatchError(f"the model left {n_obs - filled} of {n_obs} observations without a prediction")


def _predict_one(
    data: SpatialData | AnnData,
    table: AnnotatedTable,
    model: Model,
    key: str,
    image_key: str | None,
    block_rows: int,
    panel: tuple[str, ...],
    columns: np.ndarray | None,
) -> str:
    """Predict all rows of `table` and write the result; returns where it went."""
    recipe = model.recipe
    assert recipe is not None
    adata = table.adata
    if not is_derived(adata):
        check_free(adata, key)
    views = _views(data, table, model, recipe, image_key)
    arrays = _fill(model, views, adata.n_obs, block_rows, columns)
    values = arrays.pop("mean")
    companions = {name: arrays[name] for name in COMPANIONS if name in arrays}
    own_table = table.key is not None and is_derived(adata)
    name = table.key
    if own_table:
        name = Keys.prediction_table(key, table.regions[0])
        adata = _new_table(table, panel, views)
    missing = [gene for gene in panel if gene not in adata.var_names]
    if missing and not own_table:
        warnings.warn(
            f"{len(missing)} of the model's {len(panel)} genes were not measured in this section; they are "
            f"predicted all the same: {', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}",
            HespotexWarning,
            stacklevel=3,
        )
    form = write_prediction(adata, key, values, panel, companions, own_table=own_table)
    if "latent" in arrays:
        adata.obsm[Keys.embedding(key)] = arrays["latent"]
    if "ood" in arrays:
        adata.obs[Keys.derived(key, "ood")] = arrays["ood"].ravel()
    if "samples" in arrays:
        adata.obsm[Keys.derived(key, "samples")] = arrays["samples"]
    record_prediction(adata, key, form, model, recipe, panel)
    if own_table:
        assert name is not None
        mark_table(adata, "prediction")
        data[name] = adata  # type: ignore[index]
    return f"{name or ''}:{form}[{key!r}]"


def _fill(
    model: Model, views: list[SectionView], n_obs: int, block_rows: int, columns: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Predictions of all views in the rows of their table, block by block."""
    arrays: dict[str, np.ndarray] = {}
    filled = np.zeros(n_obs, dtype=bool)
    for view in views:
        start = 0
        for block in model.predict_blocks(view.section, block_rows=block_rows):
            rows = view.rows[start : start + len(block.ids)]
            start += len(block.ids)
            for name, part in arrays_of(block, columns):
                if name not in arrays:
                    arrays[name] = np.empty((n_obs, *part.shape[1:]), dtype=np.float32)
                arrays[name][rows] = part
            filled[rows] = True
    _check_whole(int(filled.sum()), n_obs)
    return arrays


def _new_table(table: AnnotatedTable, genes: Sequence[str], views: list[SectionView]) -> AnnData:
    """An empty table of predictions for the shapes that `table` annotates."""
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel, get_table_keys

    source = table.adata
    region, region_key, instance_key = get_table_keys(source)
    obs = source.obs[[region_key, instance_key]].copy()
    pixels = np.empty((source.n_obs, 2))
    for view in views:
        pixels[view.rows] = view.section.extras["pixel"]
    fresh = AnnData(
        obs=obs,
        var=pd.DataFrame(index=pd.Index(list(genes), dtype=object)),
        obsm={Keys.SPATIAL: pixels},
        obsp=dict(source.obsp),
    )
    return TableModel.parse(fresh, region=region, region_key=region_key, instance_key=instance_key)
