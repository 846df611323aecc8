"""What functions that carry values between levels share: reading, overlaps, and writing a table of shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .._keys import Keys
from .._logging import logger
from ..data.counts import check_counts
from ..data.geometry import Slide, shape_centres
from ..data.parts import Observed, share_matrix
from ..data.provenance import read_record, record
from ..data.stored import prediction_keys, read_prediction
from ..data.tables import AnnotatedTable, mark_table, resolve_table, table_role
from ..errors import AmbiguousKeyError, CountsError, DataTypeError, DataValueError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["UNKNOWN", "new_table", "note", "share_of", "source_of", "training_of", "write_table"]

UNKNOWN = "unknown"  # unit of values that are neither a prediction nor counts, such as features of nuclei


def source_of(
    sdata: SpatialData, from_: str, key: str | None
) -> tuple[AnnotatedTable, np.ndarray | sparse.csr_array, list[str], str, str]:
    """Table, values (n, G), genes, unit (:data:`UNKNOWN` for an ``X`` that is no counts) and name of what is gathered."""
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
        try:
            check_counts(plain)
        except CountsError:
            return source, plain, list(source.adata.var_names), UNKNOWN, from_
        return source, plain, list(source.adata.var_names), "counts", from_
    name = key or keys[0]
    stored = read_prediction(source.adata, name)
    return source, stored.values, list(stored.genes), stored.unit, name


def share_of(
    sdata: SpatialData, slide: Slide, to_: str, chosen: np.ndarray, fine: str, positions: np.ndarray
) -> sparse.csr_array:
    """How much of each fine shape lies in each of the `chosen` shapes, (n, m)."""
    shapes = sdata.shapes[fine]
    size_um = float(shapes[Keys.SIZE_UM].iloc[0]) if Keys.SIZE_UM in shapes else None
    pixels = shape_centres(sdata, fine, slide)[positions]
    return share_matrix(sdata, slide, Observed(to_, chosen), fine, positions, pixels, size_um)


def new_table(
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


def note(
    adata: AnnData,
    key: str,
    form: str,
    unit: str,
    genes: Sequence[str],
    *,
    function: str,
    from_: str,
    how: str,
    trained_on: Mapping[str, Any] | None = None,
) -> None:
    """Record a prediction that `function` made from the table `from_`; `trained_on` is what :func:`training_of` told."""
    record(
        adata,
        key,
        kind="prediction",
        form=form,
        unit=unit,
        genes=list(genes),
        model=key,
        made_from=from_,
        how=how,
        created_by=f"hespotex.tl.{function}",
        **(trained_on or {}),
    )


def training_of(adata: AnnData, key: str) -> dict[str, list[str]]:
    """Sections and patients that a prediction knows the counts of: what is made of it knows them, too."""
    entry = read_record(adata, key)
    return {name: list(entry[name]) for name in ("training_sections", "training_patients") if name in entry}


def write_table(sdata: SpatialData, table: AnnData, name: str) -> None:
    if name in sdata.tables and table_role(name, sdata.tables[name]) != "prediction":
        raise DataValueError(
            f"the result would replace table {name!r}, which is no prediction; choose another key_added="
        )
    mark_table(table, "prediction")
    sdata[name] = table
    logger.info("wrote table %r", name)
