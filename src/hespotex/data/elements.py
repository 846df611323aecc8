"""Elements as SpatialData keeps them: images of lazy levels that know where they lie, shapes that must go on knowing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .pyramid import level_factor

if TYPE_CHECKING:
    import dask.array as da
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

__all__ = ["image_element", "shapes_kept", "transformations"]


def transformations(mpp: float | None) -> dict[str, Any]:
    """Level-0 pixels are "global"; `mpp`, if it is known, takes them to "microns"."""
    from spatialdata.transformations import Identity, Scale

    known: dict[str, Any] = {"global": Identity()}
    if mpp is not None:
        known[Keys.MICRONS] = Scale([mpp, mpp], axes=("x", "y"))
    return known


def image_element(levels: Sequence[da.Array], mpp: float | None) -> DataArray | DataTree:
    """An image of precomputed levels (3, h, w); ``Image2DModel.parse`` would compute its own."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import set_transformation
    from xarray import DataTree

    parsed = [Image2DModel.parse(level, dims=("c", "y", "x"), c_coords=["r", "g", "b"]) for level in levels]
    element: DataArray | DataTree = parsed[0]
    if len(parsed) > 1:
        full = levels[0].shape[-2:]
        element = DataTree.from_dict({f"scale{number}": _placed(level, full) for number, level in enumerate(parsed)})
    set_transformation(element, transformations(mpp), set_all=True)
    Image2DModel().validate(element)
    return element


def _placed(level: DataArray, full: Sequence[int]) -> Any:
    """Dataset of a level with the centres of its pixels in pixels of the finest level, of size `full`.

    spatialdata takes the ratio of sizes for the size of a pixel, which is off where an odd size was halved.
    """
    level.attrs.clear()
    size = level.shape[-2:]
    factor = level_factor(full, size)
    coords = {
        axis: (np.arange(small) + 0.5) * (factor or large / small)
        for axis, small, large in zip(("y", "x"), size, full, strict=True)
    }
    return level.assign_coords(coords).to_dataset(name="image")


@contextmanager
def shapes_kept(sdata: SpatialData) -> Iterator[None]:
    """Write `sdata` in here: spatialdata takes the transformations off shapes meanwhile, and after an error leaves them off."""
    before = [(shapes, dict(shapes.attrs)) for shapes in sdata.shapes.values()]
    try:
        yield
    finally:
        for shapes, attrs in before:
            shapes.attrs.update(attrs)
