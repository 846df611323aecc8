"""Choice of the device torch runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._settings import settings
from .errors import DataValueError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str | None = None) -> torch.device:
    """The device named, or the setting; ``"auto"`` is CUDA, then MPS, then CPU.

    Raises
    ------
    DataValueError
        If the device named is not there.
    """
    import torch

    name = device or settings.device
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise DataValueError(
            f"device={name!r} is unknown; use 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'"
        ) from error
    missing = (chosen.type == "cuda" and not torch.cuda.is_available()) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise DataValueError(f"device={name!r} is not available here; use device='auto' or 'cpu'")
    return chosen
