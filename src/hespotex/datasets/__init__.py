"""Sections to try things on: real ones and synthetic ones."""

from __future__ import annotations

from ._her2st import her2st

__all__ = ["her2st"]
