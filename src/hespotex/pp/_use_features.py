"""Features that another tool computed, as an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys, check_key
from .._logging import logger
from ..data.provenance import digest, record
from ..data.tables import AnnotatedTable, is_derived, mark_table, resolve_table, row_positions
from ..data.transaction import restored_on_error
from ..errors import DataTypeError, DataValueError, MissingKeyError
from ._free import check_slot_free
from ._places import resolve_places, spot_radius

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["use_features"]


def use_features(
    sdata: SpatialData,
    features_key: str,
    *,
    table_key: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> np.ndarray | None:
    """Take the features that another tool computed, such as LazySlide's, as an embedding: nothing is embedded again.

    Nobody can tell from the numbers which network they are of and how the tiles were read. A model that is trained on
    them therefore only asks, when it predicts, for as many features under the same key: make those in the same way.

    Parameters
    ----------
    sdata
        Object with the tiles or spots, their image, and the features.
    features_key
        Table whose ``X`` are the features of these shapes, such as the ``"<model>_tiles"`` of
        ``lazyslide.tl.feature_extraction``.
    table_key
        Table of the same shapes to write to; by default their measured table, and where nothing was measured the table
        of the features itself.
    image_key
        Name in ``sdata.images``; may be left out where the shapes lie on only one.
    key_added
        Key in ``obsm``; ``"X_<model>"`` by default.
    copy
        Return the features, in the order of that table, in place of writing them.

    Returns
    -------
    The features (n, d) if `copy`, else ``None`` and these are written to the table:

    ``obsm["X_<model>"]``
        Features, float32 (n, d).
    ``uns["hespotex"]["X_<model>"]``
        Where they are from, scale of the image, versions.

    Raises
    ------
    MissingKeyError
        If there is no such table, or it lacks rows for some of the shapes.
    DataValueError
        If features are not finite, or `key_added` is taken by something that this function did not make.

    See Also
    --------
    hespotex.pp.embed

    Examples
    --------
    >>> import hespotex as hx
    >>> zs.tl.feature_extraction(wsi, "uni")  # doctest: +SKIP
    >>> hx.pp.use_features(wsi, "uni_tiles")  # doctest: +SKIP
    >>> hx.tl.predict(wsi, "her2.hx")  # doctest: +SKIP
    """
    if not hasattr(sdata, "tables"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}")
    source = resolve_table(sdata, table_key=features_key)
    table = _target(sdata, source, table_key)
    key = Keys.embedding(features_key.removesuffix(f"_{source.regions[0]}")) if key_added is None else key_added
    check_key(key)
    places = resolve_places(sdata, table, image_key)
    features = _rows_of(sdata, source, table)
    if copy:
        return features
    check_slot_free(table.adata, "obsm", key, maker="use_features")
    with restored_on_error(sdata):
        table.adata.obsm[key] = features
        if table.key == source.key:
            mark_table(table.adata, "embedding")
        record(
            table.adata,
            key,
            created_by="hespotex.pp.use_features",
            encoder={},
            features=features_key,
            slide_mpp=float(np.median([place.slide.mpp for place in places])),
            spot_radius_um=spot_radius(sdata, places),
            identity=digest(features),
        )
    logger.info("use_features: %d × %d features; wrote obsm[%r] of table %r", *features.shape, key, table.key)
    return None


def _target(sdata: SpatialData, source: AnnotatedTable, table_key: str | None) -> AnnotatedTable:
    """The table named, that measured on the same shapes, or the features' own."""
    if table_key is not None:
        return resolve_table(sdata, table_key=table_key)
    measured = [name for name, adata in sdata.tables.items() if name != source.key and not is_derived(adata)]
    for name in measured:
        if "spatialdata_attrs" not in sdata.tables[name].uns:
            continue
        table = resolve_table(sdata, table_key=name)
        if set(table.regions) <= set(source.regions):
            return table
    return source


def _rows_of(sdata: SpatialData, source: AnnotatedTable, table: AnnotatedTable) -> np.ndarray:
    """Features of the rows of `table`, float32 (n, d)."""
    from scipy import sparse

    x = source.adata.X
    if x is None or source.adata.n_vars == 0:
        raise DataValueError(f"X of table {source.key!r} holds no features")
    order = np.empty(table.adata.n_obs, dtype=np.int64)
    for region in table.regions:
        if region not in source.regions:
            raise MissingKeyError(f"features_key={source.key!r} annotates {list(source.regions)}, not {region!r}")
        row_of_shape = np.full(len(sdata.shapes[region]), -1)
        rows, positions = row_positions(sdata, source, region)
        row_of_shape[positions] = rows
        own, positions = row_positions(sdata, table, region)
        order[own] = row_of_shape[positions]
    if (order < 0).any():
        raise MissingKeyError(
            f"features_key={source.key!r} lacks {int((order < 0).sum())} of the {len(order)} rows of table {table.key!r}"
        )
    values = np.asarray((x.toarray() if sparse.issparse(x) else np.asarray(x))[order], dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataValueError(f"features_key={source.key!r}: X holds NaN or infinite features")
    return values
