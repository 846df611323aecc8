"""Windows of a lazy image, each of its chunks computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["ChunkReader"]


class ChunkReader:
    """Reads planned windows of a lazy (3, h, w) image.

    A chunk is computed when the first window needs it and freed after the last one, so memory holds the frontier
    of the reading order and no more: read along the chunks' rows, that is about one row of chunks.

    Parameters
    ----------
    array
        Lazy image, (3, h, w) uint8.
    windows
        Windows (y0, x0, y1, x1) in whole pixels in the order in which they will be read, (n, 4); they may reach
        beyond the image.
    fill
        Value of pixels beyond the image.
    """

    def __init__(self, array: da.Array, windows: np.ndarray, fill: int = 255) -> None:
        self._array = array
        self._fill = fill
        self._edges = tuple(np.concatenate([[0], np.cumsum(sizes)]) for sizes in array.chunks[1:])
        self._windows = np.asarray(windows, dtype=np.int64)
        self._spans = [_touched(edges, self._windows[:, [i, i + 2]]) for i, edges in enumerate(self._edges)]
        self._uses = self._count_uses()
        self._decoded: dict[tuple[int, int], np.ndarray] = {}

    def read(self, index: int) -> np.ndarray:
        """Pixels (h, w, 3) of window `index`; every window can be read once."""
        y0, x0, y1, x1 = self._windows[index]
        out = np.full((y1 - y0, x1 - x0, 3), self._fill, dtype=np.uint8)
        for row in range(*self._spans[0][index]):
            for column in range(*self._spans[1][index]):
                top, bottom = self._edges[0][row : row + 2]
                left, right = self._edges[1][column : column + 2]
                upper, lower, near, far = max(top, y0), min(bottom, y1), max(left, x0), min(right, x1)
                chunk = self._chunk(row, column)
                out[upper - y0 : lower - y0, near - x0 : far - x0] = chunk[
                    upper - top : lower - top, near - left : far - left
                ]
        return out

    def _count_uses(self) -> np.ndarray:
        """How many windows need each chunk, by differences at the corners of the spans."""
        change = np.zeros([len(edges) + 1 for edges in self._edges], dtype=np.int64)
        (top, bottom), (left, right) = (span.T for span in self._spans)
        needed = (bottom > top) & (right > left)
        for rows, columns, sign in ((top, left, 1), (bottom, right, 1), (top, right, -1), (bottom, left, -1)):
            np.add.at(change, (rows[needed], columns[needed]), sign)
        return change.cumsum(0).cumsum(1)

    def _chunk(self, row: int, column: int) -> np.ndarray:
        chunk = self._decoded.get((row, column))
        if chunk is None:
            # One thread decodes while another encodes; more would hold more chunks without finishing sooner.
            lazy = self._array.blocks[:, row, column]
            chunk = np.ascontiguousarray(np.moveaxis(lazy.compute(scheduler="synchronous"), 0, -1))
            self._decoded[row, column] = chunk
        self._uses[row, column] -= 1
        if self._uses[row, column] <= 0:
            self._decoded.pop((row, column))
        return chunk


def _touched(edges: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """First chunk and one past the last chunk that each pixel span (start, stop) overlaps, (n, 2)."""
    size = edges[-1]
    start, stop = np.clip(spans[:, 0], 0, size), np.clip(spans[:, 1], 0, size)
    first = np.searchsorted(edges, start, side="right") - 1
    last = np.searchsorted(edges, stop, side="left")
    return np.column_stack([first, np.where(stop > start, last, first)])
