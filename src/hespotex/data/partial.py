"""Rows of a long computation that survive its interruption, a kill or a power cut."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self
from zipfile import BadZipFile

import numpy as np

from .._files import replacing
from .._logging import logger
from .._settings import settings
from ..errors import HespotexWarning

__all__ = ["PartialRows"]

_KEEP_AFTER_S = 10.0  # what took less is sooner computed again than explained; also how often something is kept
_KEEP_BYTES = 2**26  # in one file: its rows are copied on the way


class PartialRows:
    """An (n, d) float32 matrix filled run by run, each run kept in ``settings.work_dir`` while the rest is computed.

    A run is a set of rows whose values do not depend on what else is computed with them. The next object of the same
    `identity` begins with the runs that are there, so that its matrix is that of an undisturbed computation, bit for
    bit. As a context manager it keeps what is finished when an error or Ctrl-C cuts the computation short, and says so.

    Parameters
    ----------
    identity
        Digest of everything that determines the rows.
    shape
        Rows and columns.
    """

    def __init__(self, identity: str, shape: tuple[int, int]) -> None:
        self._stays = settings.work_dir is not None
        self._folder: Path = (settings.work_dir or settings.cache_dir) / "embeddings" / identity
        self._values = np.zeros(shape, dtype=np.float32)
        self.done = np.zeros(shape[0], dtype=bool)
        self._fresh: list[np.ndarray] = []  # finished, and not kept yet
        self._began = self._kept_at = time.monotonic()
        self._load()

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Fill `rows` (b,), a whole run, with `values` (b, d)."""
        self._values[rows] = values
        self.done[rows] = True
        self._fresh.append(np.asarray(rows))
        if time.monotonic() - self._kept_at >= _KEEP_AFTER_S and not self.done.all():
            self._try_to_keep()

    def values(self) -> np.ndarray:
        """The matrix."""
        return self._values

    def discard(self) -> None:
        """Delete what is kept; in ``settings.work_dir`` all of it stays for what follows on these rows."""
        if not self._stays:
            shutil.rmtree(self._folder, ignore_errors=True)
        elif time.monotonic() - self._began >= _KEEP_AFTER_S:
            self._try_to_keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self.done.any() or time.monotonic() - self._began < _KEEP_AFTER_S:
            return
        try:
            self._keep()
        except OSError as problem:  # losing the partial result must not hide the reason of the interruption
            said = f"what was done could not be kept: {problem}"
        else:
            said = f"interrupted after {int(self.done.sum())} of {len(self.done)} rows; the same call goes on there"
        warnings.warn(said, HespotexWarning, stacklevel=5)  # of the call of hx.pp.embed

    def _try_to_keep(self) -> None:
        try:
            self._keep()
        except OSError as error:  # a full disk must not end a computation that does not need it
            logger.info("what is done so far is not kept: %s", error)

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        if not self._fresh:
            return
        every = np.concatenate(self._fresh)
        at_once = max(_KEEP_BYTES // (4 * self._values.shape[1] + 1), 1)
        for start in range(0, len(every), at_once):
            rows = every[start : start + at_once]
            with replacing(self._folder / f"{rows[0]}.npz") as part, part.open("wb") as file:
                np.savez(file, rows=rows, values=self._values[rows])
        self._fresh.clear()

    def _load(self) -> None:
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                    rows, values = stored["rows"], stored["values"]
                self._values[rows] = values
            except (OSError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
                # A damaged file of a cache is as good as none.
                logger.info("ignoring a damaged partial result: %s", error)
            else:
                self.done[rows] = True
        if self.done.any():
            logger.info("going on after %d of %d rows", int(self.done.sum()), len(self.done))
