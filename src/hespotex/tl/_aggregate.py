"""Gather values of one level into another: nuclei or superpixels into spots, nuclei or regions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from .._keys import Keys, check_key
from .._logging import logger
from ..data.geometry import find_image_key, resolve_slide
from ..data.shares import aggregate as pooled
from ..data.stored import check_free, write_prediction
from ..data.tables import AnnotatedTable, is_derived, resolve_table, row_positions, table_role
from ..data.transaction import restored_on_error
from ..errors import DataValueError, MissingKeyError
from ._levels import new_table, note, share_of, source_of, training_of, write_table

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
        Prediction in the table `from_`; may be left out where there is one. A table without predictions gives its ``X``:
        counts, or values whose unit is not known, such as features of nuclei.
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
    source, values, genes, unit, name = source_of(sdata, from_, key)
    known = training_of(source.adata, name)
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
    share = share_of(sdata, slide, to_, chosen, fine, positions)
    gathered = pooled(share, values[rows], how).astype(np.float32)
    coverage = np.asarray(share.sum(axis=1)).ravel()
    if copy or table is None:
        result = new_table(sdata, slide, to_, chosen, gathered, genes)
        result.obs[Keys.derived(key_added, "coverage")] = coverage
        note(result, key_added, "X", unit, genes, function="aggregate", from_=from_, how=how, trained_on=known)
        if copy:
            return result
        write_table(sdata, result, Keys.prediction_table(key_added, to_))
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
        note(adata, key_added, form, unit, genes, function="aggregate", from_=from_, how=how, trained_on=known)
    logger.info("aggregate: %s of %r in %r; wrote %s[%r] of table %r", how, from_, to_, form, key_added, table.key)
    return None


def _target(sdata: SpatialData, to_: str) -> AnnotatedTable | None:
    """The measured table of the shapes, if there is one."""
    try:
        table = resolve_table(sdata, shapes_key=to_)
    except MissingKeyError:
        return None
    return table if table_role(table.key or "", table.adata) == "measured" else None
