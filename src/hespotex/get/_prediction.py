"""A stored prediction as an ordinary AnnData."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..data.counts import check_counts, counts_of, library_size
from ..data.stored import StoredPrediction, find_prediction, read_prediction
from ..data.units import UNITS, normalize
from ..errors import CountsError, HespotexWarning

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["prediction"]


def prediction(
    data: SpatialData | AnnData,
    key: str | None = None,
    *,
    table_key: str | None = None,
    counts_layer: str | None = None,
) -> AnnData:
    """The prediction `key` as an AnnData that any scanpy, squidpy or spatialdata-plot function takes.

    Parameters
    ----------
    data
        Object in which :func:`hespotex.tl.predict` stored the prediction.
    key
        Key of the prediction; may be omitted when there is only one.
    table_key
        Table to look in; all are searched by default.
    counts_layer
        Layer with the raw counts; ``X`` by default.

    Returns
    -------
    A new AnnData (n, G) that shares no memory with `data`: ``X`` the prediction (float32), ``var_names`` its genes,
    ``layers["measured"]`` the measurement in the same unit, NaN for genes that were not measured
    (``var["measured"]`` says which were); there is no such layer where none of the genes was measured, or where the
    unit divides by a panel that was not measured whole,
    ``layers["std"]``, ``layers["lower"]``, ``layers["upper"]`` where stored, and ``obs``, ``obsm``, ``obsp``,
    ``uns`` carried along. In ``uns["hespotex"]`` the unit and provenance of the prediction.

    Raises
    ------
    MissingKeyError
        If there is no such prediction, or no `counts_layer`.

    Warns
    -----
    HespotexWarning
        If the table holds no raw counts to compare with; there is no ``layers["measured"]`` then.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1600)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> model = hx.tl.train(sdata, "ridge", genes=sdata["table"].var_names[:20])
    >>> hx.tl.predict(sdata, model)
    >>> hx.get.prediction(sdata, "ridge").layers["measured"].shape == hx.get.prediction(sdata, "ridge").shape
    True
    """
    import pandas as pd
    from anndata import AnnData

    adata, _, key = find_prediction(data, key, table_key)
    stored = read_prediction(adata, key)
    measured = pd.Index(stored.genes).isin(adata.var_names) if stored.provenance["form"] != "X" else None
    var = pd.DataFrame(
        {"measured": False if measured is None else measured}, index=pd.Index(stored.genes, dtype=object)
    )
    if measured is not None:
        shared = adata.var.reindex(stored.genes)
        var = pd.concat([var, shared.drop(columns=["measured"], errors="ignore")], axis=1)
    result = AnnData(
        X=stored.values,
        obs=adata.obs,
        var=var,
        obsm={name: value for name, value in adata.obsm.items() if name != key},
        obsp=dict(adata.obsp),
        uns={name: value for name, value in adata.uns.items() if name != Keys.NAMESPACE},
    )
    for name, values in stored.companions.items():
        result.layers[name] = values
    if measured is not None and measured.any():
        layer = _measurement(adata, stored, measured, counts_layer)
        if layer is not None:
            result.layers[Keys.MEASURED] = layer
    result.uns[Keys.NAMESPACE] = {key: dict(stored.provenance)}
    return result.copy()  # until here it shares arrays with the object, which is not the caller's to change


def _measurement(
    adata: AnnData, stored: StoredPrediction, measured: np.ndarray, counts_layer: str | None
) -> np.ndarray | None:
    """The measurement in the unit of the prediction, (n, G) float32, NaN where not `measured`."""
    if stored.unit not in UNITS or (stored.unit == "log1p_cpm_panel" and not measured.all()):
        return None
    if adata.X is None and counts_layer is None:
        return None
    where = "X" if counts_layer is None else f"layers[{counts_layer!r}]"
    counts = counts_of(adata, counts_layer, "the table")
    try:
        check_counts(counts, where)
    except CountsError as error:
        warnings.warn(f"there is no measurement to compare with: {error}", HespotexWarning, stacklevel=3)
        return None
    values = np.full(stored.values.shape, np.nan, dtype=np.float32)
    columns = adata.var_names.get_indexer(stored.genes[measured])
    values[:, measured] = normalize(counts[:, columns], library_size(counts), stored.unit)
    return values
