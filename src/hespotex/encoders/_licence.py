"""Licences of weights that are not ours, shown before their first use."""

from __future__ import annotations

import warnings

from ..errors import HespotexWarning

__all__ = ["show_licence"]

_SHOWN: set[str] = set()  # encoders whose licence this process has shown


def show_licence(name: str, licence: str, stacklevel: int = 3) -> None:
    """Warn of the licence of encoder `name`, once in a process.

    Warns
    -----
    HespotexWarning
        On first use.
    """
    if name not in _SHOWN:
        _SHOWN.add(name)
        warnings.warn(f"{name}: weights under the licence: {licence}", HespotexWarning, stacklevel=stacklevel)
