"""Regions of a whole slide in a few flat arrays: hundreds of bytes each, where objects of Python take thousands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ._outline import FEATURES, Regions

__all__ = ["PackedRegions"]


@dataclass(frozen=True, eq=False)
class PackedRegions:
    """Regions as :class:`Regions` holds them, without an object for each.

    Attributes
    ----------
    names
        Label of each in the image it came from, (n,) int64.
    boxes
        Bounding boxes (y0, x0, y1, x1), (n, 4) int32.
    centroids
        Centres of mass (x, y), (n, 2).
    features
        See :data:`FEATURES`, (n, 9) float32.
    rings
        Outlines one after the other, open, (x, y) from the corner of their boxes, (m, 2) float32.
    ring_starts
        Where each begins in `rings`, and the end, (n + 1,) int64.
    bits
        Pixels inside each box along rows, eight in a byte, (k,) uint8.
    bit_starts
        Where each begins in `bits`, and the end, (n + 1,) int64.
    """

    names: np.ndarray
    boxes: np.ndarray
    centroids: np.ndarray
    features: np.ndarray
    rings: np.ndarray
    ring_starts: np.ndarray
    bits: np.ndarray
    bit_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def pack(cls, regions: Regions) -> PackedRegions:
        """The same regions; outlines are rounded to float32 from the corners of their boxes, 1e-6 of a pixel."""
        from shapely import get_coordinates, get_exterior_ring

        corners = regions.boxes[:, 1::-1]  # (x, y)
        ring, owner = get_coordinates(get_exterior_ring(regions.polygons), return_index=True)
        is_open = np.append(owner[1:] == owner[:-1], False)  # the last vertex repeats the first
        ring, owner = ring[is_open] if len(ring) else ring, owner[is_open] if len(ring) else owner
        packed = [np.packbits(mask) for mask in regions.masks]
        return cls(
            names=regions.names.astype(np.int64),
            boxes=regions.boxes.astype(np.int32),
            centroids=regions.centroids.astype(np.float64).reshape(-1, 2),
            features=regions.features.astype(np.float32).reshape(-1, len(FEATURES)),
            rings=(ring - corners[owner]).astype(np.float32).reshape(-1, 2),
            ring_starts=_starts(np.bincount(owner, minlength=len(regions))),
            bits=np.concatenate([np.empty(0, np.uint8), *packed]),
            bit_starts=_starts(np.array([len(part) for part in packed], dtype=np.int64)),
        )

    @classmethod
    def empty(cls) -> PackedRegions:
        """No regions."""
        return cls.pack(
            Regions(
                np.empty(0, np.int64),
                np.empty((0, 4), np.int64),
                [],
                np.empty((0, 2)),
                np.empty(0, dtype=object),
                np.empty((0, len(FEATURES)), np.float32),
            )
        )

    @classmethod
    def concatenate(cls, parts: Sequence[PackedRegions]) -> PackedRegions:
        """All regions of `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.empty()
        whole = {}
        for name in (field.name for field in fields(cls)):
            arrays = [getattr(part, name) for part in parts]
            if name.endswith("_starts"):
                whole[name] = _starts(np.concatenate([np.diff(array) for array in arrays]))
            else:
                whole[name] = np.concatenate(arrays)
        return cls(**whole)

    def take(self, rows: np.ndarray) -> PackedRegions:
        """Some of the regions, in the order of `rows`."""
        rings, ring_starts = _gather(self.rings, self.ring_starts, rows)
        bits, bit_starts = _gather(self.bits, self.bit_starts, rows)
        return PackedRegions(
            names=self.names[rows],
            boxes=self.boxes[rows],
            centroids=self.centroids[rows],
            features=self.features[rows],
            rings=rings,
            ring_starts=ring_starts,
            bits=bits,
            bit_starts=bit_starts,
        )

    def polygons(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Outlines as shapely polygons, of all or of some, (n,)."""
        from shapely import linearrings, polygons

        some = self if rows is None else self.take(rows)
        if not len(some):
            return np.empty(0, dtype=object)
        owner = np.repeat(np.arange(len(some)), np.diff(some.ring_starts))
        return polygons(linearrings(some.rings + some.boxes[owner, 1::-1].astype(np.float64), indices=owner))

    def masks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Pixels inside the boxes of some regions, (h, w) bool each."""
        shapes = (self.boxes[rows, 2:] - self.boxes[rows, :2]).tolist()
        starts, stops = self.bit_starts[rows].tolist(), self.bit_starts[rows + 1].tolist()
        for (height, width), start, stop in zip(shapes, starts, stops, strict=True):
            flat = np.unpackbits(self.bits[start:stop], count=height * width)
            yield flat.reshape(height, width).view(bool)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name; ``PackedRegions(**arrays)`` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PackedRegions:
        """Inverse of :meth:`arrays`, after checking that they fit each other.

        Raises
        ------
        ValueError, KeyError
            If they do not: a file they came from is damaged.
        """
        regions = cls(**{field.name: np.asarray(arrays[field.name]) for field in fields(cls)})
        n = len(regions)
        fits = (
            regions.boxes.shape == (n, 4)
            and regions.centroids.shape == (n, 2)
            and regions.features.shape == (n, len(FEATURES))
            and regions.ring_starts.shape == regions.bit_starts.shape == (n + 1,)
            and regions.rings.shape == (regions.ring_starts[-1], 2)
            and regions.bits.shape == (regions.bit_starts[-1],)
        )
        if not fits:
            raise ValueError("arrays of regions do not fit each other")
        return regions


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def _gather(values: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of `values` that belong to `rows`, and where they begin."""
    sizes = np.diff(starts)[rows]
    new = _starts(sizes)
    source = np.repeat(starts[:-1][rows] - new[:-1], sizes) + np.arange(new[-1])
    return values[source], new
