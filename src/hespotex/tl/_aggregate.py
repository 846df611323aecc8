"""Gather values of one level into another: nuclei or superpixels into spots, nuclei or regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from .._keys import Keys, check_key
from .._logging import logger
from ..data.geometry import Slide, find_image_key, resolve_slide, shape_centres
from ..data.parts import Observed, share_matrix
from ..data.provenance import record
from ..data.shares import aggregate as pooled
from ..data.stored import check_free, prediction_keys, read_prediction, write_prediction
from ..data.tables import AnnotatedTable, is_derived, mark_table, resolve_table, row_positions, table_role
from ..data.transaction import restored_on_error
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["aggregate"]


def aggregate(
    sdata: SpatialData,
    from_: str,
    to_: str,
    *,
    key: str | None = None,
    how: Literal["sum", "mean"] | None = None,
    image_key: str | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Sum or average values of fine shapes over coarser ones.

    Sums are conserved: cells of a grid count by the area that both share, in units of a whole cell, all other shapes by
    whether their centre lies inside. Over shapes that cover everything once, totals stay what they were.

    Parameters
    ----------
    sdata
        Object that holds both.
    from_
        Table of the fine shapes, such as ``"istar_superpixels"``.
    to_
        Shapes to gather into: spots (circles), nuclei, or regions of any outline.
    key
        Prediction in the table `from_`; may be left out where there is one. A table without predictions gives its ``X``.
    how
        ``"sum"``, or ``"mean"`` of what lies inside (NaN where nothing does). By default sums of counts and means of
        every other unit, as sums of logarithms mean nothing.
    image_key
        Image that both lie on; may be left out where there is only one.
    key_added
        Key of the result; `key` by default, or the name of the table `from_`.
    copy
        Return the result in place of writing it.

    Returns
    -------
    The result, shapes × genes, if `copy`; else ``None`` and it is written as a prediction, in the forms that
    :func:`hespotex.tl.predict` has: to the measured table of `to_` where there is one, else to ``tables["<key>_<to_>"]``.
    ``obs["<key>_coverage"]`` tells how many whole parts lay in each of the shapes.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If a table, prediction or shapes are not there, or several are.
    DataValueError
        If sums of a unit other than counts are asked for, or the result would replace something else.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=20)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "interpolate")
    >>> hx.tl.aggregate(sdata, "interpolate_superpixels", "spots")
    >>> hx.get.prediction(sdata, "interpolate", table_key="table").n_obs == sdata["table"].n_obs
    True
    """
    source, values, genes, unit, name = _source(sdata, from_, key)
    if to_ not in sdata.shapes:
        raise MissingKeyError(f"to_={to_!r} is not among the shapes {list(sdata.shapes)}")
    how = how or ("sum" if unit == "counts" else "mean")
    if how == "sum" and unit != "counts":
        raise DataValueError(f"how='sum': table {from_!r} is in {unit!r}, of which sums mean nothing; take how='mean'")
    key_added = key_added or name
    check_key(key_added)
    fine = source.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=fine))
    rows, positions = row_positions(sdata, source, fine)
    table = _target(sdata, to_)
    chosen = np.arange(len(sdata.shapes[to_])) if table is None else row_positions(sdata, table, to_)[1]
    share = _share(sdata, slide, to_, chosen, fine, positions)
    gathered = pooled(share, values[rows], how).astype(np.float32)
    coverage = np.asarray(share.sum(axis=1)).ravel()
    if copy or table is None:
        result = _new_table(sdata, slide, to_, chosen, gathered, genes)
        result.obs[Keys.derived(key_added, "coverage")] = coverage
        _note(result, key_added, "X", unit, genes, from_, how)
        if copy:
            return result
        _write_table(sdata, result, Keys.prediction_table(key_added, to_))
        return None
    adata = table.adata
    if is_derived(adata):
        raise DataValueError(f"table {table.key!r} of shapes {to_!r} holds predictions or features; take copy=True")
    check_free(adata, key_added)
    with restored_on_error(sdata):
        full = np.full((adata.n_obs, len(genes)), np.nan, dtype=np.float32)
        full[row_positions(sdata, table, to_)[0]] = gathered
        form = write_prediction(adata, key_added, full, tuple(genes), {}, own_table=False)
        covered = np.full(adata.n_obs, np.nan)
        covered[row_positions(sdata, table, to_)[0]] = coverage
        adata.obs[Keys.derived(key_added, "coverage")] = covered
        _note(adata, key_added, form, unit, genes, from_, how)
    logger.info("aggregate: %s of %r in %r; wrote %s[%r] of table %r", how, from_, to_, form, key_added, table.key)
    return None


