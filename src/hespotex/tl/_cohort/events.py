"""What happens to a cohort, an event at a time, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

from ..._logging import logger
from ...errors import DataTypeError, DataValueError, OutputError

__all__ = ["Event", "Log", "listener", "sink"]

Event = dict[str, Any]
_LONGEST = 1_000_000  # bytes of a line; a slide may be one line of many gigabytes
Log = str | Path | Callable[[Event], None] | None


def listener(log: Log) -> Callable[..., None]:
    """A function that stamps an event with the time and passes it on to `log`."""
    pass_on = sink(log)

    def tell(event: str, **about: Any) -> None:
        pass_on({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **about})

    return tell


def sink(log: Log) -> Callable[[Event], None]:
    """Where events go: lines of a file, of stderr for ``"-"``, or the function given."""
    if callable(log):
        return log
    if log is None:
        return _nowhere
    if not isinstance(log, str | PathLike):
        raise DataTypeError(f"log must be a path, '-' for stderr, or a function, got {log!r}")
    return _to_stderr if str(log) == "-" else _File(Path(log).expanduser())


def _nowhere(event: Event) -> None:
    del event


def _to_stderr(event: Event) -> None:
    sys.stderr.write(f"{json.dumps(event)}\n")


class _File:
    """Lines are added to the file one by one, so that it can be followed and outlives a kill."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise DataValueError(f"log={str(path)!r} is a folder; name a file in it")
        try:
            if path.is_file() and not _holds_events(path):
                raise DataValueError(
                    f"log={str(path)!r} exists and holds no such log, so nothing is added to it; name another file"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()  # a wrong path is an error at once
        except OSError as error:
            raise OutputError(
                f"log={str(path)!r} cannot be written to ({error.strerror or error}); name another file"
            ) from error
        self._path = path

    def __call__(self, event: Event) -> None:
        try:
            with self._path.open("a") as file:
                file.write(f"{json.dumps(event)}\n")
        except OSError as error:  # a log must not end the work
            logger.info("%s takes no more lines: %s", self._path, error)


def _holds_events(path: Path) -> bool:
    """Whether the first line of a file is an event, unless there is none."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST)
    try:
        return not line or {"time", "event"} <= json.loads(line).keys()
    except (ValueError, AttributeError):
        return False
