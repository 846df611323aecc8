"""Nuclei of a slide, or of a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..image.stream import WorkingGrid
from ._packed import PackedRegions

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Nuclei"]


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Nuclei of a slide.

    Attributes
    ----------
    ids
        Id of each, unique, (n,) int64, or str where nuclei came with such ids.
    regions
        Their outlines and measures in pixels of `grid`.
    grid
        The working grid.
    given
        Outlines in level-0 pixels that they came with, (n,) shapely polygons; ``None``: those of `regions`.
    labels
        Numbers in the label image, (n,) int64; ``None``: the ids.
    columns
        What else is known of each, by name.
    """

    ids: np.ndarray
    regions: PackedRegions
    grid: WorkingGrid
    given: np.ndarray | None = None
    labels: np.ndarray | None = None
    columns: Mapping[str, pd.Categorical] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def numbers(self) -> np.ndarray:
        """Number of each in the label image, (n,) int64."""
        return self.ids if self.labels is None else self.labels

    def centroids(self) -> np.ndarray:
        """Centres (x, y) in level-0 pixels, (n, 2)."""
        return self.grid.to_pixels(self.regions.centroids)

    def outlines(self) -> np.ndarray:
        """Polygons in level-0 pixels, (n,)."""
        if self.given is not None:
            return self.given
        from shapely import transform

        return transform(self.regions.polygons(), self.grid.to_pixels)

    def take(self, rows: np.ndarray) -> Nuclei:
        """Some of them, in the order of `rows`."""
        return Nuclei(
            ids=self.ids[rows],
            regions=self.regions.take(rows),
            grid=self.grid,
            given=None if self.given is None else self.given[rows],
            labels=None if self.labels is None else self.labels[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Nuclei], grid: WorkingGrid) -> Nuclei:
        """All nuclei of `parts`, which are of one kind, one after the other."""
        from pandas.api.types import union_categoricals

        if not parts:
            return cls(np.empty(0, dtype=np.int64), PackedRegions.empty(), grid)
        if len(parts) == 1:
            return parts[0]
        return cls(
            ids=np.concatenate([part.ids for part in parts]),
            regions=PackedRegions.concatenate([part.regions for part in parts]),
            grid=grid,
            given=_joined([part.given for part in parts]),
            labels=_joined([part.labels for part in parts]),
            columns={name: union_categoricals([part.columns[name] for part in parts]) for name in parts[0].columns},
        )


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
