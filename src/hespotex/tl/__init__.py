"""Tools: train, predict, evaluate."""

from __future__ import annotations

__all__: list[str] = []
