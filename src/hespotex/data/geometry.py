"""Where things lie: images, spots and microns. The only module that composes SpatialData's transformations.

Positions are (x right, y down) in pixels of an image's finest level, where pixel *i* covers [i, i + 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    ImageFormatError,
    MissingKeyError,
    ScaleError,
)
from .lattice import visium_pitch

if TYPE_CHECKING:
    import dask.array as da
    from geopandas import GeoDataFrame, GeoSeries
    from spatialdata import SpatialData
    from spatialdata.transformations import BaseTransformation

__all__ = [
    "Level",
    "Slide",
    "check_on_image",
    "find_image_key",
    "image_transformations",
    "is_microns",
    "level0_shape",
    "level_factor",
    "on_image",
    "pixel_maps",
    "resolve_slide",
    "shape_centres",
    "shape_geometries",
    "shape_positions",
    "shape_radius",
]

MAX_ANISOTROPY = 0.03  # beyond it one number cannot stand for the scale of both axes
MAX_UPSAMPLING = 2.0
LEVEL_SLACK = 1.01  # stored mpp are rounded: 0.5002 µm/px serves a wish for 0.5
PREVIEW_MPP = 2.0  # coarser than this, no nucleus is resolved: previews of Visium have 3-10 µm/px
VISIUM_PITCH_UM = 100.0


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


@dataclass(frozen=True, eq=False)
class Slide:
    """An H&E image as encoders and segmenters see it.

    Attributes
    ----------
    key
        Its name in ``sdata.images``.
    levels
        Pyramid, finest first.
    mpp
        µm per pixel of level 0, one isotropic number.
    to_microns
        Affine map of level-0 pixels (x, y, 1) to µm, (3, 3).
    """

    key: str
    levels: tuple[Level, ...]
    mpp: float
    to_microns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of level 0 in pixels."""
        height, width = self.levels[0].array.shape[-2:]
        return int(height), int(width)

    def level_for(self, mpp: float) -> Level:
        """The coarsest level that is not coarser than `mpp` (with 1 % slack); level 0 if none is.

        Raises
        ------
        ScaleError
            If `mpp` is finer than half the slide's own.
        """
        if not np.isfinite(mpp) or mpp <= 0:
            raise ScaleError(f"mpp={mpp!r} must be a positive number of µm per pixel")
        if mpp * MAX_UPSAMPLING * LEVEL_SLACK < self.mpp:
            raise ScaleError(
                f"image {self.key!r} has {self.mpp:.3g} µm/px; reading it at {mpp:.3g} µm/px would enlarge it "
                f"{self.mpp / mpp:.1f}-fold, and more than {MAX_UPSAMPLING:g}-fold invents detail. "
                f"Use mpp={self.mpp / MAX_UPSAMPLING:.3g} or coarser, or the full-resolution image"
            )
        fine_enough = [level for level in self.levels if self.mpp * level.downsample <= mpp * LEVEL_SLACK]
        return max(fine_enough, key=lambda level: level.downsample, default=self.levels[0])

    def microns(self, pixels: np.ndarray) -> np.ndarray:
        """Positions in µm of level-0 pixel positions (n, 2)."""
        return _apply(self.to_microns, pixels)

    def contains(self, pixels: np.ndarray) -> np.ndarray:
        """Whether each of the level-0 pixel positions (n, 2) lies on the image, (n,) bool."""
        return on_image(pixels, self.shape)


