"""Outlines and shape numbers of labelled regions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..image.color import haematoxylin as haematoxylin_of

__all__ = ["FEATURES", "Regions", "measure_regions"]

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

    def take(self, rows: np.ndarray) -> Regions:
        """Some of the regions, in the order of `rows`."""
        return Regions(
            self.names[rows],
            self.boxes[rows],
            [self.masks[row] for row in rows],
            self.centroids[rows],
            self.polygons[rows],
            self.features[rows],
        )

    @classmethod
    def concatenate(cls, parts: list[Regions]) -> Regions:
        """All regions of `parts`, one after the other."""
        return cls(
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            [mask for part in parts for mask in part.masks],
            np.concatenate([part.centroids for part in parts]),
            np.concatenate([part.polygons for part in parts]),
            np.concatenate([part.features for part in parts]),
        )


def measure_regions(
    labels: np.ndarray,
    rgb: np.ndarray,
    mpp: float,
    keep: tuple[slice, slice] | None = None,
    origin: tuple[int, int] = (0, 0),
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
    """
    from scipy import ndimage

    names, compact = _compact(labels)
    moments = _moments(compact, len(names))
    inside = np.ones(len(names), dtype=bool)
    if keep is not None:
        rows, columns = keep
        y, x = moments["y"], moments["x"]
        inside = (y >= rows.start) & (y < rows.stop) & (x >= columns.start) & (x < columns.stop)
    kept = np.flatnonzero(inside)
    slices = ndimage.find_objects(compact, len(names))
    masks = [compact[slices[index]] == index + 1 for index in kept]
    boxes = np.array(
        [[slices[i][0].start, slices[i][1].start, slices[i][0].stop, slices[i][1].stop] for i in kept], dtype=np.int64
    ).reshape(-1, 4)
    boxes += np.array([*origin, *origin])
    polygons = _polygons(masks, boxes)
    features = _features(compact, rgb, {name: values[kept] for name, values in moments.items()}, kept, polygons, mpp)
    centroids = np.column_stack([moments["x"], moments["y"]])[kept] + np.array([origin[1], origin[0]])
    return Regions(names[kept], boxes, masks, centroids, polygons, features)


def _compact(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, rising, and the image with them numbered 1…n."""
    names, inverse = np.unique(labels, return_inverse=True)
    real = names != 0
    number = np.where(real, np.cumsum(real), 0).astype(np.int32)
    return names[real].astype(np.int64), number[inverse.reshape(labels.shape)]


def _moments(labels: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Area, centre of mass (in pixels that cover [i, i + 1)) and variances of each region."""
    pixels = np.flatnonzero(labels)
    names = labels.ravel()[pixels] - 1
    y, x = (axis + 0.5 for axis in np.divmod(pixels, labels.shape[1]))
    area = np.bincount(names, minlength=count).astype(np.float64)
    mean_y, mean_x = (np.bincount(names, axis, count) / area for axis in (y, x))
    y, x = y - mean_y[names], x - mean_x[names]
    return {
        "area": area,
        "y": mean_y,
        "x": mean_x,
        "yy": np.bincount(names, y * y, count) / area + 1 / 12,
        "xx": np.bincount(names, x * x, count) / area + 1 / 12,
        "xy": np.bincount(names, x * y, count) / area,
    }


def _polygons(masks: list[np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Outlines of the masks, made in one call for all."""
    from shapely import linearrings, polygons
    from skimage.measure import find_contours

    if not masks:
        return np.empty(0, dtype=object)
    rings = []
    for mask, (top, left, _, _) in zip(masks, boxes.tolist(), strict=True):
        ring = max(find_contours(np.pad(mask, 1).astype(np.float32), 0.5), key=len)
        # The centre of pixel i lies at i + 0.5, and the padding moved it by one.
        rings.append(ring[:, ::-1] + (left - 0.5, top - 0.5))
    owner = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    return polygons(linearrings(np.concatenate(rings), indices=owner))


def _features(
    labels: np.ndarray,
    rgb: np.ndarray,
    moments: dict[str, np.ndarray],
    kept: np.ndarray,
    polygons: np.ndarray,
    mpp: float,
) -> np.ndarray:
    from shapely import area as area_of
    from shapely import convex_hull, length

    if not len(kept):
        return np.zeros((0, len(FEATURES)), dtype=np.float32)
    half_trace = (moments["xx"] + moments["yy"]) / 2
    root = np.sqrt(((moments["xx"] - moments["yy"]) / 2) ** 2 + moments["xy"] ** 2)
    large, small = half_trace + root, np.maximum(half_trace - root, 1e-9)
    perimeter = length(polygons)
    outline = area_of(polygons)
    haematoxylin, squared = _mean_haematoxylin(labels, rgb, kept, moments["area"])
    columns = {
        "area_um2": moments["area"] * mpp**2,
        "perimeter_um": perimeter * mpp,
        "major_axis_um": 4 * np.sqrt(large) * mpp,
        "minor_axis_um": 4 * np.sqrt(small) * mpp,
        "eccentricity": np.sqrt(1 - small / large),
        "circularity": 4 * np.pi * outline / perimeter**2,
        "solidity": outline / area_of(convex_hull(polygons)),
        "mean_haematoxylin": haematoxylin,
        "std_haematoxylin": np.sqrt(np.maximum(squared - haematoxylin**2, 0)),
    }
    return np.column_stack([columns[name] for name in FEATURES]).astype(np.float32)


def _mean_haematoxylin(
    labels: np.ndarray, rgb: np.ndarray, kept: np.ndarray, area: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean amount of haematoxylin in the regions kept, and mean of its square."""
    pixels = np.flatnonzero(labels)
    names = labels.ravel()[pixels] - 1
    amount = haematoxylin_of(rgb.reshape(-1, 3)[pixels]).astype(np.float64)
    return np.bincount(names, amount)[kept] / area, np.bincount(names, amount**2)[kept] / area
