"""A slide from whatever lies at a path: a SpatialData store or an image file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataValueError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["is_store", "open_slide"]

_MARKS = ("zarr.json", ".zgroup")  # of any zarr store


def is_store(path: Path) -> bool:
    """Whether a zarr store lies at `path`."""
    return any((path / mark).is_file() for mark in _MARKS)


def open_slide(path: str | Path, mpp: float | None = None) -> SpatialData:
    """The slide at `path`; `mpp` is for image files, which may not state theirs.

    Raises
    ------
    DataValueError
        If nothing is there, or nothing that is a slide.
    """
    path = Path(path)
    if not path.exists():
        raise DataValueError(f"{path} does not exist")
    if path.is_file():
        from ._wsi import read_wsi

        return read_wsi(path, mpp=mpp)
    import spatialdata

    remedy = "give a store that SpatialData.write made"
    try:
        sdata = spatialdata.read_zarr(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataValueError(f"{path} cannot be read as a SpatialData store ({error}); {remedy}") from error
    if not list(sdata.gen_elements()):
        raise DataValueError(f"{path} holds no image, shapes or table of SpatialData; {remedy}")
    return sdata