def on_image(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Whether each of the positions (n, 2) lies on an image of height and width `shape`, (n,) bool.

    Examples
    --------
    >>> import numpy as np
    >>> on_image(np.array([[0.0, 0.0], [9.9, 4.0], [10.0, 4.0]]), (5, 10)).tolist()
    [True, True, False]
    """
    height, width = shape
    return np.all((pixels >= 0) & (pixels < (width, height)), axis=1)


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


def resolve_slide(sdata: SpatialData, *, image_key: str | None = None) -> Slide:
    """The one RGB image of `sdata` (or the one named), with its scale.

    The scale is the image's transformation to the coordinate system in µm or, where there is none, the spacing of
    Visium spots (100 µm) that lie on the image. It is never guessed.

    Parameters
    ----------
    sdata
        Object with an 8-bit RGB image (c, y, x), single- or multiscale.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If there is no such image, or several and none named.
    ImageFormatError
        If the image is not 8-bit RGB.
    ScaleError
        If the pixel size is unknown, or differs between x and y by more than 3 %.

    Warns
    -----
    HespotexWarning
        If a pixel is so large that the image is probably a preview.
    """
    key = find_image_key(sdata, image_key)
    levels = _levels(key, sdata.images[key])
    to_microns = _to_microns(sdata, key)
    if to_microns is None:
        spacing = _mpp_from_visium(sdata, key)
        if spacing is None:
            raise ScaleError(
                f"the pixel size of image {key!r} is unknown: it has no transformation to a coordinate system "
                f"{Keys.MICRONS!r} and no Visium spots to measure it by. Set it with hx.pp.set_scale(sdata, mpp=...), "
                f"or pass it to hx.tl.predict(..., mpp=...)"
            )
        to_microns = np.diag([spacing, spacing, 1.0])
    slide = Slide(key=key, levels=levels, mpp=_isotropic(key, to_microns), to_microns=to_microns)
    if slide.mpp > PREVIEW_MPP:
        warnings.warn(
            f"image {key!r} has {slide.mpp:.3g} µm/px, at which nuclei are not resolved: it is probably a downscaled "
            f"preview. Predictions are better from the full-resolution image",
            HespotexWarning,
            stacklevel=3,
        )
    return slide


def shape_centres(sdata: SpatialData, shapes_key: str, slide: Slide) -> np.ndarray:
    """Centres (x, y) of the shapes in level-0 pixels of `slide`, (n, 2), in the order of the shapes.

    Raises
    ------
    MissingKeyError
        If there are no such shapes.
    GeometryError
        If shapes and image share no coordinate system, or two that contradict each other.
    """
    centroids = _shapes(sdata, shapes_key).geometry.centroid
    xy = np.column_stack([centroids.x.to_numpy(), centroids.y.to_numpy()]).astype(np.float64)
    return _apply(_to_pixels(sdata, shapes_key, slide.key), xy)


def shape_geometries(sdata: SpatialData, shapes_key: str, slide: Slide) -> GeoSeries:
    """Outlines of the shapes in level-0 pixels of `slide`; circles become polygons."""
    shapes = _shapes(sdata, shapes_key)
    geometry = shapes.geometry
    if "radius" in shapes and (geometry.geom_type == "Point").all():
        geometry = geometry.buffer(shapes["radius"])
    matrix = _to_pixels(sdata, shapes_key, slide.key)
    return geometry.affine_transform([*matrix[0, :2], *matrix[1, :2], matrix[0, 2], matrix[1, 2]])


def shape_radius(sdata: SpatialData, shapes_key: str, slide: Slide) -> float:
    """Median radius in µm of the shapes (half the mean side for polygons)."""
    shapes = _shapes(sdata, shapes_key)
    if len(shapes) == 0:
        raise GeometryError(f"shapes {shapes_key!r} are empty, so they have no size")
    points = (shapes.geometry.geom_type == "Point").all()
    if points and "radius" not in shapes:
        raise GeometryError(f"shapes {shapes_key!r} are points without a column 'radius', so they have no size")
    radius = shapes["radius"].to_numpy() if points else np.sqrt(shapes.geometry.area.to_numpy()) / 2
    linear = _to_pixels(sdata, shapes_key, slide.key)[:2, :2]
    return float(np.median(radius) * np.sqrt(abs(np.linalg.det(linear))) * slide.mpp)


def find_image_key(sdata: SpatialData, image_key: str | None = None, *, shapes_key: str | None = None) -> str:
    """The image that is meant: the one named, the only one, or the only one that `shapes_key` lies on.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If there is none, or several and none named.
    """
    if not hasattr(sdata, "images"):
        raise DataTypeError(f"a SpatialData with an image is needed, got {type(sdata).__name__}")
    there = list(sdata.images)
    if image_key is not None:
        if image_key not in there:
            raise MissingKeyError(f"image_key={image_key!r} is not among the images {there}")
        return image_key
    if not there:
        raise MissingKeyError("the object holds no image; add the H&E to sdata.images or read it with hx.io")
    if len(there) > 1 and shapes_key is not None:
        systems = set(_transformations(_shapes(sdata, shapes_key)))
        connected = [name for name in there if systems & set(_transformations(sdata.images[name]))]
        there = connected or there
    if len(there) > 1:
        full = [name for name in there if name.endswith("_full_image")]
        advice = f"; the full-resolution one is image_key={full[0]!r}" if len(full) == 1 else ""
        raise AmbiguousKeyError(f"there are several images, name one with image_key=: {there}{advice}")
    return there[0]


def is_microns(coordinate_system: str) -> bool:
    """Whether a coordinate system is ours in µm; ``spatialdata.concatenate`` adds ``-<section>`` to its name."""
    return coordinate_system == Keys.MICRONS or coordinate_system.startswith(f"{Keys.MICRONS}-")


def level0_shape(sdata: SpatialData, image_key: str) -> tuple[int, int]:
    """Height and width of an image in pixels, after checking that it is 8-bit RGB."""
    height, width = _levels(image_key, sdata.images[image_key])[0].array.shape[1:]
    return int(height), int(width)


def shape_positions(sdata: SpatialData, shapes_key: str) -> tuple[np.ndarray, str]:
    """Centres (n, 2) of the shapes without any image, and the coordinate system they are given in.

    That is the one in µm where the shapes are in it, else ``"global"`` or the first of their systems.
    """
    shapes = _shapes(sdata, shapes_key)
    systems = _transformations(shapes)
    system = min(systems, key=_preference)
    centroids = shapes.geometry.centroid
    return _apply(_matrix(systems[system]), np.column_stack([centroids.x, centroids.y])), system


def pixel_maps(sdata: SpatialData, image_key: str) -> dict[tuple[str, str], np.ndarray]:
    """Affine maps to an image's level-0 pixels of all elements that share a coordinate system with it, by kind and name."""
    maps = {("images", image_key): np.eye(3)}
    image = _transformations(sdata.images[image_key])
    for kind in ("images", "labels", "shapes", "points"):
        for name, element in getattr(sdata, kind).items():
            own = _transformations(element)
            if (kind, name) in maps or not (shared := set(own) & set(image)):
                continue
            system = min(shared, key=_preference)
            maps[kind, name] = np.linalg.solve(_matrix(image[system]), _matrix(own[system]))
    return maps


def image_transformations(sdata: SpatialData, image_key: str) -> dict[str, BaseTransformation]:
    """All transformations of an image: what an element in its level-0 pixels must carry, too."""
    return _transformations(sdata.images[image_key])


def _levels(key: str, image: Any) -> tuple[Level, ...]:
    """The finest level and coarser ones: as stored where they are known to lie on it, else computed when read."""
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
    return tuple(levels)


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
        for way in _transformations(image).values()
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


def _transformations(element: Any) -> dict[str, BaseTransformation]:
    from spatialdata.transformations import get_transformation

    return get_transformation(element, get_all=True)


def _matrix(transformation: BaseTransformation) -> np.ndarray:
    return np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), dtype=np.float64)


