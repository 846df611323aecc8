"""Licences of weights that are not ours, shown before their first use."""

from __future__ import annotations

import warnings

from ..errors import HespotexWarning

__all__ = ["show_hub_licence", "show_licence"]

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


def show_hub_licence(name: str, hub_id: str) -> None:
    """Warn, once in a process, that the weights of encoder `name` are those of a model of the hub, and where it says more.

    Warns
    -----
    HespotexWarning
        On first use of this model.
    """
    shown = name if hub_id in name else f"{name} with hf-hub:{hub_id}"  # an architecture has many
    show_licence(shown, f"see https://huggingface.co/{hub_id}", stacklevel=4)
