"""Arguments of a cohort that are wrong for all slides, which is said once and before the work."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import DataTypeError, DataValueError, ScaleError

__all__ = ["check_folder", "check_mpp", "check_whole"]


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise DataTypeError(f"{name}={value!r} must be a whole number, not {type(value).__name__}")
    if int(value) < least:
        raise DataValueError(f"{name}={value!r} must be at least {least}")


def check_mpp(mpp: Any) -> None:
    """Raise unless it is a positive number."""
    if not isinstance(mpp, Real) or isinstance(mpp, bool):
        raise DataTypeError(f"mpp={mpp!r} must be a number of µm per pixel, not {type(mpp).__name__}")
    if not (isfinite(mpp) and float(mpp) > 0):
        raise ScaleError(f"mpp={mpp!r} must be a positive number of µm per pixel")


def check_folder(out: Any) -> Path:
    """`out` as an absolute path, which is not named like a file.

    Raises
    ------
    DataTypeError, DataValueError
        Saying what to give.
    """
    if not isinstance(out, str | PathLike):
        raise DataTypeError(f"out must be the path of a folder, got {out!r}")
    folder = Path(out).expanduser().absolute()
    if folder.suffix.lower() in (".h5ad", ".zarr"):
        raise DataValueError(
            f"out={str(out)!r} is named like one result, and must be a folder for the results, which are named after their slides; "
            f"take out={str(Path(out).with_suffix(''))!r}, for instance"
        )
    return folder
