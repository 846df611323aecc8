"""What was done, beside what came of it: entries of ``uns["hespotex"]`` that survive zarr and h5ad."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._version import __version__
from ..errors import DataTypeError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["digest", "from_uns", "read_record", "record", "to_uns"]


def to_uns(value: Any) -> Any:
    """`value` in types that both zarr and h5ad take: scalars, strings, flat lists, arrays, string-keyed mappings.

    Sequences become lists, or JSON text where they are nested or mixed, since those formats have no such thing; paths
    and other objects are refused, because they mean nothing elsewhere.

    Raises
    ------
    DataTypeError
        Naming the type that cannot be stored.
    """
    if isinstance(value, np.generic):  # before the next line, as NumPy's strings are strings, too
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return value.astype(str).tolist() if value.dtype.kind in "OU" and value.ndim == 1 else value
    if isinstance(value, Mapping):
        return {_key(key): to_uns(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return to_uns(sorted(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return _to_list(value)
    if isinstance(value, PurePath):
        raise DataTypeError(f"{value} is a path on this machine; store what it names, not where it lies")
    raise DataTypeError(f"a value of type {type(value).__name__} cannot be stored in uns")


def from_uns(value: Any) -> Any:
    """Plain values of what was stored: lists come back from disk as arrays, numbers as NumPy's."""
    if isinstance(value, Mapping):
        return {str(key): from_uns(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return from_uns(value.tolist())
    if isinstance(value, list | tuple):
        return [from_uns(entry) for entry in value]
    if isinstance(value, bytes):
        return value.decode()
    return str(value) if isinstance(value, str) else value


def record(adata: AnnData, key: str, *, created_by: str, **values: Any) -> None:
    """Write ``uns["hespotex"][key]``: who made it, with which version, and `values`; replaces an earlier entry."""
    entry = to_uns({"created_by": created_by, "hespotex_version": __version__, **values})
    adata.uns.setdefault(Keys.NAMESPACE, {})[key] = entry


def read_record(adata: AnnData, key: str) -> dict[str, Any]:
    """The entry that :func:`record` wrote, in plain values; empty where there is none: other tools write none."""
    entry = adata.uns.get(Keys.NAMESPACE, {}).get(key, {})
    return from_uns(entry) if isinstance(entry, Mapping) else {}


def digest(*values: Any) -> str:
    """SHA-256 of plain values and arrays; equal for equal values, whatever session or machine."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value)
            state.update(f"{array.dtype.str}{array.shape}".encode())
            state.update(array.tobytes())
        else:
            state.update(json.dumps(value, sort_keys=True, default=_plain).encode())
        state.update(b"\0")
    return state.hexdigest()


def _key(key: Any) -> str:
    """A mapping's key as HDF5 and zarr allow it."""
    return str(key).replace("/", "_")


def _to_list(values: Sequence[Any]) -> Any:
    plain = [to_uns(entry) for entry in values]
    kinds = {
        bool if isinstance(entry, bool) else float if isinstance(entry, int | float) else type(entry) for entry in plain
    }
    if kinds <= {bool} or kinds <= {float} or kinds <= {str}:
        return plain
    return json.dumps(plain, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise DataTypeError(f"a value of type {type(value).__name__} cannot be stored in uns")
