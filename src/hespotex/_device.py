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
    chosen = torch.device(name)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if chosen.type in available and not available[chosen.type]():
        raise DataValueError(f"device={name!r} is not available here; use device='auto' or 'cpu'")
    return chosen
