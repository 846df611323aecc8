"""SSIM windows of a section, from its array positions and the lattice its coordinates lie on."""

from __future__ import annotations

import numpy as np

from ..data.lattice import detect_lattice
from ..errors import MissingKeyError
from ..metrics import Windows, lattice_windows

__all__ = ["windows_of"]


def windows_of(array: np.ndarray | None, coordinates: np.ndarray | None, name: str) -> Windows:
    """Windows of section `name`.

    Raises
    ------
    MissingKeyError
        If the section has no array positions, or its coordinates lie on no lattice.
    """
    lattice = None if coordinates is None else detect_lattice(coordinates)
    if array is None or lattice is None:
        raise MissingKeyError(
            f"metric 'ssim' needs a regular array: section {name!r} "
            + (
                "lacks obs['array_row'] and obs['array_col']"
                if array is None
                else "lies on no square or hexagonal lattice"
            )
        )
    return lattice_windows(array[:, 0], array[:, 1], lattice=lattice.kind)
