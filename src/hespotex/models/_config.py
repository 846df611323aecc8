"""Checks that the settings of several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ..errors import DataValueError

__all__ = ["check_choices", "check_least"]


def check_choices(config: Any, kinds: Mapping[str, Any]) -> None:
    """Raise unless each named setting is one of the words of its ``Literal``.

    Raises
    ------
    DataValueError
        Naming the setting, its value and what is possible.
    """
    for name, kind in kinds.items():
        if (value := getattr(config, name)) not in get_args(kind):
            raise DataValueError(f"{name}={value!r} is unknown; possible: {', '.join(map(repr, get_args(kind)))}")


def check_least(config: Any, least: Mapping[str, float]) -> None:
    """Raise unless each named setting is at least so much; ``None`` stands for no setting.

    Raises
    ------
    DataValueError
        Naming the setting, its value and the least.
    """
    for name, bound in least.items():
        if (value := getattr(config, name)) is not None and not value >= bound:
            raise DataValueError(f"{name}={value!r} must be at least {bound}")
