"""What the program says, on stderr; results are on stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import HespotexWarning

__all__ = ["in_options", "is_terminal", "name_options", "say", "show_warning", "step"]

_screen = Console(stderr=True, highlight=False)

_options: set[str] = set()


def name_options(names: Iterable[str]) -> None:
    """Say which arguments of the library are options of the command that runs."""
    _options.clear()
    _options.update(names)


def say(text: str) -> None:
    """Print a line with rich's markup."""
    _screen.print(text, soft_wrap=True)  # a pipe or a log gets whole lines


def is_terminal() -> bool:
    """Whether somebody is watching."""
    return sys.stderr.isatty()


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning about the user's data as one line; those of the libraries underneath are not for the user."""
    if issubclass(category, HespotexWarning):
        say(f"[yellow]Warning:[/] {escape(in_options(str(message)))}")


def in_options(text: str) -> str:
    """A message of the library with its arguments named as the options of the command that runs."""
    text = text.replace("overwrite=True", "--overwrite")
    calls = re.findall(r"\bhx\.[\w.]+\([^)]*\)", text)  # Python is left as it is
    for number, call in enumerate(calls):
        text = text.replace(call, f"\0{number}\0")
    for name in sorted(_options):
        option = "--" + name.replace("_", "-")
        text = re.sub(rf"\b{name}=(?=['\"\w.-])", f"{option} ", text)  # with a value
        text = re.sub(rf"\b{name}=", option, text)
    for number, call in enumerate(calls):
        text = text.replace(f"\0{number}\0", call)
    return text


@contextmanager
def step(text: str, *, has_bar: bool = False, quiet: bool = False) -> Iterator[None]:
    """Show what is being done, unless that shows a bar of its own, then that it is done and how long it took."""
    start = perf_counter()
    with nullcontext() if has_bar or quiet else _screen.status(f"{escape(text)} …"):
        yield
    if not quiet:
        say(f"[green]✓[/] {escape(text)} [dim]({perf_counter() - start:.0f} s)[/]")
