"""HisDiff and Stem: a diffusion model over the gene vector of a spot, conditioned on its histology."""

from __future__ import annotations

from .config import HisDiffConfig, patch_half_width
from .model import HisDiff

__all__ = ["HisDiff", "HisDiffConfig", "patch_half_width"]
