"""Core and edge of a tumour."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import DataValueError
from .bands import paint_squares
from .contours import contour_area, fill_contour, mask_contours, scale_contour
from .raster import from_raster, to_raster

__all__ = ["CoreEdge", "PublishedCoreEdge", "core_edge", "passes_published_filter", "published_core_edge"]


class CoreEdge(NamedTuple):
    """Division of a tumour on a grid.

    Attributes
    ----------
    component
        Piece that each superpixel belongs to, the largest being 0, and −1 outside, (m,) int.
    depth_um
        Distance of its centre to the border of the tumour, 0 outside, (m,).
    is_core
        Whether it lies deeper than asked, (m,) bool.
    """

    component: np.ndarray
    depth_um: np.ndarray
    is_core: np.ndarray


def core_edge(
    grid: np.ndarray, target: np.ndarray, size_um: float, *, depth_um: float = 100.0, min_cells: int = 1
) -> CoreEdge:
    """Divide a tumour into its core and an edge of fixed width, whatever its shape; every piece of it.

    Parameters
    ----------
    grid
        Row and column of each superpixel, (m, 2) int.
    target
        Whether it belongs to the tumour, (m,) bool.
    size_um
        Side of a superpixel.
    depth_um
        Width of the edge.
    min_cells
        Pieces of fewer superpixels are left out.

    Notes
    -----
    Superpixels hang together by their sides. The border is where the tumour ends, be it at other tissue, at a hole or at
    the rim of the section.

    Examples
    --------
    >>> import numpy as np
    >>> row = np.column_stack([np.zeros(5, int), np.arange(5)])
    >>> core_edge(row, np.array([True, True, False, True, False]), 8.0).component.tolist()
    [0, 0, -1, 1, -1]
    """
    from scipy import ndimage

    target = np.asarray(target, dtype=bool)
    for name, value in (("size_um", size_um), ("depth_um", depth_um)):
        if not value > 0:
            raise DataValueError(f"{name}={value!r} must be positive")
    mask = np.pad(to_raster(target.astype(np.int8), grid, 0) > 0, 1)
    label, n = ndimage.label(mask)
    cells = np.bincount(label.ravel(), minlength=n + 1)[1:]
    rank = np.full(n + 1, -1)
    order = np.argsort(-cells, kind="stable")
    kept = order[cells[order] >= min_cells]
    rank[1 + kept] = np.arange(len(kept))
    component = from_raster(rank[label][1:-1, 1:-1], grid)
    # From the centre of the nearest superpixel outside it is half a side more than from the border.
    steps = ndimage.distance_transform_edt(mask)[1:-1, 1:-1]
    depth = np.where(component >= 0, np.maximum(from_raster(steps, grid) - 0.5, 0.0) * size_um, 0.0)
    return CoreEdge(component, depth, depth > depth_um)


class PublishedCoreEdge(NamedTuple):
    """Division of a tumour as published.

    Attributes
    ----------
    kept
        Rows of the superpixels that are the tumour, (t,) int.
    is_core
        Whether each of these lies in the core, (t,) bool; the others are the edge.
    tumour, core
        Masks on the image, (h, w) bool.
    """

    kept: np.ndarray
    is_core: np.ndarray
    tumour: np.ndarray
    core: np.ndarray


def published_core_edge(
    points: np.ndarray, target: np.ndarray, res: float, shape: tuple[int, int], *, shrink: float = 0.8
) -> PublishedCoreEdge:
    """Divide the largest piece of a tumour as published, by shrinking its contour about its centroid.

    Parameters
    ----------
    points
        Centres (row, column) of superpixels in pixels, whole multiples of `res`, (m, 2).
    target
        Whether each belongs to the tumour, (m,) bool.
    res
        Distance of superpixels.
    shape
        Shape of the image.
    shrink
        Factor of the contour.

    Notes
    -----
    Superpixels hang together by their sides; those of the largest piece with fewer than two neighbours are left out. The
    core of a bent or hollow tumour may lie outside it.
    """
    from scipy import ndimage

    points, rows = np.asarray(points), np.flatnonzero(target)
    if len(rows) == 0:
        raise DataValueError("no superpixel belongs to the tumour")
    place = np.round(points[rows] / res).astype(np.int64)
    label, _ = ndimage.label(to_raster(np.ones(len(rows), dtype=np.int8), place, 0) > 0)
    piece = label == 1 + int(np.argmax(np.bincount(label.ravel())[1:]))
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    held = piece & (ndimage.convolve(piece.astype(np.int8), cross, mode="constant") >= 2)
    kept = rows[from_raster(held, place)]
    if len(kept) == 0:
        raise DataValueError("no superpixel of the tumour has two neighbours; it has no area to divide")
    tumour = paint_squares(points[kept], res, shape) > 0
    outline = max(mask_contours(tumour), key=contour_area)
    core = fill_contour(scale_contour(outline, shrink), shape) & tumour
    centre = np.trunc(points[kept]).astype(np.int64)
    return PublishedCoreEdge(kept, core[centre[:, 0], centre[:, 1]], tumour, core)


def passes_published_filter(
    *,
    in_fraction: np.ndarray,
    out_fraction: np.ndarray,
    fold_change: np.ndarray,
    mean: np.ndarray,
    p_adjusted: np.ndarray,
) -> np.ndarray:
    """Which genes the published program takes for enriched in one of two regions, (g,) bool.

    Parameters
    ----------
    in_fraction, out_fraction
        Share of observations in and out of the region that express the gene, (g,).
    fold_change
        Ratio of its means of log expression in and out.
    mean
        Its mean log expression overall.
    p_adjusted
        Adjusted p-value.

    Notes
    -----
    The published program tests superpixels, which are interpolated from far fewer spots: its p-values mean nothing.
    Test measured spots, and give this filter what comes of that.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.asarray(out_fraction) > 0, np.divide(in_fraction, out_fraction), np.inf)
    return (
        (np.asarray(p_adjusted) < 0.05)
        & (np.asarray(mean) > 0.1)
        & (ratio >= 1)
        & (np.asarray(in_fraction) > 0.5)
        & (np.asarray(fold_change) > 1.2)
    )
