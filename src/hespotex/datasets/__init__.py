"""Sections to try things on: real ones and synthetic ones."""

from __future__ import annotations

from ._her2st import her2st
from ._synthetic import cell_truth, synthetic

__all__ = ["cell_truth", "her2st", "synthetic"]
