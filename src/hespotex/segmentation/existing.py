"""Nuclei that somebody outlined already: polygons as they are, measured on the image."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from .._settings import settings
from .._tasks import iter_tasks
from ..errors import DataValueError, HespotexWarning
from ..image.color import haematoxylin as haematoxylin_of
from ..image.stream import Block, WorkingGrid, block_corners, iter_blocks, working_grid
from ._fill import bit_masks, count_pixels, edges_of, pixel_boxes, sum_pixels
from ._nuclei import Nuclei
from ._outline import FEATURES
from ._packed import PackedRegions
from ._polygons import SHAPE_FEATURES, largest_pieces, measure_polygons
from .geojson import GivenOutlines

if TYPE_CHECKING:
    import pandas as pd

    from ..data.geometry import Slide

__all__ = ["check_outlines", "iter_given"]

BLOCK_PX = 1024
_BATCH = 1 << 14  # outlines whose vertices are looked at together


def check_outlines(given: GivenOutlines, slide: Slide, what: str, *, stacklevel: int = 2) -> GivenOutlines:
    """Outlines that can be used: valid polygons whose centre lies on the slide.

    Parameters
    ----------
    given
        Outlines in level-0 pixels of `slide`.
    slide
        The image they belong to.
    what
        How to call them in messages.
    stacklevel
        Of its warning.

    Raises
    ------
    DataValueError
        If none can be used, or ids are not unique.

    Warns
    -----
    HespotexWarning
        With the number of outlines that cross themselves and were repaired, and of those left out because they enclose
        nothing, or lie beyond the image.
    """
    import shapely

    if len(np.unique(given.ids)) < len(given.ids):
        names, counts = np.unique(given.ids, return_counts=True)
        raise DataValueError(
            f"{what} hold ids that occur more than once, {names[counts > 1][:3].tolist()} for instance; give each its own"
        )
    geometries = given.geometries.copy()
    broken = np.flatnonzero(~shapely.is_valid(geometries) & ~shapely.is_missing(geometries))
    geometries[broken] = shapely.make_valid(geometries[broken])
    geometries = _polygonal(geometries)
    with np.errstate(over="ignore"):
        encloses = ~shapely.is_missing(geometries) & (shapely.area(geometries) > 0)
    repaired = int(encloses[broken].sum())
    with np.errstate(over="ignore", invalid="ignore"):  # of outlines far beyond any image
        centres = shapely.centroid(geometries)
    xy = np.column_stack([shapely.get_x(centres), shapely.get_y(centres)])
    inside = encloses.copy()
    inside[encloses] = slide.contains(xy[encloses])
    empty, outside = int((~encloses).sum()), int((encloses & ~inside).sum())
    said = [
        f"{count} {words}"
        for count, words in (
            (repaired, "crossed themselves and were repaired"),
            (empty, "enclose nothing and were left out"),
            (outside, f"lie beyond image {slide.key!r} and were left out"),
        )
        if count
    ]
    if not inside.any():
        raise DataValueError(
            f"none of the {len(geometries)} outlines of {what} can be used: " + ", ".join(said or ["there are none"])
        )
    if said:
        warnings.warn(
            f"of {len(geometries)} outlines of {what} {', '.join(said)}", HespotexWarning, stacklevel=stacklevel
        )
    rows = np.flatnonzero(inside)
    return GivenOutlines(geometries, given.ids, given.classification).take(rows)


def _polygonal(geometries: np.ndarray) -> np.ndarray:
    """Polygons and multipolygons as they are; of collections their polygons; ``None`` for all else."""
    import shapely

    kind = shapely.get_type_id(geometries)
    polygon, several, collection = (
        shapely.GeometryType[name].value for name in ("POLYGON", "MULTIPOLYGON", "GEOMETRYCOLLECTION")
    )
    found = geometries.copy()
    found[~np.isin(kind, [polygon, several]) | shapely.is_empty(geometries)] = None
    for row in np.flatnonzero(kind == collection):
        parts = shapely.get_parts(shapely.get_parts(geometries[row]))
        parts = parts[shapely.get_type_id(parts) == polygon]
        if len(parts):
            found[row] = parts[0] if len(parts) == 1 else shapely.multipolygons(parts)
    return found


def iter_given(
    given: GivenOutlines,
    slide: Slide,
    *,
    mpp: float,
    block_px: int = BLOCK_PX,
    n_jobs: int | None = None,
    progress_bar: bool | None = None,
) -> Generator[Nuclei]:
    """Measure outlines on the image, and yield them along rows of pixels.

    Shape numbers are those of the outline; haematoxylin is that of the pixels whose middle lies inside, read in blocks
    that hold some. An outline so small that it encloses no middle has the pixel at its centroid.

    Parameters
    ----------
    given
        As :func:`check_outlines` returns them.
    slide
        As :func:`hespotex.data.geometry.resolve_slide` gives it.
    mpp
        Resolution in µm per pixel at which the image is looked at, and labels are drawn.
    block_px
        Side of a block. It bounds memory.
    n_jobs
        Threads; the setting by default.
    progress_bar
        The setting by default.
    """
    import pandas as pd
    import shapely

    grid = working_grid(slide, mpp)
    scale = np.array(grid.factor)
    on_grid = shapely.transform(given.geometries, lambda xy: xy / scale)
    middle = shapely.centroid(on_grid)
    centroids = np.column_stack([shapely.get_x(middle), shapely.get_y(middle)])
    single = _single(on_grid, centroids, grid.shape)
    sums = _sums(on_grid, single, slide, grid, block_px, n_jobs or settings.n_jobs, progress_bar=progress_bar)
    features = _features(given.geometries, sums, slide)
    whole = given.ids.dtype.kind in "iu" and given.ids.min() > 0
    columns: dict[str, pd.Categorical] = {}
    if given.classification is not None:
        columns[Keys.CLASSIFICATION] = pd.Categorical(given.classification)
    row = np.floor(centroids[:, 1])
    order = np.lexsort((centroids[:, 0], row))
    for rows in np.split(order, np.flatnonzero(np.diff(row[order] // block_px)) + 1):
        yield Nuclei(
            ids=given.ids[rows],
            regions=_packed(rows + 1, on_grid[rows], single[rows], centroids[rows], features[rows], grid.shape),
            grid=grid,
            given=given.geometries[rows],
            labels=None if whole else rows + 1,
            columns={name: values[rows] for name, values in columns.items()},
        )


def _features(geometries: np.ndarray, sums: np.ndarray, slide: Slide) -> np.ndarray:
    count, total, squares = sums[0].clip(1), *sums[1:]
    mean = total / count
    shape = [
        measure_polygons(largest_pieces(geometries[start : start + _BATCH]), slide.mpp)
        for start in range(0, len(geometries), _BATCH)
    ]
    values = dict(zip(SHAPE_FEATURES, np.concatenate(shape).T, strict=True))
    values["mean_haematoxylin"] = mean
    values["std_haematoxylin"] = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return np.column_stack([values[name] for name in FEATURES]).astype(np.float32)


def _sums(
    on_grid: np.ndarray,
    single: np.ndarray,
    slide: Slide,
    grid: WorkingGrid,
    block_px: int,
    n_jobs: int,
    *,
    progress_bar: bool | None,
) -> np.ndarray:
    """Number of pixels of each outline, and sums of haematoxylin and of its square, (3, n)."""
    import shapely

    tree = shapely.STRtree(on_grid)
    corners = block_corners(grid, block_px)
    height, width = grid.shape
    cores = shapely.box(
        corners[:, 1],
        corners[:, 0],
        np.minimum(corners[:, 1] + block_px, width),
        np.minimum(corners[:, 0] + block_px, height),
    )
    core, member = tree.query(cores)
    order = np.lexsort((member, core))
    core, member = core[order], member[order]
    needed, starts = np.unique(core, return_index=True)
    members = np.split(member, starts[1:])
    blocks = iter_blocks(slide, mpp=grid.mpp, block_px=block_px, corners=corners[needed], progress_bar=progress_bar)
    tasks = ((block, on_grid[rows], single[rows]) for block, rows in zip(blocks, members, strict=True))
    sums = np.zeros((3, len(on_grid)))
    for rows, found in zip(members, iter_tasks(_measure_block, tasks, n_jobs=n_jobs), strict=True):
        sums[:, rows] += found
    return sums


def _measure_block(task: tuple[Block, np.ndarray, np.ndarray]) -> np.ndarray:
    """Sums over the pixels of one block, (3, n)."""
    block, polygons, single = task
    rows, columns = block.place
    pixels = block.pixels[block.core]
    amount = haematoxylin_of(pixels.reshape(-1, 3)).reshape(pixels.shape[:2])
    boxes = pixel_boxes(polygons, block.grid.shape)
    return sum_pixels(*edges_of(polygons), boxes, single, amount, rows.start, columns.start).T


def _single(polygons: np.ndarray, centroids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Row and column of the only pixel of polygons that hold the middle of none, (n, 2) int64; -1 for others."""
    pixel = np.full((len(polygons), 2), -1, dtype=np.int64)
    for start in range(0, len(polygons), _BATCH):
        some = polygons[start : start + _BATCH]
        boxes = pixel_boxes(some, shape)
        empty = np.flatnonzero(count_pixels(*edges_of(some), boxes) == 0)
        middle = np.floor(centroids[start + empty, ::-1])
        pixel[start + empty] = middle.clip(boxes[empty, :2], boxes[empty, 2:] - 1)  # whatever rounding did
    return pixel


def _packed(
    names: np.ndarray,
    polygons: np.ndarray,
    single: np.ndarray,
    centroids: np.ndarray,
    features: np.ndarray,
    shape: tuple[int, int],
) -> PackedRegions:
    """Regions without outlines of their own."""
    boxes = pixel_boxes(polygons, shape)
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    bit_starts = np.concatenate([[0], np.cumsum(-(-height * width // 8))])
    return PackedRegions(
        names=names.astype(np.int64),
        boxes=boxes.astype(np.int32),
        centroids=centroids,
        features=features,
        rings=np.empty((0, 2), dtype=np.float32),
        ring_starts=np.zeros(len(names) + 1, dtype=np.int64),
        bits=bit_masks(*edges_of(polygons), boxes, single, bit_starts),
        bit_starts=bit_starts,
    )
