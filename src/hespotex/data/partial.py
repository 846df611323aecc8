"""Rows of a long computation that survive its interruption."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self
from zipfile import BadZipFile

import numpy as np

from .._logging import logger
from .._settings import settings
from ..errors import HespotexWarning

__all__ = ["PartialRows"]

_KEEP_AFTER_S = 10.0  # what took less is sooner computed again than explained


class PartialRows:
    """An (n, d) float32 matrix that is filled row by row, and kept under ``settings.cache_dir`` if that is cut short.

    Used as a context manager: an error or Ctrl-C inside writes what is done, and the next object of the same
    `identity` begins with it.

    Parameters
    ----------
    identity
        Digest of everything that determines the rows.
    shape
        Rows and columns.
    """

    def __init__(self, identity: str, shape: tuple[int, int]) -> None:
        self._path: Path = settings.cache_dir / "embeddings" / f"{identity}.npz"
        self._values = np.zeros(shape, dtype=np.float32)
        self.done = np.zeros(shape[0], dtype=bool)
        self._started = time.monotonic()
        self._load()

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Fill `rows` (b,) with `values` (b, d)."""
        self._values[rows] = values
        self.done[rows] = True

    def values(self) -> np.ndarray:
        """The matrix."""
        return self._values

    def discard(self) -> None:
        """Delete what an earlier, interrupted run left."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.done.any() and time.monotonic() - self._started >= _KEEP_AFTER_S:
            self._save()

    def _save(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(".part.npz")
            np.savez(part, rows=np.flatnonzero(self.done), values=self._values[self.done])
            part.replace(self._path)
        except OSError as error:  # losing the partial result must not hide the reason of the interruption
            said = f"what was done could not be kept: {error}"
        else:
            said = f"interrupted after {int(self.done.sum())} of {len(self.done)} rows; the same call goes on there"
        warnings.warn(said, HespotexWarning, stacklevel=5)  # of the call of hx.pp.embed

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                rows, values = stored["rows"], stored["values"]
            self.write(rows, values)
        except FileNotFoundError:
            return
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
            # A damaged file of a cache is as good as none.
            logger.info("ignoring a damaged partial result: %s", error)
            self.done[:] = False
        else:
            logger.info("going on after %d of %d rows", len(rows), len(self.done))
