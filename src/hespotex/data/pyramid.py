"""The pyramid of an image: levels that begin where the finest begins, and what one must be to be H&E."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ImageFormatError

if TYPE_CHECKING:
    import dask.array as da
    from spatialdata.transformations import BaseTransformation

__all__ = ["Level", "level_factor", "levels_of", "transformations_of"]

_HALVINGS = (2.0, 4.0, 8.0)


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a slide's pyramid, which begins where level 0 begins.

    Attributes
    ----------
    array
        Lazy (3, h, w) uint8.
    downsample
        Size of its pixel in pixels of level 0, along both axes.
    """

    array: da.Array
    downsample: float


def level_factor(full: Sequence[int], size: Sequence[int]) -> int | None:
    """How many pixels of an image make one of a level; ``None`` if that is no whole number, or not one for both axes.

    Pyramids halve, and drop or keep an odd last row. The ratio of sizes is then off by up to a pixel of the level at
    the far border, which is several µm.

    Parameters
    ----------
    full, size
        Height and width of the image and of the level.

    Examples
    --------
    >>> level_factor((9911, 9274), (619, 579)), level_factor((9911, 9274), (620, 580)), level_factor((90, 90), (40, 40))
    (16, 16, None)
    """
    ratio = float(np.sqrt(full[0] / size[0] * full[1] / size[1]))
    # a level of few pixels fits several numbers, of which a power of two is the likely one
    for factor in (2 ** max(round(np.log2(ratio)), 0), max(round(ratio), 1)):
        if all(small in (large // factor, -(-large // factor)) for large, small in zip(full, size, strict=True)):
            return factor
    return None


def levels_of(key: str, image: Any) -> tuple[Level, ...]:
    """The finest level and coarser ones: as stored where they are known to lie on it, else computed when read.

    The first three halvings are always there. A scanner that stores each fourth level only, or a third of the size, would
    else be read from another level, whose pixels are blurred differently, than one that stores every second, and textures
    would differ between them more than between tissues.
    """
    import dask.array as da
    from spatialdata import get_pyramid_levels
    from xarray import DataArray

    arrays = [image] if isinstance(image, DataArray) else list(get_pyramid_levels(image))
    arrays = [_check_rgb(key, array).transpose("c", "y", "x") for array in arrays]
    height, width = arrays[0].shape[1:]
    if 0 in (height, width):
        raise ImageFormatError(f"image {key!r} is empty: {width} × {height} px")
    levels: list[Level] = []
    trusted, is_crop = arrays[0].data, _is_crop(image)
    trusted_factor = 1
    for array in arrays:
        factor = level_factor((height, width), array.shape[1:])
        if factor is None or factor > min(height, width):
            continue  # stretched or cut in some way: a finer level serves
        if not levels or (not is_crop and _lies_on(arrays[0], array, factor)):
            trusted, trusted_factor = array.data, factor
        data = trusted if isinstance(trusted, da.Array) else da.from_array(trusted)
        if factor % trusted_factor == 0:
            levels.append(Level(_reduced(data, factor // trusted_factor), float(factor)))
    return tuple(_with_halvings(levels))


def _with_halvings(levels: list[Level]) -> list[Level]:
    """`levels` with the first halvings of level 0 in place of what is stored between them."""
    found = {level.downsample: level for level in levels if level.downsample > _HALVINGS[-1]}
    stored = {level.downsample: level for level in levels}
    finer = found[1.0] = levels[0]
    for factor in _HALVINGS:
        if min(finer.array.shape[1:]) < 2:
            break
        finer = found[factor] = stored.get(factor) or Level(_reduced(finer.array, 2), factor)
    return [found[factor] for factor in sorted(found)]


def _reduced(array: da.Array, factor: int) -> da.Array:
    """Lazy rounded means of squares of `factor` pixels, chunk by chunk; odd last rows and columns are dropped."""
    if factor == 1:
        return array
    edges = [np.unique(np.cumsum(sizes) // factor * factor) for sizes in array.chunks[1:]]
    rows, columns = (tuple(np.diff(stops, prepend=0)[stops > 0].tolist()) for stops in edges)
    whole = array[:, : sum(rows), : sum(columns)].rechunk((array.chunks[0], rows, columns))
    chunks = (array.chunks[0], *(tuple(size // factor for size in sizes) for sizes in (rows, columns)))
    return whole.map_blocks(_square_means, factor, dtype=np.uint8, chunks=chunks)


def _square_means(pixels: np.ndarray, side: int) -> np.ndarray:
    total = np.zeros((len(pixels), pixels.shape[1] // side, pixels.shape[2] // side), np.uint32)
    # one strided addition per pixel of a square: a reduction over short axes is several times slower
    for row in range(side):
        for column in range(side):
            total += pixels[:, row::side, column::side]
    return ((total + side**2 // 2) // side**2).astype(np.uint8)


def _is_crop(image: Any) -> bool:
    """Whether an image was cut by spatialdata's queries.

    They cut each level at whole pixels of its own, up to a pixel from where the finest is cut, and do not keep by how
    much. Of such an image only the finest level lies where its transformation says. A crop whose transformation the user
    replaced cannot be told; its coarser levels may lie up to a pixel of theirs off.
    """
    from spatialdata import transformations as known

    return any(
        isinstance(way, known.Sequence)
        and way.transformations
        and isinstance(way.transformations[0], known.Translation)
        for way in transformations_of(image).values()
    )


def _lies_on(finest: Any, array: Any, factor: int) -> bool:
    """Whether pixel *i* of a level is known to cover [i·factor, (i + 1)·factor) of the finest level."""
    for axis in ("x", "y"):
        large, small = finest.sizes[axis], array.sizes[axis]
        if axis in finest.coords and axis in array.coords:
            centres = array.coords[axis].values - finest.coords[axis].values[0] + 0.5
            steps = np.arange(small) + 0.5
            if np.allclose(centres, steps * factor, rtol=0, atol=1e-3):
                continue
            if not np.allclose(centres, steps * large / small, rtol=0, atol=1e-3):
                return False
        # spatialdata states the ratio of sizes, whatever was done with the odd rows: its own pyramids drop the first
        # ones, those of files the last
        if small * factor < large:
            return False
    return True


def _check_rgb(key: str, array: Any) -> Any:
    channels = array.sizes.get("c", 1)
    if channels == 4:
        raise ImageFormatError(
            f"image {key!r} has 4 channels (RGBA?); drop the alpha channel: image.isel(c=slice(0, 3))"
        )
    if channels != 3:
        raise ImageFormatError(
            f"image {key!r} has {channels} channel{'s' * (channels != 1)}; an H&E image has 3 (red, green, blue). "
            f"If it was read with axes in another order, pass dims= to Image2DModel.parse"
        )
    if array.dtype != np.uint8:
        fix = (
            "scale it to 0-255 and cast: (image * 255).astype('uint8') for values in [0, 1]"
            if array.dtype.kind == "f"
            else "rescale it to 0-255, for 16 bit: (image // 257).astype('uint8')"
        )
        raise ImageFormatError(f"image {key!r} is {array.dtype}, 8-bit RGB (uint8) is needed; {fix}")
    return array


def transformations_of(element: Any) -> dict[str, BaseTransformation]:
    """Transformations of an element by coordinate system."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, get_all=True)
