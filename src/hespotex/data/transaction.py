"""Undo for functions that write in several steps: after an error the user's object is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._keys import Keys

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["restored_on_error"]

_MAPPINGS = ("obsm", "varm", "obsp", "varp", "layers")


def _remember(adata: AnnData) -> dict[str, Any]:
    state: dict[str, Any] = {name: dict(getattr(adata, name)) for name in _MAPPINGS}
    state["obs"], state["var"] = adata.obs.copy(), adata.var.copy()
    state["X"] = adata.X
    state["uns"] = dict(adata.uns)
    if Keys.NAMESPACE in adata.uns:  # functions of the package write into it, not over it
        state["uns"][Keys.NAMESPACE] = copy.deepcopy(adata.uns[Keys.NAMESPACE])
    return state


def _restore(adata: AnnData, state: dict[str, Any]) -> None:
    for name in _MAPPINGS:
        mapping = getattr(adata, name)
        for key in [key for key in mapping if key not in state[name]]:
            del mapping[key]
        for key, value in state[name].items():
            if key is not None and mapping.get(key) is not value:  # None: where newer versions of anndata keep X
                mapping[key] = value
    if adata.X is not state["X"]:
        adata.X = state["X"]
    adata.obs, adata.var = state["obs"], state["var"]
    adata.uns = state["uns"]


@contextmanager
def restored_on_error(data: SpatialData | AnnData) -> Iterator[None]:
    """Run a block; if it raises (Ctrl-C included), take back every element, column and key it wrote or deleted.

    Arrays are remembered by reference, so this costs no copy of the user's data; it undoes what a block
    *stores*, not what it would change inside an array, which no function of the package does.
    """
    from anndata import AnnData

    if isinstance(data, AnnData):
        state = _remember(data)
        try:
            yield
        except BaseException:
            _restore(data, state)
            raise
        return

    elements = {name: element for _, name, element in data.gen_elements()}
    tables = {name: _remember(table) for name, table in data.tables.items()}
    attrs = copy.deepcopy(data.attrs)
    try:
        yield
    except BaseException:
        for name in [name for _, name, _ in data.gen_elements() if name not in elements]:
            del data[name]
        for name, element in elements.items():
            if name not in tables and data.get(name) is not element:
                data[name] = element
        for name, state in tables.items():
            if data.get(name) is not elements[name]:
                data[name] = elements[name]
            _restore(elements[name], state)
        data.attrs = attrs
        raise
