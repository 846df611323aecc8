"""The one logger of the package."""

from __future__ import annotations

import logging

logger = logging.getLogger("hespotex")
logger.addHandler(logging.NullHandler())

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


def set_verbosity(level: str) -> None:
    """Set the level of the package's logger; a handler for it is the application's choice."""
    logger.setLevel(_LEVELS[level])
