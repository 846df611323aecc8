"""Regions of blocks as one list along rows of the slide, without those that two blocks both found."""

from __future__ import annotations

import numpy as np

from ._packed import PackedRegions

__all__ = ["Merger"]


class Merger:
    """Puts the regions of one row of blocks after the other into an order that does not depend on blocks.

    That order is along rows of pixels. As each row of blocks only holds regions whose centroid lies in it, rows can be
    merged one by one: memory holds one of them, and of those before the outlines that reach into it.

    Parameters
    ----------
    block_px
        Side of a block.
    halo_px
        Surroundings in which a block sees regions.
    by_name
        Whether regions are the same where their names are; else where they share more than half of the smaller.
    """

    def __init__(self, block_px: int, halo_px: int, *, by_name: bool) -> None:
        self._block_px, self._halo_px, self._by_name = block_px, halo_px, by_name
        self._seen = np.empty(0, dtype=np.int64)
        self._polygons = np.empty(0, dtype=object)
        self._bottoms = np.empty(0, dtype=np.int64)

    def add(self, row: int, parts: list[PackedRegions]) -> PackedRegions:
        """The regions of all blocks of a row, ordered, without those that an earlier one shows already.

        `parts` is empty afterwards, so that they need not be held twice.
        """
        regions = PackedRegions.concatenate(parts)
        parts.clear()
        y, x = np.floor(regions.centroids[:, 1]), regions.centroids[:, 0]
        regions = regions.take(np.lexsort((x, y)))
        kept = self._new_names(regions) if self._by_name else self._new_places(regions, row)
        return regions if len(kept) == len(regions) else regions.take(kept)

    def _new_names(self, regions: PackedRegions) -> np.ndarray:
        first = np.sort(np.unique(regions.names, return_index=True)[1])
        new = first[~np.isin(regions.names[first], self._seen, assume_unique=True)]
        self._seen = np.union1d(self._seen, regions.names[new])
        return new

    def _new_places(self, regions: PackedRegions, row: int) -> np.ndarray:
        from shapely import STRtree, intersection
        from shapely import area as area_of

        size = self._block_px
        reach = row * size - self._halo_px  # nothing of this row or of later ones lies above
        near = self._bottoms > reach
        self._polygons, self._bottoms = self._polygons[near], self._bottoms[near]
        # Only at seams can blocks disagree.
        boxes = regions.boxes
        first, last = boxes[:, :2] // size, (boxes[:, 2:] - 1) // size
        seam = np.flatnonzero((first != last).any(axis=1) | (boxes % size == 0).any(axis=1))
        before = len(self._polygons)
        polygons = np.concatenate([self._polygons, regions.polygons(seam)])
        one, other = STRtree(polygons).query(polygons, predicate="intersects")
        pairs = (one < other) & (other >= before)
        one, other = one[pairs], other[pairs]
        shared = area_of(intersection(polygons[one], polygons[other]))
        smaller = np.minimum(area_of(polygons[one]), area_of(polygons[other]))
        doubles = seam[other[shared > smaller / 2] - before]
        self._polygons = polygons
        self._bottoms = np.concatenate([self._bottoms, boxes[seam, 2]])
        return np.setdiff1d(np.arange(len(regions)), doubles)
