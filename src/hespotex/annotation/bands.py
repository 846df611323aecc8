"""The image of two bands that self-labelling sees: grey of the tissue, and joint expression of marker genes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from ..errors import DataValueError
from .contours import grey_levels
from .raster import to_raster

__all__ = [
    "Bands",
    "area_resize",
    "bands",
    "meta_expression",
    "paint_squares",
    "pool_largest",
    "published_gene_band",
    "published_image_band",
]

Pooling = Literal["min", "mean"]


class Bands(NamedTuple):
    """Two bands in [0, 1] on a raster of superpixels.

    Attributes
    ----------
    image
        Grey and gene band, (h, w, 2) float32; 0 outside the tissue.
    tissue
        Where there is a superpixel, (h, w) bool.
    """

    image: np.ndarray
    tissue: np.ndarray


def bands(colour: np.ndarray, expression: np.ndarray, grid: np.ndarray) -> Bands:
    """Both bands from superpixels: luma of their colours and their :func:`meta_expression`, each scaled to [0, 1].

    Parameters
    ----------
    colour
        Mean colours, RGB, (m, 3).
    expression
        Joint expression of the markers, (m,).
    grid
        Row and column of each superpixel, (m, 2) int.

    Raises
    ------
    DataValueError
        If a band is the same everywhere: there is nothing to divide the tissue by.
    """
    luma = np.asarray(colour, dtype=np.float64) @ np.array([0.299, 0.587, 0.114])
    both = np.column_stack([_unit_range(luma, "image"), _unit_range(expression, "gene")])
    return Bands(
        to_raster(both.astype(np.float32), grid, 0.0), to_raster(np.ones(len(both), dtype=np.int8), grid, 0) > 0
    )


def meta_expression(
    expression: np.ndarray, num_required: int = 1, pooling: Pooling = "min", *, least: float = 0.0
) -> np.ndarray:
    """One value per place from several marker genes, (m,).

    Each gene is scaled to [0, 1]; of each place the `num_required` largest are kept and pooled.

    Parameters
    ----------
    expression
        Log expression of the markers, (m, g).
    num_required
        How many markers a cell type must show.
    pooling
        ``"min"``: the `num_required`-th largest; ``"mean"``: the mean of the largest.
    least
        Expression, before scaling, up to which a gene counts as absent.

    Raises
    ------
    DataValueError
        If a marker is the same everywhere, as one without counts is; it says nothing about where a cell type lies.
    """
    values = np.asarray(expression, dtype=np.float64)
    if least > 0:
        values = np.where(values > least, values, 0.0)
    low, high = values.min(axis=0), values.max(axis=0)
    if (high <= low).any():
        constant = np.flatnonzero(high <= low).tolist()
        raise DataValueError(
            f"the markers in columns {constant} of {values.shape[1]} are the same everywhere; leave them out"
        )
    return pool_largest((values - low) / (high - low), num_required, pooling)


def pool_largest(values: np.ndarray, num_required: int, pooling: Pooling = "min") -> np.ndarray:
    """Smallest or mean of the `num_required` largest of each row of `values` (m, g), (m,)."""
    if not 1 <= num_required <= values.shape[1]:
        raise DataValueError(
            f"num_required={num_required!r} must be between 1 and {values.shape[1]}, the markers given"
        )
    if pooling not in ("min", "mean"):
        raise DataValueError(f"pooling={pooling!r} is unknown; possible: 'min', 'mean'")
    largest = np.sort(values, axis=1)[:, values.shape[1] - num_required :]
    return largest[:, 0] if pooling == "min" else largest.mean(axis=1)


def published_image_band(image: np.ndarray, tissue: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Grey band as published: an 8-bit RGB image (H, W, 3), black outside `tissue`, made smaller, grey, scaled to [0, 1]."""
    coloured = np.where(np.asarray(tissue, dtype=bool)[..., None], image, 0)
    small = np.stack([area_resize(coloured[..., channel], shape) for channel in range(3)], axis=-1)
    return _unit_range(grey_levels(np.floor(small + 0.5).astype(np.int64)), "image")


def published_gene_band(
    meta: np.ndarray, points: np.ndarray, res: float, tissue: np.ndarray, shape: tuple[int, int], *, min_umi: float = 0
) -> np.ndarray:
    """Gene band as published: squares of `meta` on a canvas as large as the image, made smaller, scaled to [0, 1].

    Parameters
    ----------
    meta
        Joint expression of the superpixels, (m,).
    points
        Their centres (row, column) in pixels, (m, 2).
    res
        Side of their squares.
    tissue
        Mask of the tissue, (H, W).
    shape
        Shape (h, w) of the band.
    min_umi
        Values up to ln(min_umi + 1) are set to 0. The values are scaled already, so that 1 erases all below 0.69.
    """
    tissue = np.asarray(tissue, dtype=bool)
    canvas = np.where(tissue, paint_squares(points, res, tissue.shape, meta), 0.0)
    canvas[canvas <= np.log(min_umi + 1)] = 0.0
    return _unit_range(area_resize(canvas, shape), "gene")


def paint_squares(
    points: np.ndarray, res: float, shape: tuple[int, int], values: np.ndarray | None = None
) -> np.ndarray:
    """Squares around points on a canvas of 0, later ones over earlier ones, (h, w) float64.

    A square covers rows int(x − res/2) to int(x + res/2) − 1, and columns alike; what lies outside is cut.
    """
    canvas = np.zeros(shape)
    start = np.maximum(np.trunc(np.asarray(points) - res / 2).astype(np.int64), 0)
    stop = np.trunc(np.asarray(points) + res / 2).astype(np.int64)
    values = np.ones(len(start)) if values is None else values
    for (top, left), (bottom, right), value in zip(start, stop, values, strict=True):
        canvas[top:bottom, left:right] = value
    return canvas


def area_resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Make an image (H, W) smaller by averaging over the area that each new pixel covers, (h, w) float64."""
    if shape[0] > image.shape[0] or shape[1] > image.shape[1]:
        raise DataValueError(f"shape={tuple(shape)} is larger than the image, {image.shape}: averaging makes smaller")
    down, right = (_coverage(old, new) for old, new in zip(image.shape, shape, strict=True))
    return (right @ (down @ np.asarray(image, dtype=np.float64)).T).T


def _coverage(old: int, new: int) -> sparse.csr_array:
    """Share of each of `old` pixels of a row in each of `new` larger ones, rows summing to 1, (new, old)."""
    bounds = np.arange(new + 1) * (old / new)
    cells = np.arange(old)
    rows, columns, weights = [], [], []
    for row, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        column = cells[int(low) : int(np.ceil(high - 1e-9))]
        rows.append(np.full(len(column), row))
        columns.append(column)
        weights.append(np.minimum(column + 1, high) - np.maximum(column, low))
    place = (np.concatenate(rows), np.concatenate(columns))
    matrix = sparse.csr_array((np.concatenate(weights), place), shape=(new, old))
    return sparse.csr_array(matrix.multiply(1 / matrix.sum(axis=1)[:, None]))


def _unit_range(values: np.ndarray, band: str) -> np.ndarray:
    """Values scaled so that they reach exactly from 0 to 1."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise DataValueError(f"the {band} band has values that are NaN or infinite")
    if not high > low:
        why = "no marker is left above the cut" if band == "gene" else "the image is the same everywhere"
        raise DataValueError(f"the {band} band has the same value everywhere ({why}); it divides nothing")
    return (values - low) / (high - low)
