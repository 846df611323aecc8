"""Counts that stay on disk and are read in blocks of rows: anndata's backed CSR matrices and dask arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from scipy import sparse

from ..errors import CountsError

__all__ = ["LazyCounts", "as_lazy", "is_lazy", "row_chunks"]

_BLOCK_ROWS = 16384
_LARGEST_GAP = 4  # times as many rows are rather read in one piece than the wanted ones singly


def is_lazy(counts: Any) -> bool:
    """Whether `counts` are on disk, or yet to be computed."""
    if isinstance(counts, np.ndarray) or sparse.issparse(counts):
        return False
    from anndata.abc import CSCDataset, CSRDataset
    from dask.array import Array

    return isinstance(counts, LazyCounts | CSRDataset | CSCDataset | Array)


def as_lazy(counts: Any, where: str = "X") -> LazyCounts:
    """`counts`, for which :func:`is_lazy` holds, as rows to be read.

    Raises
    ------
    CountsError
        If they are stored gene by gene, so that reading one row means reading all.
    """
    from anndata.abc import CSCDataset

    if isinstance(counts, LazyCounts):
        return counts
    if isinstance(counts, CSCDataset):
        raise CountsError(
            f"{where}: the counts on disk are stored gene by gene (CSC) and cannot be read in blocks of observations; store "
            "them as CSR, or load them: adata.X = adata.X.to_memory()"
        )
    return LazyCounts(counts, (int(counts.shape[0]), int(counts.shape[1])))


@dataclass(frozen=True, eq=False)
class LazyCounts:
    """Some rows and columns of a matrix on disk; a row field of :class:`~hespotex.data.section.Targets`.

    Slicing it by rows reads these as CSR; nothing is kept.

    Attributes
    ----------
    source
        What is read: anndata's ``CSRDataset``, or a dask array of sparse or dense chunks.
    shape
        Rows and columns that are left.
    rows, columns
        Which of the source these are; ``None`` for all.
    """

    source: Any
    shape: tuple[int, int]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return np.dtype(self.source.dtype)

    def take(self, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> Self:
        """The same counts, restricted to positions or a mask of rows, and to positions of columns."""
        found = self
        if rows is not None:
            kept = np.arange(self.shape[0])[rows] if self.rows is None else self.rows[rows]
            found = replace(found, rows=kept, shape=(len(kept), found.shape[1]))
        if columns is not None:
            kept = np.asarray(columns) if self.columns is None else self.columns[columns]
            found = replace(found, columns=kept, shape=(found.shape[0], len(kept)))
        return found

    def __getitem__(self, rows: slice | np.ndarray) -> sparse.csr_array:
        """The rows, as CSR (m, G)."""
        if self.rows is not None:
            rows = self.rows[rows]
        elif not isinstance(rows, slice):
            rows = np.arange(self.shape[0])[rows]
        piece, wanted = _piece(rows)
        block = self.source[piece]
        if hasattr(block, "compute"):
            block = block.compute(scheduler="synchronous")
        found = sparse.csr_array(block)
        if wanted is not None:
            found = sparse.csr_array(found[wanted])
        return found if self.columns is None else sparse.csr_array(found[:, self.columns])

    def blocks(self) -> Iterator[sparse.csr_array]:
        """All rows in order."""
        for rows in row_chunks(self.shape[0]):
            yield self[rows]

    def to_memory(self) -> sparse.csr_array:
        """All of it, as CSR."""
        return sparse.csr_array(sparse.vstack(list(self.blocks()), format="csr"))


def _piece(rows: slice | np.ndarray) -> tuple[slice | np.ndarray, np.ndarray | None]:
    """What to read for some rows, and which of that they are (``None``: all): one piece if they lie close together."""
    if isinstance(rows, slice) or not len(rows):
        return rows, None
    first, last = int(rows.min()), int(rows.max())
    if last - first >= _LARGEST_GAP * len(rows):
        return rows, None
    neighbours = last - first + 1 == len(rows) and (np.diff(rows) == 1).all()
    return slice(first, last + 1), None if neighbours else rows - first


def row_chunks(n: int) -> Iterator[slice]:
    """Slices of so many rows as are read at a time; one of no rows where there are none."""
    for start in range(0, max(n, 1), _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, n))
