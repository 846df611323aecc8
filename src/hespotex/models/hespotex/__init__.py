"""HESpotEx: a graph attention autoencoder on expression guides an image stream with neighbour layers."""

from __future__ import annotations

from .config import HESpotExConfig
from .model import HESpotEx

__all__ = ["HESpotEx", "HESpotExConfig"]
