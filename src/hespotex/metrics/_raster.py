"""Similarity and error of gene maps on a full raster, such as one of superpixels."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ..errors import DataValueError

__all__ = ["Extent", "raster_rmse", "raster_ssim"]

Extent = Literal["mask", "image"]


def raster_ssim(
    truth: np.ndarray,
    predicted: np.ndarray,
    mask: np.ndarray | None = None,
    scale: bool = True,  # noqa: FBT001, FBT002
    *,
    extent: Extent = "mask",
) -> np.ndarray:
    """Mean structural similarity of every gene map, over windows of 7 × 7 cells of equal weight.

    Parameters
    ----------
    truth, predicted
        Maps, (rows, columns, G). Values outside the mask are not looked at, unless ``extent="image"``.
    mask
        Cells in tissue, (rows, columns) bool; ``None``: all.
    scale
        Whether each map is first scaled to [0, 1] by its own least and greatest value, as published for HISTEX, which hides
        errors of level and amplitude. Otherwise values are compared as they are, and the data range is that of the truth.
    extent
        Cells that least and greatest values are taken from, and windows whose centres are averaged: those of the
        ``"mask"``; or of the whole ``"image"``, as published, where equal background raises the score.

    Returns
    -------
    (G,). NaN where the truth is constant; a constant prediction scores what its windows score.

    Notes
    -----
    Background is 0 in both maps. The variances are those of samples, as in scikit-image's default.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import raster_ssim
    >>> truth = np.random.default_rng(0).uniform(size=(12, 9, 1))
    >>> raster_ssim(truth, 2 * truth + 1).round(6), bool(raster_ssim(truth, 2 * truth + 1, scale=False)[0] < 0.9)
    (array([1.]), True)
    """
    from skimage.metrics import structural_similarity

    y, p, inside = _maps(truth, predicted, mask, extent)
    if min(inside.shape) < 7:
        raise DataValueError(
            f"truth is a raster of {inside.shape[0]} × {inside.shape[1]} cells, fewer than a window's 7"
        )
    counted = inside.copy() if extent == "mask" else np.ones_like(inside)
    counted[:3], counted[-3:], counted[:, :3], counted[:, -3:] = False, False, False, False  # no whole window there
    if not counted.any():
        raise DataValueError("mask leaves no cell that a whole window of 7 × 7 lies around")
    result = np.full(y.shape[2], np.nan)
    for gene in range(y.shape[2]):
        a, b, span = _scaled(y[..., gene], p[..., gene], inside, scale=scale, extent=extent)
        if span > 0:
            a, b = np.where(inside, a, 0), np.where(inside, b, 0)
            image = structural_similarity(a, b, data_range=1.0 if scale else span, full=True)[1]
            result[gene] = image[counted].mean()
    return result


def raster_rmse(
    truth: np.ndarray,
    predicted: np.ndarray,
    mask: np.ndarray | None = None,
    scale: bool = True,  # noqa: FBT001, FBT002
    *,
    extent: Extent = "mask",
) -> np.ndarray:
    """Root mean squared error of every gene map over the cells of the mask, (G,).

    Parameters as in :func:`raster_ssim`; `extent` matters with `scale` alone. NaN where the truth is constant.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import raster_rmse
    >>> truth = np.arange(12.0).reshape(4, 3, 1)
    >>> raster_rmse(truth, truth + 2), raster_rmse(truth, truth + 2, scale=False)
    (array([0.]), array([2.]))
    """
    y, p, inside = _maps(truth, predicted, mask, extent)
    result = np.full(y.shape[2], np.nan)
    for gene in range(y.shape[2]):
        a, b, span = _scaled(y[..., gene], p[..., gene], inside, scale=scale, extent=extent)
        if span > 0:
            result[gene] = np.sqrt(((a - b)[inside] ** 2).mean())
    return result


def _maps(
    truth: np.ndarray, predicted: np.ndarray, mask: np.ndarray | None, extent: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both maps as (rows, columns, G) and the mask, or an error saying what is wrong with them."""
    if extent not in get_args(Extent):
        raise DataValueError(f"extent={extent!r} is unknown; possible: 'mask', 'image'")
    y, p = np.asarray(truth), np.asarray(predicted)
    if y.ndim != 3 or y.shape != p.shape:
        raise DataValueError(f"truth and predicted must be (rows, columns, G) alike, got {y.shape} and {p.shape}")
    inside = np.ones(y.shape[:2], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if inside.shape != y.shape[:2]:
        raise DataValueError(f"mask has shape {inside.shape}, the maps {y.shape[:2]}")
    if not inside.any():
        raise DataValueError("mask holds no cell")
    for name, values in (("truth", y), ("predicted", p)):
        if not np.isfinite(values[inside] if extent == "mask" else values).all():
            raise DataValueError(
                f"{name} has values in the {extent} that are not finite; mask those cells, or set them"
            )
    return y, p, inside


def _scaled(
    truth: np.ndarray, predicted: np.ndarray, inside: np.ndarray, *, scale: bool, extent: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """One gene's maps in float64, each scaled to [0, 1] if asked for, and the range of the truth before."""
    maps, spans = [], []
    for values in (truth.astype(np.float64), predicted.astype(np.float64)):
        used = values[inside] if extent == "mask" else values
        low, span = used.min(), used.max() - used.min()
        maps.append((values - low) / (span or 1.0) if scale else values)
        spans.append(float(span))
    return maps[0], maps[1], spans[0]
