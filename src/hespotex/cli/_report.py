"""What a command does, step by step: shown on stderr, and written to the JSON log."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import typer

from ..errors import HespotexWarning
from ._screen import is_terminal, step

__all__ = ["Report", "reported"]


class Report:
    """Shows the steps of a command, and logs them.

    Parameters
    ----------
    log
        File for a JSON line about each event; ``-`` for stderr, which then holds nothing else; ``None`` for no log.
    quiet
        Whether to show nothing but errors.
    """

    def __init__(self, log: Path | None, *, quiet: bool) -> None:
        from ..tl._cohort.events import listener

        self.tell = listener(log)
        self.shows = not quiet and str(log) != "-"
        self._quiet = quiet

    @property
    def has_bar(self) -> bool:
        """Whether there is a place for progress bars, and somebody who sees them."""
        return self.shows and is_terminal()

    @contextmanager
    def step(self, text: str, stage: str, *, shows_bar: bool = False, **about: Any) -> Iterator[None]:
        """A step: `text` is for people, who may see a bar of its own; `stage` and `about` are for the log."""
        start = perf_counter()
        with step(text, has_bar=shows_bar and self.has_bar, quiet=not self.shows):
            yield
        self.tell("stage", stage=stage, **about, seconds=_since(start))

    def result(self, text: str) -> None:
        """Say on stdout what has been made."""
        if not self._quiet:
            typer.echo(text)


@contextmanager
def reported(command: str, log: Path | None, *, quiet: bool) -> Iterator[Report]:
    """Log start and end of a command, with its error if it fails, and the library's warnings, silent if `quiet`."""
    report = Report(log, quiet=quiet)
    start, show = perf_counter(), warnings.showwarning

    def warn(message: Warning | str, category: type[Warning], *more: Any) -> None:
        if issubclass(category, HespotexWarning):
            report.tell("warning", command=command, message=str(message))
            if not report.shows:
                return
        show(message, category, *more)

    report.tell("command_started", command=command)
    try:
        warnings.showwarning = warn  # type: ignore[assignment]  # takes the rest as *more
        yield report
    except BaseException as error:
        about = {"error": type(error).__name__, "message": str(error), "seconds": _since(start)}
        report.tell("command_failed", command=command, **about)
        raise
    finally:
        warnings.showwarning = show
    report.tell("command_finished", command=command, seconds=_since(start))


def _since(start: float) -> float:
    return round(perf_counter() - start, 3)
