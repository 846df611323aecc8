"""``python -m hespotex``: the command line program."""

from __future__ import annotations

from .cli import main

main()
