"""Read a SpatialData store and leave on disk what may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["read_lazy"]


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
        If there is nothing at `path`.

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
    group = zarr.open_group(path, mode="r")
    sdata = spatialdata.read_zarr(path, selection=("images", "labels", "points", "shapes"))
    tables: Any = group.get("tables", {})
    for name in tables:
        sdata[name] = _table(tables[name])
    return sdata


def _table(group: Any) -> AnnData:
    from anndata.experimental import read_dispatched, read_elem_lazy
    from anndata.io import sparse_dataset

    root = group.name.rstrip("/")

    def read(function: Callable[..., Any], name: str, element: Any, iospec: Any) -> Any:
        place = f"/{name.lstrip('/')}".removeprefix(root).strip("/")
        if place == "X" or (place.startswith("layers/") and place.count("/") == 1):
            if iospec.encoding_type in {"csr_matrix", "csc_matrix"}:
                return sparse_dataset(element)
            if iospec.encoding_type == "array":
                return read_elem_lazy(element)
        return function(element)

    return read_dispatched(group, read)