def _preference(system: str) -> tuple[bool, bool, str]:
    """Order in which coordinate systems are tried; any that two elements share would do."""
    return not is_microns(system), system != "global", system


def _apply(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return np.asarray(xy, dtype=np.float64) @ matrix[:2, :2].T + matrix[:2, 2]


def _isotropic(key: str, to_microns: np.ndarray) -> float:
    """One scale of an affine map: the geometric mean of its singular values, whatever its rotation."""
    large, small = np.linalg.svd(to_microns[:2, :2], compute_uv=False)
    if not np.isfinite(large) or small <= 0:
        raise ScaleError(f"image {key!r}: its transformation to µm is degenerate; set it with hx.pp.set_scale")
    if large / small - 1 > MAX_ANISOTROPY:
        raise ScaleError(
            f"image {key!r} has {large:.4g} µm/px along one axis and {small:.4g} along the other; hespotex needs one "
            f"scale within {MAX_ANISOTROPY:.0%}. Resample the image to square pixels, or correct its transformation "
            f"with hx.pp.set_scale"
        )
    return float(np.sqrt(large * small))


def _to_microns(sdata: SpatialData, key: str) -> np.ndarray | None:
    known = _transformations(sdata.images[key])
    if Keys.MICRONS in known:
        return _matrix(known[Keys.MICRONS])
    suffixed = [name for name in known if is_microns(name)]
    return _matrix(known[suffixed[0]]) if len(suffixed) == 1 else None


def _mpp_from_visium(sdata: SpatialData, image_key: str) -> float | None:
    """µm per pixel by the spots on the image, if a table says that they lie on Visium's hexagonal array."""
    for name, positions in _arrays(sdata):
        try:
            matrix = _to_pixels(sdata, name, image_key)
        except GeometryError:
            continue
        centroids = sdata.shapes[name].geometry.centroid.loc[positions[Keys.INSTANCE]]
        xy = _apply(matrix, np.column_stack([centroids.x, centroids.y]))
        pitch_px = visium_pitch(xy, positions[Keys.ARRAY_ROW], positions[Keys.ARRAY_COL])
        if pitch_px is not None:
            mpp = VISIUM_PITCH_UM / pitch_px
            logger.info("image %r: %.4g µm/px by the 100 µm pitch of the Visium spots %r", image_key, mpp, name)
            return mpp
    return None


def _arrays(sdata: SpatialData) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Shapes whose table gives an array position to each: name, instance ids, rows and columns of the array."""
    from spatialdata.models import get_table_keys

    for table in sdata.tables.values():
        if not {Keys.ARRAY_ROW, Keys.ARRAY_COL} <= set(table.obs.columns) or "spatialdata_attrs" not in table.uns:
            continue
        regions, region_key, instance_key = get_table_keys(table)
        for name in [regions] if isinstance(regions, str) else regions:
            if name not in sdata.shapes:
                continue
            rows = table.obs[(table.obs[region_key] == name) & table.obs[instance_key].isin(sdata.shapes[name].index)]
            yield (
                name,
                {
                    Keys.INSTANCE: rows[instance_key].to_numpy(),
                    Keys.ARRAY_ROW: rows[Keys.ARRAY_ROW].to_numpy(dtype=np.float64),
                    Keys.ARRAY_COL: rows[Keys.ARRAY_COL].to_numpy(dtype=np.float64),
                },
            )


def _shapes(sdata: SpatialData, shapes_key: str) -> GeoDataFrame:
    if shapes_key not in sdata.shapes:
        raise MissingKeyError(f"shapes_key={shapes_key!r} is not among the shapes {list(sdata.shapes)}")
    return sdata.shapes[shapes_key]


def _to_pixels(sdata: SpatialData, shapes_key: str, image_key: str) -> np.ndarray:
    """Affine map of stored shape coordinates to level-0 pixels: inverse(image → system) ∘ (shapes → system)."""
    image = _transformations(sdata.images[image_key])
    shapes = _transformations(sdata.shapes[shapes_key])
    shared = sorted(set(image) & set(shapes), key=_preference)
    if not shared:
        raise GeometryError(
            f"shapes {shapes_key!r} (in {sorted(shapes)}) and image {image_key!r} (in {sorted(image)}) share no "
            f"coordinate system; align them with spatialdata.transformations.set_transformation"
        )
    try:
        ways = {name: np.linalg.solve(_matrix(image[name]), _matrix(shapes[name])) for name in shared}
    except np.linalg.LinAlgError:
        raise GeometryError(f"a transformation of image {image_key!r} cannot be inverted") from None
    _check_agreement(sdata.shapes[shapes_key], shapes_key, image_key, ways)
    return ways[shared[0]]


def _check_agreement(shapes: GeoDataFrame, shapes_key: str, image_key: str, ways: dict[str, np.ndarray]) -> None:
    """Raise if two coordinate systems place the shapes differently: one of them must be wrong."""
    if len(ways) < 2 or len(shapes) == 0:
        return
    left, top, right, bottom = shapes.total_bounds
    corners = np.array([[left, top], [right, top], [left, bottom], [right, bottom]])
    (first, matrix), *others = ways.items()
    expected = _apply(matrix, corners)
    tolerance = 1 + 1e-3 * np.ptp(expected, axis=0).max()
    for name, other in others:
        distance = float(np.abs(_apply(other, corners) - expected).max())
        if not distance <= tolerance:
            raise GeometryError(
                f"coordinate systems {first!r} and {name!r} place shapes {shapes_key!r} {distance:.0f} px apart on "
                f"image {image_key!r}; remove the wrong one with spatialdata.transformations.remove_transformation"
            )


def check_on_image(slide: Slide, centres: np.ndarray, what: str) -> None:
    """Raise unless each of `centres` (level-0 pixels) lies on the image.

    Raises
    ------
    GeometryError
        Saying how many do not, and what is the usual cause.
    """
    if not np.isfinite(centres).all():
        raise DataValueError(f"{what}: {int((~np.isfinite(centres)).any(axis=1).sum())} centres are not finite")
    outside = ~slide.contains(centres)
    if outside.any():
        height, width = slide.shape
        raise GeometryError(
            f"{int(outside.sum())} of {len(centres)} {what} lie outside image {slide.key!r} ({width} × {height} px), "
            f"the first at x={centres[outside][0, 0]:.0f}, y={centres[outside][0, 1]:.0f}. Either the coordinates "
            f"refer to another image, or x and y are swapped, or they should be filtered out first"
        )
