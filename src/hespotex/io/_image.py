"""The scale of an opened image: given, or stated by the file."""

from __future__ import annotations

import warnings

import numpy as np

from ..errors import HespotexWarning, ScaleError
from ..image.files import TOLERANCE, Picture, isotropic, open_picture

__all__ = ["Picture", "check_positive", "isotropic", "open_picture", "resolve_mpp"]


def resolve_mpp(mpp: float | None, picture: Picture, *, advice: str = "pass mpp=") -> float:
    """The mpp given, else the one the file states.

    Raises
    ------
    ScaleError
        If neither is there, or `mpp` is not a positive number.
    """
    if mpp is None:
        if picture.mpp is None:
            raise ScaleError(f"mpp: {picture.origin} does not state its µm per pixel{picture.hint}; {advice}")
        return picture.mpp
    mpp = check_positive("mpp", mpp)
    if picture.stated is not None and max(abs(stated / mpp - 1) for stated in picture.stated) > TOLERANCE:
        x, y = picture.stated
        stated = f"{x:.4g}" if x == y else f"{x:.4g} (x) and {y:.4g} (y)"
        warnings.warn(
            f"mpp={mpp:.4g} was given, but {picture.origin} states {stated} µm/px; the given one is used",
            HespotexWarning,
            stacklevel=3,
        )
    return mpp


def check_positive(name: str, value: float) -> float:
    """`value` as a positive finite float.

    Raises
    ------
    ScaleError
        If it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not (np.isfinite(number) and number > 0):
        raise ScaleError(f"{name}={value!r} is not a positive number")
    return number
