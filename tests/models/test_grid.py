"""Where a grid lies in µm."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from hespotex.errors import DataValueError
from hespotex.models._grid import GridFrame

TURNS = {
    "plain": np.eye(2),
    "quarter": np.array([[0.0, 1.0], [-1.0, 0.0]]),
    "mirrored": np.array([[0.0, 1.0], [1.0, 0.0]]),
    "slanted": np.array([[0.8, 0.6], [-0.6, 0.8]]),
}


def cut_by_tissue(n=24, size_um=8.0):
    """Rows, columns and centres of cells, those at the border cut by a round piece of tissue."""
    grid = np.argwhere(np.ones((n, n), dtype=bool))
    cells = shapely.box(*(grid[:, ::-1] * size_um).T, *((grid[:, ::-1] + 1) * size_um).T)
    tissue = shapely.Point(95.3, 88.1).buffer(80).intersection(shapely.box(0, 0, 150, 300))
    pieces = shapely.intersection(cells, tissue)
    kept = shapely.area(pieces) > 3
    return grid[kept], shapely.get_coordinates(shapely.centroid(pieces[kept]))


@pytest.mark.parametrize("turn", TURNS)
def test_cut_cells_and_turned_grids_move_nothing(turn):
    grid, xy = cut_by_tissue()
    assert len(np.unique(np.round(xy % 8, 3), axis=0)) > 10  # many centres are not those of whole cells
    frame = GridFrame.of(grid, xy @ TURNS[turn] + [1000.0, -50.0])
    points = np.random.default_rng(0).integers(0, 400, size=(50, 2)) * 0.5  # pixels of 0.5 µm: some lie on halves
    positions = frame.positions(points @ TURNS[turn] + [1000.0, -50.0])
    np.testing.assert_array_equal(positions, points[:, ::-1] / 8)
    np.testing.assert_allclose(frame.microns(positions), points @ TURNS[turn] + [1000.0, -50.0], atol=1e-4)


def test_where_few_cells_are_whole_all_count():
    grid = np.indices((4, 4)).reshape(2, -1).T
    xy = (grid[:, ::-1] + 0.5) * 8 + np.random.default_rng(0).uniform(-1, 1, size=(16, 2))
    np.testing.assert_allclose(GridFrame.of(grid, xy).positions(xy), grid + 0.5, atol=0.3)


@pytest.mark.parametrize("line", ["grid", "coordinates"])
def test_cells_on_a_line_do_not_tell(line):
    grid, xy = cut_by_tissue()
    grid, xy = (grid * [1, 0], xy) if line == "grid" else (grid, xy * [1, 0])
    with pytest.raises(DataValueError, match="lie in one row"):
        GridFrame.of(grid, xy)