def _source(
    sdata: SpatialData, from_: str, key: str | None
) -> tuple[AnnotatedTable, np.ndarray | sparse.csr_array, list[str], str, str]:
    """Table, values (n, G), genes, unit and name of what is gathered."""
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(
            f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the shapes of both levels"
        )
    if from_ not in sdata.tables:
        own = [name for name in sdata.tables if name.endswith(f"_{from_}")]
        hint = f"; did you mean one of {own}?" if own else ""
        raise MissingKeyError(f"from_={from_!r} is not among the tables {list(sdata.tables)}{hint}")
    source = resolve_table(sdata, table_key=from_)
    if len(source.regions) > 1:
        raise AmbiguousKeyError(f"table {from_!r} annotates several shapes {list(source.regions)}; split it first")
    keys = prediction_keys(source.adata)
    if key is None and len(keys) > 1:
        raise AmbiguousKeyError(f"table {from_!r} holds several predictions {keys}; name one with key=")
    if key is None and not keys:
        if source.adata.X is None or source.adata.n_vars == 0:
            raise MissingKeyError(f"table {from_!r} holds neither a prediction nor values in X")
        values = source.adata.X
        plain = sparse.csr_array(values) if sparse.issparse(values) else np.asarray(values)
        return source, plain, list(source.adata.var_names), "counts", from_
    name = key or keys[0]
    stored = read_prediction(source.adata, name)
    return source, stored.values, list(stored.genes), stored.unit, name


def _target(sdata: SpatialData, to_: str) -> AnnotatedTable | None:
    """The measured table of the shapes, if there is one."""
    try:
        table = resolve_table(sdata, shapes_key=to_)
    except MissingKeyError:
        return None
    return table if table_role(table.key or "", table.adata) == "measured" else None


def _share(
    sdata: SpatialData, slide: Slide, to_: str, chosen: np.ndarray, fine: str, positions: np.ndarray
) -> sparse.csr_array:
    shapes = sdata.shapes[fine]
    size_um = float(shapes[Keys.SIZE_UM].iloc[0]) if Keys.SIZE_UM in shapes else None
    pixels = shape_centres(sdata, fine, slide)[positions]
    return share_matrix(sdata, slide, Observed(to_, chosen), fine, positions, pixels, size_um)


def _new_table(
    sdata: SpatialData, slide: Slide, to_: str, chosen: np.ndarray, values: np.ndarray, genes: Sequence[str]
) -> AnnData:
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel

    ids = sdata.shapes[to_].index.to_numpy()[chosen]
    obs = pd.DataFrame(
        {Keys.REGION: pd.Categorical([to_] * len(ids)), Keys.PART_ID: ids},
        index=pd.Index(ids.astype(str), dtype=object),
    )
    table = AnnData(
        X=values,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(list(genes), dtype=object)),
        obsm={Keys.SPATIAL: shape_centres(sdata, to_, slide)[chosen]},
    )
    return TableModel.parse(table, region=to_, region_key=Keys.REGION, instance_key=Keys.PART_ID)


def _note(adata: AnnData, key: str, form: str, unit: str, genes: Sequence[str], from_: str, how: str) -> None:
    record(
        adata,
        key,
        kind="prediction",
        form=form,
        unit=unit,
        genes=list(genes),
        model=key,
        aggregated_from=from_,
        how=how,
        created_by="hespotex.tl.aggregate",
    )


def _write_table(sdata: SpatialData, table: AnnData, name: str) -> None:
    if name in sdata.tables and table_role(name, sdata.tables[name]) != "prediction":
        raise DataValueError(
            f"the result would replace table {name!r}, which is no prediction; choose another key_added="
        )
    mark_table(table, "prediction")
    sdata[name] = table
    logger.info("aggregate: wrote table %r", name)
