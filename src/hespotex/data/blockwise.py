"""A SpatialData store whose one table is written block by block, for results that are larger than memory."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .._files import check_writable, publish, staged
from .._memory import available_bytes
from ..errors import DataValueError
from .elements import shapes_kept

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["TableStore", "available_bytes", "check_fits", "check_target", "publish_store"]

_CHUNK_GENES = 256
_CHUNK_ROWS = 4096
_OF_A_PREDICTION = "Predict blocks of at most {genes} genes with genes=, or write to disk with target='<folder>.zarr'"
_SPARE = 0.8  # of the free memory: what is computed on the way needs some, too


class TableStore:
    """Zarr store of a SpatialData that appears under its name only when all blocks are in it.

    Used as a context manager around :meth:`write`; an error inside leaves nothing behind.

    Parameters
    ----------
    path
        Folder to create.
    sdata
        What the store holds besides the values: shapes, and a table (n, G) without ``X``.
    table_key
        Name of that table.

    Raises
    ------
    DataValueError
        If there is something at `path` already.
    """

    def __init__(self, path: str | Path, sdata: SpatialData, table_key: str) -> None:
        self._path, self._sdata, self._key = Path(path), sdata, table_key
        check_target(path)
        self._work = ExitStack()
        self._staging: Path | None = None
        self._table: Any = None

    def __enter__(self) -> Self:
        import zarr

        self._staging = self._work.enter_context(staged(self._path))
        try:
            with shapes_kept(self._sdata):
                self._sdata.write(self._staging / "store")
            self._table = zarr.open_group(self._staging / "store" / "tables" / self._key, mode="r+")
        except BaseException:
            self._work.close()
            raise
        return self

    def write(self, rows: slice | np.ndarray, values: np.ndarray, layer: str | None = None) -> None:
        """Write `values` (b, G) float32 to `rows` of ``X``, or of a layer; positions of rows ascend."""
        name = "X" if layer is None else f"layers/{layer}"
        if name not in self._table:
            n_obs, n_vars = self._sdata.tables[self._key].shape
            array = self._table.create_array(
                name,
                shape=(n_obs, n_vars),
                chunks=(max(min(_CHUNK_ROWS, n_obs), 1), max(min(_CHUNK_GENES, n_vars), 1)),
                dtype=np.float32,
                fill_value=np.nan,
            )
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        if isinstance(rows, np.ndarray) and len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        if isinstance(rows, slice):
            self._table[name][rows] = values
        else:
            self._table[name].oindex[rows, :] = values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._staging is not None
        with self._work:
            if kind is None:
                publish_store(self._staging / "store", self._path)


def publish_store(store: Path, path: Path) -> None:
    """Give a finished zarr store its name, unless something has appeared there meanwhile.

    Raises
    ------
    DataValueError
        If there is something at `path`.
    """
    import zarr.errors

    with warnings.catch_warnings():
        # Shapes are parquet, of which zarr knows nothing, and spatialdata consolidates all the same.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(store)
    check_target(path)
    publish(store, path)


def check_target(path: str | Path) -> None:
    """Raise if there is something at the place of a store to write, or nothing can be written there.

    Raises
    ------
    DataValueError, OutputError
        Naming it.
    """
    if Path(path).exists():
        raise DataValueError(f"target={str(path)!r} exists already; name a folder that does not, or remove it first")
    check_writable(Path(path), f"target={str(path)!r}")


def check_fits(n_obs: int, n_genes: int, n_arrays: int, what: str, way_out: str = _OF_A_PREDICTION) -> None:
    """Raise if so many float32 matrices (n, G) would not fit into memory.

    Parameters
    ----------
    n_obs, n_genes, n_arrays
        Size of the matrices, and how many of them are there at a time.
    what
        What they are, for the message.
    way_out
        What to do instead; ``{genes}`` in it is the number of genes that would fit.

    Raises
    ------
    DataValueError
        Saying how many genes would, and the ways out.
    """
    free = available_bytes()
    needed = 4 * n_obs * n_genes * n_arrays
    if free is None or needed <= _SPARE * free:
        return
    fitting = int(_SPARE * free / (4 * n_obs * n_arrays))
    raise DataValueError(
        f"{what} of {n_genes} genes at {n_obs} places takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
        + way_out.format(genes=fitting)
    )
