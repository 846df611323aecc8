"""Outlines and shape numbers of labelled regions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataValueError
from ..image.color import stain_tables

__all__ = ["FEATURES", "SIMPLIFY_UM", "Regions", "measure_regions", "simplify_outlines"]

FEATURES = (
    "area_um2",
    "perimeter_um",
    "major_axis_um",
    "minor_axis_um",
    "eccentricity",
    "circularity",
    "solidity",
    "mean_haematoxylin",
    "std_haematoxylin",
)

SIMPLIFY_UM = 0.25
_MAX_SIMPLIFY_PX = 0.5
_LEFT, _TOP, _RIGHT, _BOTTOM = range(6, 10)  # columns of the sums
_MAX_AREA_CHANGE = 0.02  # by simplification; tiny regions that would lose more keep their steps


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of one or many label images, in their pixels, where pixel *i* covers [i, i + 1).

    Attributes
    ----------
    names
        Label of each in the image it came from, (n,) int64.
    boxes
        Bounding boxes (y0, x0, y1, x1), (n, 4) int64.
    masks
        Pixels inside each box, a list of (h, w) bool.
    centroids
        Centres of mass (x, y), (n, 2).
    polygons
        Outlines, (n,) shapely polygons; holes are closed, of several pieces the one with the longest outline is taken.
    features
        See :data:`FEATURES`, (n, 9) float32.
    """

    names: np.ndarray
    boxes: np.ndarray
    masks: list[np.ndarray]
    centroids: np.ndarray
    polygons: np.ndarray
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.masks)


def measure_regions(
    labels: np.ndarray,
    rgb: np.ndarray,
    mpp: float,
    keep: tuple[slice, slice] | None = None,
    origin: tuple[int, int] = (0, 0),
    *,
    simplify_um: float = SIMPLIFY_UM,
) -> Regions:
    """Outline and measure the regions of a label image.

    Parameters
    ----------
    labels
        (h, w) whole numbers, none negative; 0 is background.
    rgb
        The image, (h, w, 3) uint8.
    mpp
        µm per pixel.
    keep
        Only regions whose centroid lies in these rows and columns.
    origin
        Position (y, x) of the first pixel: added to all coordinates.
    simplify_um
        Tolerance in µm within which outlines are simplified, see :func:`simplify_outlines`; 0 leaves the line through the
        middles of pixel sides. More than half a pixel counts as that. Features are of the full outline.

    Raises
    ------
    DataValueError
        If `simplify_um` is not a number of at least 0.
    """
    from ._components import region_sums
    from ._trace import trace_outlines

    if not (np.isfinite(simplify_um) and simplify_um >= 0):
        raise DataValueError(f"simplify_um={simplify_um!r} must be a number of µm, 0 for full outlines")
    names, compact = _compact(labels)
    if not len(names):
        return _nothing()
    sums = region_sums(compact, len(names))
    moments = _moments(sums, origin)
    wanted = np.ones(len(sums), dtype=bool)
    if keep is not None:
        # In coordinates that all blocks share, so that no rounding gives a region to two of them or to none.
        (top, bottom), (left, right) = (
            (part.start + first, part.stop + first) for part, first in zip(keep, origin, strict=True)
        )
        y, x = moments["y"], moments["x"]
        wanted = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    wanted[0] = False
    kept = np.flatnonzero(wanted)
    boxes = sums[kept][:, [_TOP, _LEFT, _BOTTOM, _RIGHT]] + np.array([0, 0, 1, 1])
    masks = [
        compact[top:bottom, left:right] == name
        for name, (top, left, bottom, right) in zip(kept.tolist(), boxes.tolist(), strict=True)
    ]
    vertices, starts, lengths, turns = trace_outlines(compact, wanted)
    outlines = _Outlines.of(vertices, starts[kept], lengths[kept], turns[kept])
    features = _features(compact, rgb, {name: values[kept] for name, values in moments.items()}, kept, outlines, mpp)
    shift = np.array([origin[1], origin[0]])
    return Regions(
        names[kept - 1],
        boxes + np.array([*origin, *origin]),
        masks,
        np.column_stack([moments["x"], moments["y"]])[kept],
        simplify_outlines(outlines.polygons(shift), simplify_um / mpp),
        features,
    )


def _nothing() -> Regions:
    return Regions(
        names=np.empty(0, dtype=np.int64),
        boxes=np.empty((0, 4), dtype=np.int64),
        masks=[],
        centroids=np.empty((0, 2)),
        polygons=np.empty(0, dtype=object),
        features=np.empty((0, len(FEATURES)), dtype=np.float32),
    )


def simplify_outlines(polygons: np.ndarray, tolerance_px: float) -> np.ndarray:
    """Polygons with fewer vertices, by Douglas and Peucker's algorithm.

    Parameters
    ----------
    polygons
        (n,) shapely polygons without holes.
    tolerance_px
        How far a vertex that is left out may lie from the line that remains (half as far again where the ring begins);
        more than half a pixel counts as that. Polygons that would become invalid or change their area by over 2 % are done
        with half of it, or stay as they are.

    Examples
    --------
    >>> import numpy as np, shapely
    >>> disc = np.array([shapely.Point(0, 0).buffer(8, 64)])
    >>> print(shapely.get_num_coordinates(disc), shapely.get_num_coordinates(simplify_outlines(disc, 0.25)))
    [257] [33]
    """
    import shapely

    out = polygons.copy()
    tolerance = min(tolerance_px, _MAX_SIMPLIFY_PX)
    left = np.arange(len(out))
    for step in (tolerance, tolerance / 2):
        if step == 0 or not len(left):
            break
        full = polygons[left]
        simple = shapely.simplify(full, step, preserve_topology=False)
        change = np.abs(shapely.area(simple) / shapely.area(full) - 1)
        good = (change <= _MAX_AREA_CHANGE) & shapely.is_valid(simple)
        out[left[good]] = simple[good]
        left = left[~good]
    return out


