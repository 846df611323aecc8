"""Regions of blocks as one list along rows of the slide: those that two blocks both found once, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._packed import PackedRegions

__all__ = ["Found", "Merger"]


class Found(NamedTuple):
    """What one block or several hold.

    Attributes
    ----------
    regions
        Regions whose centroid lies in the core of the block, or shortly beyond it.
    spare
        Which of them lie beyond it, (n,) bool. They are the neighbour's, and of use only if it sees them elsewhere.
    cut
        How many of the others the surroundings of their block cut.
    """

    regions: PackedRegions
    spare: np.ndarray
    cut: int

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """All of `parts`, one after the other."""
        regions = PackedRegions.concatenate([part.regions for part in parts])
        spare = np.concatenate([np.empty(0, dtype=bool), *(part.spare for part in parts)])
        return cls(regions, spare, sum(part.cut for part in parts))


class Merger:
    """Puts the regions of one row of blocks after the other into an order that does not depend on blocks.

    That order is along rows of pixels. As each row of blocks holds regions whose centroid lies in it, rows can be merged
    one by one: memory holds one of them, and of those before the regions that reach into it.

    A nucleus on a seam may look different from both sides. Where both blocks find it in their core, the first is taken;
    where each finds it in the core of the other, the spare region of one of them.

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
        self._seen = np.empty(0, dtype=np.int64)  # names, and the boxes of their regions
        self._boxes = np.empty((0, 4), dtype=np.int32)
        self.scattered = 0  # pieces that were left out, as their name was that of a region elsewhere
        self._above = PackedRegions.empty()  # those of earlier rows that may lie where a later one finds some
        self._waiting = PackedRegions.empty()  # spare ones that belong to the next row

    def add(self, row: int, parts: list[Found]) -> PackedRegions:
        """The regions of all blocks of a row, ordered, without those that an earlier one shows already.

        `parts` is empty afterwards, so that they need not be held twice.
        """
        waiting = Found(self._waiting, np.ones(len(self._waiting), dtype=bool), 0)
        regions, spare, _ = Found.join([waiting, *parts])
        parts.clear()
        y, x = np.floor(regions.centroids[:, 1]), regions.centroids[:, 0]
        later = y // self._block_px > row
        self._waiting = regions.take(np.flatnonzero(later))
        now = np.flatnonzero(~later)
        order = now[np.lexsort((x[now], y[now], spare[now]))]
        regions, spare = regions.take(order), spare[order]
        kept = self._new_names(regions) if self._by_name else self._new_places(regions, spare, row)
        y, x = np.floor(regions.centroids[kept, 1]), regions.centroids[kept, 0]
        return regions.take(kept[np.lexsort((x, y))])

    def _new_names(self, regions: PackedRegions) -> np.ndarray:
        names = np.concatenate([self._seen, regions.names])
        boxes = np.concatenate([self._boxes, regions.boxes.astype(np.int32)])
        self._seen, first, number = np.unique(names, return_index=True, return_inverse=True)
        self._boxes = boxes[first]
        here = np.arange(len(names) - len(regions), len(names))
        # Blocks see the same region at places that meet; what lies apart from the first is another piece.
        there = self._boxes[number[here]]
        apart = (boxes[here, :2] > there[:, 2:]).any(axis=1) | (there[:, :2] > boxes[here, 2:]).any(axis=1)
        self.scattered += int(apart.sum())
        return np.flatnonzero(first[number[here]] == here)

    def _new_places(self, regions: PackedRegions, spare: np.ndarray, row: int) -> np.ndarray:
        """Those that none before them shows already, which is why the spare ones are the last."""
        before = len(self._above)
        regions = PackedRegions.concatenate([self._above, regions])
        # Blocks by their place, spare regions each by itself: within a block, regions do not overlap.
        column = (regions.centroids[:, 0] // self._block_px).astype(np.int64)
        block = np.where(np.concatenate([np.ones(before, dtype=bool), spare]), -1 - np.arange(len(regions)), column)
        dropped = np.zeros(len(regions), dtype=bool)
        for one, other in _doubles(regions, block):
            if other >= before and not dropped[one]:
                dropped[other] = True
        kept = np.flatnonzero(~dropped)
        reach = (row + 1) * self._block_px - self._halo_px  # nothing of later rows lies above
        self._above = regions.take(kept[regions.boxes[kept, 2] > reach])
        return kept[kept >= before] - before


def _doubles(regions: PackedRegions, block: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of different blocks that share more than half of the smaller, by rising second; the first is before it."""
    from shapely import STRtree, area, box, intersection

    rectangles = box(*regions.boxes[:, [1, 0, 3, 2]].T)
    one, other = STRtree(rectangles).query(rectangles, predicate="intersects")
    pairs = (one < other) & (block[one] != block[other])
    one, other = one[pairs], other[pairs]
    some, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    polygons = regions.polygons(some)
    first, second = polygons[place[: len(one)]], polygons[place[len(one) :]]
    smaller = np.minimum(area(first), area(second))
    same = np.flatnonzero(area(intersection(first, second)) > smaller / 2)
    same = same[np.argsort(other[same], kind="stable")]
    return list(zip(one[same].tolist(), other[same].tolist(), strict=True))
