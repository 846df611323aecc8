"""The three forms in which a prediction is stored, written and read in one place.

``layers[key]`` when the prediction covers just the genes of the table, ``obsm[key]`` with the gene names in
``uns`` when it covers some of them or others, and a table of its own (``X``) when nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..errors import AmbiguousKeyError, DataValueError, MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = [
    "COMPANIONS",
    "StoredPrediction",
    "check_free",
    "find_prediction",
    "prediction_keys",
    "read_prediction",
    "write_prediction",
]

COMPANIONS = ("std", "lower", "upper")


@dataclass(frozen=True, eq=False)
class StoredPrediction:
    """A prediction as read back: values (n, G), gene names, unit, companions and provenance."""

    values: np.ndarray
    genes: np.ndarray
    unit: str
    companions: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any]


def prediction_keys(adata: AnnData) -> list[str]:
    """Keys of the predictions stored in `adata`."""
    entries = adata.uns.get(Keys.NAMESPACE, {})
    return [key for key, entry in entries.items() if isinstance(entry, Mapping) and entry.get("kind") == "prediction"]


def check_free(adata: AnnData, key: str) -> None:
    """Raise if a prediction `key` would replace what no prediction left there.

    Raises
    ------
    DataValueError
        Naming what is in the way.
    """
    if key in prediction_keys(adata):
        return
    names = (key, *(Keys.derived(key, companion) for companion in (*COMPANIONS, "samples")))
    held = [f"layers[{name!r}]" for name in names if name in adata.layers]
    held += [f"obsm[{name!r}]" for name in (*names, Keys.embedding(key)) if name in adata.obsm]
    held += [f"obs[{name!r}]" for name in (Keys.derived(key, "ood"),) if name in adata.obs]
    if held or key in adata.uns.get(Keys.NAMESPACE, {}):
        there = held[0] if held else f"uns[{Keys.NAMESPACE!r}][{key!r}]"
        raise DataValueError(
            f"a prediction under the key {key!r} would replace {there}, which is no prediction; choose another key_added="
        )


def write_prediction(
    adata: AnnData,
    key: str,
    values: np.ndarray,
    genes: tuple[str, ...],
    companions: Mapping[str, np.ndarray],
    *,
    own_table: bool,
) -> str:
    """Store (n, G) float32 `values` under `key`; returns the form chosen (``"X"``, ``"layers"`` or ``"obsm"``).

    Provenance, which makes the prediction findable, is the caller's next step.
    """
    import pandas as pd

    form = "X" if own_table else "layers" if set(genes) == set(map(str, adata.var_names)) else "obsm"
    if form == "layers":
        order = pd.Index(genes).get_indexer(adata.var_names)
        values = values[:, order]
        companions = {name: array[:, order] for name, array in companions.items()}
    for mapping in (adata.layers, adata.obsm):  # an earlier prediction of the key may have had another form, or more
        for name in (key, *(Keys.derived(key, companion) for companion in (*COMPANIONS, "samples"))):
            if name in mapping:
                del mapping[name]
    if (ood := Keys.derived(key, "ood")) in adata.obs:
        del adata.obs[ood]
    target = adata.obsm if form == "obsm" else adata.layers
    if own_table:
        adata.X = values
    else:
        target[key] = values
    for name, array in companions.items():
        target[Keys.derived(key, name)] = array
    return form


def _candidates(data: SpatialData | AnnData, table_key: str | None) -> Iterator[tuple[str | None, AnnData]]:
    from anndata import AnnData

    if isinstance(data, AnnData):
        yield None, data
    elif table_key is not None:
        if table_key not in data.tables:
            raise MissingKeyError(f"table_key={table_key!r} is not in the object; tables: {sorted(data.tables)}")
        yield table_key, data.tables[table_key]
    else:
        yield from data.tables.items()


def find_prediction(
    data: SpatialData | AnnData, key: str | None = None, table_key: str | None = None
) -> tuple[AnnData, str | None, str]:
    """The table, its name and the key of the one prediction meant.

    Raises
    ------
    MissingKeyError
        If there is no such prediction; those there are listed.
    AmbiguousKeyError
        If several match.
    """
    found = [(adata, name, k) for name, adata in _candidates(data, table_key) for k in prediction_keys(adata)]
    matching = [entry for entry in found if key is None or entry[2] == key]
    if len(matching) == 1:
        return matching[0]
    listing = ", ".join(f"{k!r}" + (f" in table {name!r}" if name else "") for _, name, k in found) or "none"
    if not matching:
        raise MissingKeyError(f"key={key!r}: no such prediction; stored: {listing}. Make one with hx.tl.predict(...)")
    raise AmbiguousKeyError(f"key={key!r} matches several predictions ({listing}); name key= and table_key=")


def read_prediction(adata: AnnData, key: str) -> StoredPrediction:
    """Read the prediction `key` of `adata`, whichever form it has."""
    entry = adata.uns.get(Keys.NAMESPACE, {}).get(key)
    if entry is None:
        raise MissingKeyError(f"key={key!r}: no such prediction; stored: {prediction_keys(adata)}")
    form = str(entry["form"])
    if form == "obsm":
        genes, source = np.asarray(entry["genes"], dtype=object).astype(str), adata.obsm
    else:
        genes, source = adata.var_names.to_numpy(dtype=object).astype(str), adata.layers
    values = adata.X if form == "X" else source.get(key)
    if values is None:
        raise MissingKeyError(f"key={key!r}: its values are gone from {form}[{key!r}]; run hx.tl.predict again")
    if values.shape[1] != len(genes):
        raise DataValueError(f"key={key!r}: {values.shape[1]} columns for {len(genes)} genes; run hx.tl.predict again")
    companions = {
        name: np.asarray(source[Keys.derived(key, name)]) for name in COMPANIONS if Keys.derived(key, name) in source
    }
    return StoredPrediction(np.asarray(values), genes, str(entry["unit"]), companions, dict(entry))
