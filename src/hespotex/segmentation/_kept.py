"""Finished runs of blocks, on disk while the rest of a slide is worked on: they survive Ctrl-C, a kill or a power cut."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self
from zipfile import BadZipFile

import numpy as np

from .._files import replacing
from .._logging import logger
from .._settings import settings
from ..errors import HespotexWarning
from ._merge import Found
from ._packed import PackedRegions

__all__ = ["KeptRuns"]

KEEP_AFTER_S = 10.0  # what took less is sooner computed again than explained


class KeptRuns:
    """Results of runs of blocks by their number, kept in ``settings.work_dir`` once the work has lasted a while.

    As a context manager around the work: left by an error or Ctrl-C, it says what is kept; left without one, what is
    kept is deleted, but in a folder that ``work_dir`` names, where it stays for a run that is cut off later.

    Parameters
    ----------
    identity
        Digest of everything that determines the results. It costs a look at the slide, so it is asked for only if
        there is something to find, or to keep.
    stacklevel
        Of its warnings.
    """

    def __init__(self, identity: Callable[[], str], *, stacklevel: int = 4) -> None:
        self._identity = identity
        self._stacklevel = stacklevel
        self._stays = settings.work_dir is not None
        self._root = (settings.work_dir or settings.cache_dir) / "nuclei"
        self._folder: Path | None = None
        self._fresh: dict[int, Found] = {}
        self._began = time.monotonic()
        self._count = 0
        self._failed = False
        if self._root.is_dir() and any(self._root.iterdir()):
            self._folder = self._root / identity()

    def load(self, run: int) -> Found | None:
        """What a run found; ``None`` if it is not there, or damaged."""
        if self._folder is None:
            return None
        path = self._path(run)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                found = Found(PackedRegions.from_arrays(stored), stored["spare"], int(stored["cut"]))
        except FileNotFoundError:
            return None
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
            logger.info("ignoring a damaged part of an earlier run: %s", error)
            return None
        return found if len(found.spare) == len(found.regions) else None

    def holds(self, run: int) -> bool:
        """Whether a run is kept; whether it is whole shows when it is loaded."""
        there = self._folder is not None and self._path(run).is_file()
        self._count += there
        return there

    def save(self, run: int, found: Found) -> None:
        """Keep the result of a run; in memory for the first seconds."""
        if self._failed:
            return
        self._fresh[run] = found
        if time.monotonic() - self._began < KEEP_AFTER_S:
            return
        if self._folder is None:
            self._folder = self._root / self._identity()
        try:
            while self._fresh:
                number, found = next(iter(self._fresh.items()))
                with replacing(self._path(number)) as part, part.open("wb") as file:
                    np.savez(file, cut=found.cut, spare=found.spare, **found.regions.arrays())  # type: ignore[arg-type]
                del self._fresh[number]
                self._count += 1
        except OSError as error:  # a full disk must not end work that does not need it
            self._failed = True
            self._fresh.clear()
            warnings.warn(
                f"what is found is not kept for the case of an interruption, because {self._folder} could not be written: "
                f"{error}",
                HespotexWarning,
                stacklevel=self._stacklevel + 2,
            )

    def forget(self) -> None:
        """Delete what is kept: it is of no more use."""
        self._count = 0
        if self._folder is not None and not self._stays:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.forget()
        elif self._count:
            warnings.warn(
                f"interrupted; {self._count} finished parts of the slide are kept, and the same call goes on there",
                HespotexWarning,
                stacklevel=self._stacklevel,
            )

    def _path(self, run: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{run:06d}.npz"