def _compact(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, rising, and the image with them numbered 1…n."""
    highest = int(labels.max(initial=0))
    if highest <= labels.size:
        occurs = np.zeros(highest + 1, dtype=bool)
        occurs[labels] = True
        occurs[0] = False
        names = np.flatnonzero(occurs)
        if len(names) == highest:
            return names, labels.astype(np.int32, copy=False)
        return names, np.where(occurs, np.cumsum(occurs), 0).astype(np.int32)[labels]
    found, inverse = np.unique(labels, return_inverse=True)
    real = found != 0
    number = np.where(real, np.cumsum(real), 0).astype(np.int32)
    return found[real].astype(np.int64), number[inverse.reshape(labels.shape)]


def _moments(sums: np.ndarray, origin: tuple[int, int]) -> dict[str, np.ndarray]:
    """Area, centre of mass (in pixels that cover [i, i + 1)) and variances of each region, from its whole sums.

    Centres are moved by `origin` (y, x) before anything is divided: they are the same bits from whatever block.
    """
    area, x, y, xx, yy, xy = np.maximum(sums[:, :6], [1, 0, 0, 0, 0, 0]).T
    square = area.astype(np.float64) ** 2
    return {
        "area": area.astype(np.float64),
        "y": (y + area * origin[0]) / area + 0.5,
        "x": (x + area * origin[1]) / area + 0.5,
        # Differences of whole numbers: nothing is lost, wherever in the image a region lies.
        "yy": (area * yy - y * y) / square + 1 / 12,
        "xx": (area * xx - x * x) / square + 1 / 12,
        "xy": (area * xy - x * y) / square,
    }


@dataclass(frozen=True, eq=False)
class _Outlines:
    """Outlines through the middles of pixel sides, one after the other.

    Attributes
    ----------
    vertices
        Twice (x, y), (m, 2) int32.
    owner
        Which region each belongs to, rising, (m,).
    lengths, turns
        Vertices and corners of each region's.
    """

    vertices: np.ndarray
    owner: np.ndarray
    lengths: np.ndarray
    turns: np.ndarray

    @classmethod
    def of(cls, vertices: np.ndarray, starts: np.ndarray, lengths: np.ndarray, turns: np.ndarray) -> _Outlines:
        """Those that begin at `starts`, in that order."""
        owner = np.repeat(np.arange(len(starts)), lengths)
        first = np.cumsum(lengths) - lengths
        return cls(vertices[np.arange(len(owner)) + (starts - first)[owner]], owner, lengths, turns)

    def polygons(self, shift: np.ndarray) -> np.ndarray:
        """As polygons, in pixels, moved by `shift` (x, y)."""
        from shapely import linearrings, polygons

        if not len(self.lengths):
            return np.empty(0, dtype=object)
        return polygons(linearrings(self.vertices / 2 + shift, indices=self.owner))

    def perimeters(self) -> np.ndarray:
        """Lengths in pixels: a step along a side is 1 long, one across a corner the root of a half."""
        return self.lengths - self.turns * (1 - np.sqrt(0.5))

    def areas(self) -> np.ndarray:
        """Areas in pixels, by the shoelace formula in whole numbers."""
        x, y = self.vertices.T.astype(np.int64)
        following = np.arange(1, len(self.owner) + 1)
        following[np.cumsum(self.lengths) - 1] = np.cumsum(self.lengths) - self.lengths
        cross = x * y[following] - x[following] * y
        return np.add.reduceat(cross, np.cumsum(self.lengths) - self.lengths) / 8


def _features(
    labels: np.ndarray,
    rgb: np.ndarray,
    moments: dict[str, np.ndarray],
    kept: np.ndarray,
    outlines: _Outlines,
    mpp: float,
) -> np.ndarray:
    from ._trace import hull_areas, sum_dye

    if not len(kept):
        return np.zeros((0, len(FEATURES)), dtype=np.float32)
    half_trace = (moments["xx"] + moments["yy"]) / 2
    root = np.sqrt(((moments["xx"] - moments["yy"]) / 2) ** 2 + moments["xy"] ** 2)
    large, small = half_trace + root, np.maximum(half_trace - root, 1e-9)
    perimeter, outline = outlines.perimeters(), outlines.areas()
    haematoxylin, squared = sum_dye(labels, rgb, stain_tables()[0], int(labels.max()))[:, kept] / moments["area"]
    columns = {
        "area_um2": moments["area"] * mpp**2,
        "perimeter_um": perimeter * mpp,
        "major_axis_um": 4 * np.sqrt(large) * mpp,
        "minor_axis_um": 4 * np.sqrt(small) * mpp,
        "eccentricity": np.sqrt(1 - small / large),
        "circularity": 4 * np.pi * outline / perimeter**2,
        "solidity": outline / hull_areas(outlines.vertices, outlines.lengths),
        "mean_haematoxylin": haematoxylin,
        "std_haematoxylin": np.sqrt(np.maximum(squared - haematoxylin**2, 0)),
    }
    return np.column_stack([columns[name] for name in FEATURES]).astype(np.float32)
