"""The command line program: ``hespotex demo``, ``train``, ``predict``, ``evaluate``, ``embed``, ``segment``, ``encoders``, ``doctor``.

Imports nothing heavy until a command runs, so that ``hespotex --help`` is instant.
"""

from __future__ import annotations

import sys
import warnings

from rich.markup import escape

from ..errors import HespotexError
from . import _about, _models, _predict, _slide  # noqa: F401  each adds its commands
from ._app import app
from ._screen import in_options, say, show_warning

__all__ = ["app", "main"]


def main() -> None:
    """Run the program; an error becomes one sentence and an exit code."""
    warnings.showwarning = show_warning  # type: ignore[assignment]  # takes the rest as *_
    try:
        app()
    except (HespotexError, OSError) as error:
        say(f"[bold red]Error:[/] {escape(in_options(str(error)))}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
