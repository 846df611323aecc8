"""Where things lie: images, spots and microns. The only module that composes SpatialData's transformations.

Positions are (x right, y down) in pixels of an image's finest level, where pixel *i* covers [i, i + 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    ScaleError,
)
from .lattice import array_lattice
from .pyramid import Level, levels_of, transformations_of
from .wsi import has_reader, slide_of_reader, stated_by_reader

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from spatialdata import SpatialData
    from spatialdata.transformations import BaseTransformation
    from xarray import DataArray, DataTree

__all__ = [
    "Slide",
    "check_on_image",
    "find_image_key",
    "image_transformations",
    "is_microns",
    "level0_shape",
    "on_image",
    "pixel_maps",
    "resolve_slide",
    "shape_centres",
    "shape_geometries",
    "shape_positions",
    "shape_radii",
    "shape_radius",
    "slide_element",
    "slide_images",
]

MAX_ANISOTROPY = 0.03  # beyond it one number cannot stand for the scale of both axes
MAX_UPSAMPLING = 2.0
LEVEL_SLACK = 1.01  # stored mpp are rounded: 0.5002 µm/px serves a wish for 0.5
PREVIEW_MPP = 2.0  # coarser than this, no nucleus is resolved: previews of Visium have 3-10 µm/px
VISIUM_PITCH_UM = 100.0
_LAZYSLIDE = "slide_properties"  # in the attrs of what a WSIData wrote


@dataclass(frozen=True, eq=False)
class Slide:
    """An H&E image as encoders and segmenters see it.

    Attributes
    ----------
    key
        Its name in ``sdata.images``; ``"wsi"`` for the slide of a ``WSIData``, which is not among them.
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
                f"Use the full-resolution image, or work at {self.mpp / MAX_UPSAMPLING:.3g} µm/px or coarser"
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


