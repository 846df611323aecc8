"""How many nuclei lie in each spot, counted while nuclei are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..data.geometry import Slide, check_on_image, shape_centres, shape_geometries, shape_radius
from ..data.tables import AnnotatedTable, resolve_shapes_key, resolve_table, row_positions
from ..errors import AmbiguousKeyError, MissingKeyError
from ..segmentation.counts import count_in_circles, count_in_polygons, count_in_window
from ._free import check_slot_free

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ..image.stream import WorkingGrid
    from ..segmentation._nuclei import Nuclei

__all__ = ["SpotCounts", "Spots", "resolve_spots"]


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots in which nuclei are counted, and the rows of the table that stand for them."""

    table: AnnotatedTable
    shapes_key: str
    rows: np.ndarray
    positions: np.ndarray
    centres: np.ndarray

    def check_free(self) -> None:
        """Raise if the columns are taken by something that `segment_nuclei` did not make."""
        for column in (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW):
            check_slot_free(
                self.table.adata,
                "obs",
                column,
                maker="segment_nuclei",
                note=Keys.N_NUCLEI,
                advice="Rename or delete what is there",
            )

    def write(self, counts: dict[str, np.ndarray]) -> None:
        """Put counts into ``obs`` of the table."""
        for name, values in counts.items():
            self.table.adata.obs[name] = self._column(name, values)
        if Keys.N_NUCLEI_WINDOW not in counts and Keys.N_NUCLEI_WINDOW in self.table.adata.obs:
            del self.table.adata.obs[Keys.N_NUCLEI_WINDOW]  # of other nuclei than those now stored

    def _column(self, name: str, values: np.ndarray) -> np.ndarray:
        """`values` in their rows; those of other regions stay as they are, or are missing."""
        obs = self.table.adata.obs
        if len(self.rows) == len(obs):
            column = np.empty(len(obs), dtype=np.int64)
        else:
            column = obs[name].to_numpy(dtype=np.float64).copy() if name in obs else np.full(len(obs), np.nan)
        column[self.rows] = values
        return column.astype(np.int64) if np.isfinite(column).all() else column


def resolve_spots(sdata: SpatialData, slide: Slide, shapes_key: str | None, table_key: str | None) -> Spots | None:
    """The spots that are meant; ``None`` if there is no table to count for."""
    try:
        table = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        if table_key is not None or (shapes_key is not None and shapes_key not in sdata.shapes):
            raise
        return None
    shapes_key = shapes_key or resolve_shapes_key(sdata, table_key=table.key)
    rows, positions = row_positions(sdata, table, shapes_key)
    centres = shape_centres(sdata, shapes_key, slide)[positions]
    check_on_image(slide, centres, f"shapes of {shapes_key!r}")
    return Spots(table, shapes_key, rows, positions, centres)


class SpotCounts:
    """Counts of nuclei in spots, nuclei after nuclei.

    Parameters
    ----------
    sdata, slide
        Object and image.
    spots
        The spots.
    """

    def __init__(self, sdata: SpatialData, slide: Slide, spots: Spots) -> None:
        shapes = sdata.shapes[spots.shapes_key]
        self._spots = spots
        self._size_um = shape_radius(sdata, spots.shapes_key, slide)
        self._polygons: np.ndarray | None = None
        self._radius = np.zeros(0)
        if (shapes.geometry.geom_type == "Point").all():
            stored = shapes["radius"].to_numpy(dtype=np.float64)
            self._radius = stored[spots.positions] * (self._size_um / slide.mpp / np.median(stored))
            y = spots.centres[:, 1]
            self._top, self._bottom = y - self._radius, y + self._radius
        else:
            import shapely

            self._polygons = shape_geometries(sdata, spots.shapes_key, slide).to_numpy()[spots.positions]
            self._top, self._bottom = shapely.bounds(self._polygons)[:, [1, 3]].T
        self._inside = np.zeros(len(spots.centres), dtype=np.int64)

    def add(self, nuclei: Nuclei) -> None:
        """Count some nuclei, each of which may be given once; the nearer to each other, the faster."""
        points = nuclei.centroids()
        near = np.flatnonzero((self._top <= points[:, 1].max()) & (self._bottom >= points[:, 1].min()))
        if self._polygons is None:
            found = count_in_circles(points, self._spots.centres[near], self._radius[near])
        else:
            found = count_in_polygons(points, self._polygons[near])
        self._inside[near] += found

    def columns(self, grid: WorkingGrid, labels: Any) -> dict[str, np.ndarray]:
        """Counts by the name of their column; of windows, if there is a label image on `grid`."""
        counts = {Keys.N_NUCLEI: self._inside}
        if labels is not None:
            # Rounded, because a diameter of 145.0000001 px, off by the arithmetic alone, must not become 146.
            diameter_px = round(2 * self._size_um / grid.mpp, 6)
            centres = grid.from_pixels(self._spots.centres).round(6)
            counts[Keys.N_NUCLEI_WINDOW] = count_in_window(labels, centres, diameter_px)
        return counts
