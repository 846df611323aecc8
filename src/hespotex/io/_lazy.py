"""Read a SpatialData store and leave on disk what may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.lazy_counts import is_lazy
from ..errors import MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["places_of", "read_again", "read_lazy"]

_KINDS = ("images", "labels", "points", "shapes", "tables")
_ON_DISK = {"array", "csr_matrix", "csc_matrix"}  # how anndata calls the matrices that need not be read


def read_lazy(path: str | Path) -> SpatialData:
    """Read a SpatialData store with the matrices of its tables left on disk.

    Images and labels are lazy as :func:`spatialdata.read_zarr` makes them. Of each table ``X`` and the layers stay on
    disk, too: :func:`hespotex.tl.train` reads counts in blocks of observations, other functions that need counts load
    them as a sparse matrix. Everything else (``obs``, ``var``, ``obsm``, ``obsp``, ``uns``) is in memory.

    Parameters
    ----------
    path
        Folder of a SpatialData zarr store.

    Returns
    -------
    SpatialData whose sparse ``X`` are anndata's ``CSRDataset`` and whose dense ones are dask arrays. The store must stay
    where it is as long as the object is used.

    Raises
    ------
    MissingKeyError
        If there is no SpatialData at `path`.

    Notes
    -----
    ``sdata.write`` and :func:`hespotex.io.persist` write such matrices like others. What knows only matrices in memory, such
    as ``adata.copy()`` and most of scanpy, needs ``adata.X = adata.X.to_memory()`` first (``compute()`` of a dask array).

    See Also
    --------
    spatialdata.read_zarr, anndata.experimental.read_lazy

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.read_lazy("visium_hd.zarr")  # doctest: +SKIP
    >>> hx.tl.train(sdata, "ridge")  # doctest: +SKIP
    """
    import spatialdata
    import zarr

    if not Path(path).exists():
        raise MissingKeyError(f"path={str(path)!r}: there is no such store")
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, NotADirectoryError):  # zarr's own are of these kinds
        group = None
    if group is None or not ("spatialdata_attrs" in group.attrs or set(_KINDS) & set(group)):
        raise MissingKeyError(
            f"path={str(path)!r} is not the zarr store of a SpatialData (sdata.write makes one); a table alone is read with "
            "anndata.experimental.read_lazy"
        )
    sdata = spatialdata.read_zarr(path, selection=_KINDS[:-1])
    tables: Any = group.get("tables", {})
    for name in tables:
        sdata[name] = _table(tables[name])
    return sdata


def read_again(adata: AnnData, place: Path) -> None:
    """Let the matrices that `adata` leaves on disk be those of `place`, where the same table was written anew.

    They would be looked for in the old files otherwise, or in the new ones by the layout of the old.
    """
    import zarr

    group: Any = zarr.open_group(place, mode="r")
    if is_lazy(adata.X):
        adata.X = _matrix(group["X"])
    for name in [name for name, values in adata.layers.items() if name is not None and is_lazy(values)]:
        adata.layers[name] = _matrix(group["layers"][name])


def places_of(adata: AnnData) -> set[Path]:
    """Where on this machine the matrices lie that `adata` leaves on disk, or computes from such."""
    matrices = [adata.X, *(values for name, values in adata.layers.items() if name is not None)]
    found = (place for matrix in matrices if is_lazy(matrix) for place in _places(matrix))
    return {Path(place).resolve() for place in found}


def _places(value: Any) -> Iterator[Path]:
    """Places of all zarr arrays and groups in a matrix, a dask graph or a part of one."""
    from dask._task_spec import DataNode, Task
    from zarr.storage import LocalStore

    origin = getattr(value, "group", value)  # anndata's matrices hold the group they lie in
    if hasattr(origin, "store_path"):
        if isinstance(origin.store, LocalStore):
            yield origin.store.root / origin.store_path.path
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _places(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _places(part)
    elif isinstance(value, partial):
        yield from _places((value.func, value.args, value.keywords))
    elif hasattr(value, "dask"):
        yield from _places(dict(value.dask))
    elif isinstance(value, Task):
        yield from _places((value.func, value.args, value.kwargs))
    elif isinstance(value, DataNode):
        yield from _places(value.value)


def _table(group: Any) -> AnnData:
    from anndata.experimental import read_dispatched

    root = group.name.rstrip("/")

    def read(function: Callable[..., Any], name: str, element: Any, iospec: Any) -> Any:
        place = f"/{name.lstrip('/')}".removeprefix(root).strip("/")
        is_matrix = place == "X" or (place.startswith("layers/") and place.count("/") == 1)
        return _matrix(element) if is_matrix and iospec.encoding_type in _ON_DISK else function(element)

    return read_dispatched(group, read)


def _matrix(element: Any) -> Any:
    """A matrix that is left on disk."""
    from anndata.experimental import read_elem_lazy
    from anndata.io import sparse_dataset

    return read_elem_lazy(element) if element.attrs["encoding-type"] == "array" else sparse_dataset(element)
