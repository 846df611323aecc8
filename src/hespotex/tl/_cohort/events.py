"""What happens to a cohort, an event at a time, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..._logging import logger

__all__ = ["Event", "Log", "listener", "sink"]

Event = dict[str, Any]
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
    return _to_stderr if str(log) == "-" else _File(Path(log))


def _nowhere(event: Event) -> None:
    del event


def _to_stderr(event: Event) -> None:
    sys.stderr.write(f"{json.dumps(event)}\n")


class _File:
    """Lines are added to the file one by one, so that it can be followed and outlives a kill."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # a wrong path is an error at once
        self._path = path

    def __call__(self, event: Event) -> None:
        try:
            with self._path.open("a") as file:
                file.write(f"{json.dumps(event)}\n")
        except OSError as error:  # a log must not end the work
            logger.info("%s takes no more lines: %s", self._path, error)
