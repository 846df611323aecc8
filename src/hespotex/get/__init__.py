"""Read results in the form other tools take."""

from __future__ import annotations

from ._prediction import prediction

__all__ = ["prediction"]