def resolve_slide(sdata: SpatialData, *, image_key: str | None = None) -> Slide:
    """The one RGB image of `sdata` (or the one named), with its scale.

    The scale is the image's transformation to the coordinate system in µm or, where there is none, the spacing of
    Visium spots (100 µm) that lie on the image. It is never guessed.

    Parameters
    ----------
    sdata
        Object with an 8-bit RGB image (c, y, x), single- or multiscale; or LazySlide's ``WSIData``, whose slide is meant
        unless another image is named.
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
    levels = levels_of(key, slide_element(sdata, key))
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
    import shapely

    shapes = _shapes(sdata, shapes_key)
    geometry = shapes.geometry
    if "radius" in shapes and (geometry.geom_type == "Point").all():
        geometry = geometry.buffer(shapes["radius"])
    matrix = _to_pixels(sdata, shapes_key, slide.key)
    if np.allclose(matrix, np.eye(3), rtol=0, atol=1e-12):
        return geometry
    # geopandas maps one geometry at a time, which for a fine grid takes most of a minute.
    mapped = shapely.transform(geometry.to_numpy(), lambda xy: _apply(matrix, xy))
    return type(geometry)(mapped, index=geometry.index)


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


def shape_radii(sdata: SpatialData, shapes_key: str, slide: Slide) -> np.ndarray | None:
    """Radius of each circle in level-0 pixels, (n,); ``None`` if the shapes are no circles."""
    shapes = _shapes(sdata, shapes_key)
    if "radius" not in shapes or not (shapes.geometry.geom_type == "Point").all():
        return None
    linear = _to_pixels(sdata, shapes_key, slide.key)[:2, :2]
    return shapes["radius"].to_numpy(dtype=np.float64) * float(np.sqrt(abs(np.linalg.det(linear))))


def slide_images(sdata: SpatialData) -> list[str]:
    """Names of the images, without the rasters that predictions were drawn as (:func:`hespotex.get.raster`)."""
    return [name for name in sdata.images if name.removesuffix(Keys.RASTER) not in sdata.tables]


def slide_element(sdata: SpatialData, image_key: str) -> DataArray | DataTree:
    """The image of that name as found by :func:`find_image_key`: one of ``sdata.images``, or the slide of a ``WSIData``."""
    if image_key == Keys.WSI and has_reader(sdata):
        return slide_of_reader(sdata)
    return sdata.images[image_key]


def find_image_key(sdata: SpatialData, image_key: str | None = None, *, shapes_key: str | None = None) -> str:
    """The image that is meant: the one named, the only one, or the only one that `shapes_key` lies on.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If there is none, or several and none named.
    """
    if not hasattr(sdata, "images"):
        raise DataTypeError(f"a SpatialData with an image is needed, got {type(sdata).__name__}")
    if has_reader(sdata) and image_key in (None, Keys.WSI):
        return Keys.WSI
    if image_key is not None:
        if image_key not in sdata.images:
            raise MissingKeyError(f"image_key={image_key!r} is not among the images {list(sdata.images)}")
        return image_key
    there = slide_images(sdata)
    if not there:
        if _LAZYSLIDE in sdata.attrs:
            raise MissingKeyError(
                "the object holds no image: it is what LazySlide stores beside a slide; open both with "
                "wsidata.open_wsi(path of the slide)"
            )
        raise MissingKeyError("the object holds no image; add the H&E to sdata.images or read it with hx.io")
    if len(there) > 1 and shapes_key is not None:
        systems = set(transformations_of(_shapes(sdata, shapes_key)))
        connected = [name for name in there if systems & set(transformations_of(sdata.images[name]))]
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
    height, width = levels_of(image_key, slide_element(sdata, image_key))[0].array.shape[1:]
    return int(height), int(width)


def shape_positions(sdata: SpatialData, shapes_key: str) -> tuple[np.ndarray, str]:
    """Centres (n, 2) of the shapes without any image, and the coordinate system they are given in.

    That is the one in µm where the shapes are in it, else ``"global"`` or the first of their systems.
    """
    shapes = _shapes(sdata, shapes_key)
    systems = transformations_of(shapes)
    system = min(systems, key=_preference)
    centroids = shapes.geometry.centroid
    return _apply(_matrix(systems[system]), np.column_stack([centroids.x, centroids.y])), system


def pixel_maps(sdata: SpatialData, image_key: str) -> dict[tuple[str, str], np.ndarray]:
    """Affine maps to an image's level-0 pixels of all elements that share a coordinate system with it, by kind and name."""
    maps = {("images", image_key): np.eye(3)}
    image = transformations_of(slide_element(sdata, image_key))
    for kind in ("images", "labels", "shapes", "points"):
        for name, element in getattr(sdata, kind).items():
            own = transformations_of(element)
            if (kind, name) in maps or not (shared := set(own) & set(image)):
                continue
            system = min(shared, key=_preference)
            maps[kind, name] = np.linalg.solve(_matrix(image[system]), _matrix(own[system]))
    return maps


def image_transformations(sdata: SpatialData, image_key: str) -> dict[str, BaseTransformation]:
    """All transformations of an image: what an element in its level-0 pixels must carry, too."""
    return transformations_of(slide_element(sdata, image_key))


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
    known = transformations_of(slide_element(sdata, key))
    if Keys.MICRONS in known:
        return _matrix(known[Keys.MICRONS])
    suffixed = [name for name in known if is_microns(name)]
    if len(suffixed) == 1:
        return _matrix(known[suffixed[0]])
    mpp = stated_by_reader(sdata, level0_shape(sdata, key))
    return None if mpp is None else np.diag([mpp, mpp, 1.0])


def _mpp_from_visium(sdata: SpatialData, image_key: str) -> float | None:
    """µm per pixel by the spots on the image, if a table says that they lie on Visium's hexagonal array."""
    for name, positions in _arrays(sdata):
        try:
            matrix = _to_pixels(sdata, name, image_key)
        except GeometryError:
            continue
        centroids = sdata.shapes[name].geometry.centroid.loc[positions[Keys.INSTANCE]]
        xy = _apply(matrix, np.column_stack([centroids.x, centroids.y]))
        lattice = array_lattice(xy, positions[Keys.ARRAY_ROW], positions[Keys.ARRAY_COL])
        if lattice is not None and lattice.kind == "hex":
            mpp = VISIUM_PITCH_UM / lattice.pitch
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
    image = transformations_of(slide_element(sdata, image_key))
    shapes = transformations_of(sdata.shapes[shapes_key])
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
