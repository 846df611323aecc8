"""The one place that touches ``squidpy.experimental``, whose names and signatures change between releases.

Its stain fits take the coarsest level of an image and a mask as large as it. Here they are given a sample of tissue
pixels, as an image of one row, so that they cost the same whatever the slide.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from ..errors import DataValueError

__all__ = ["QUALITY_METRICS", "fit_stain", "from_lab", "quality_metric", "to_lab"]

#: squidpy's scores of a tile that need its pixels only.
QUALITY_METRICS: Final = (
    "tenengrad",
    "var_of_laplacian",
    "variance",
    "fft_high_freq_energy",
    "haar_wavelet_energy",
    "brightness_mean",
    "brightness_std",
    "entropy",
    "hematoxylin_mean",
    "hematoxylin_std",
    "eosin_mean",
    "eosin_std",
    "he_ratio",
    "fold_fraction",
)
_LUMINANCE: Final = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # of squidpy's own grey image


def fit_stain(
    pixels: np.ndarray, method: str, *, white: np.ndarray, options: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Fit the colours of a stain by squidpy.

    Parameters
    ----------
    pixels
        Tissue pixels, (n, 3) uint8.
    method
        ``"reinhard"``, ``"macenko"`` or ``"vahadane"``.
    white
        Value of unstained glass in each channel, (3,); without meaning for ``"reinhard"``.
    options
        Fields of squidpy's ``MacenkoParams`` or ``VahadaneParams``.

    Returns
    -------
    ``mean`` and ``std`` (3,) in Ruderman's colour space for ``"reinhard"``; else ``matrix`` (3, 3), whose columns are
    the absorbance of haematoxylin, eosin and a residual in red, green and blue, and ``maxima`` (2,), the 99th
    percentiles of the amounts of both dyes.

    Raises
    ------
    DataValueError
        If the pixels do not hold two dyes that resemble haematoxylin and eosin, or an option is unknown.
    """
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel
    from squidpy.experimental import im

    row = np.ascontiguousarray(pixels.T[:, None])
    sample = SpatialData(
        images={"sample": Image2DModel.parse(row, dims=("c", "y", "x"))},
        labels={"tissue": Labels2DModel.parse(np.ones(row.shape[1:], dtype=np.uint8), dims=("y", "x"))},
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Maximum number of iterations")  # of the factorisation: stated
            fit = im.fit_stain_reference(
                sample,
                "sample",
                method=method,
                method_params=dict(options or {}),
                white_point=None if method == "reinhard" else white,
                tissue_mask_key="tissue",
            )
    except (RuntimeError, ValueError) as error:  # its StainFittingError is a RuntimeError
        reason = str(error).removeprefix("[sample] ").rstrip(".")
        advice = "" if method == "reinhard" else ". method='reinhard' does not need two dyes"
        raise DataValueError(f"method={method!r}: {reason}{advice}") from error
    if method == "reinhard":
        return {"mean": np.asarray(fit.mu), "std": np.asarray(fit.sigma)}
    return {"matrix": np.asarray(fit.stain_matrix), "maxima": np.asarray(fit.max_concentrations)}


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Ruderman's colour space of RGB (3, h, w) uint8, float32."""
    from squidpy.experimental.im._stain import rgb_to_lab_ruderman
    from xarray import DataArray

    return np.asarray(rgb_to_lab_ruderman(DataArray(rgb, dims=("c", "y", "x"))).data)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """RGB (3, h, w) float32, clipped to 0-255; inverse of :func:`to_lab`."""
    from squidpy.experimental.im._stain import lab_ruderman_to_rgb
    from xarray import DataArray

    return np.asarray(lab_ruderman_to_rgb(DataArray(lab, dims=("c", "y", "x"))).data)


def quality_metric(name: str) -> Callable[[np.ndarray], float]:
    """Score of squidpy by its name, as a function of a tile (h, w, 3) uint8; of ``QUALITY_METRICS``.

    Raises
    ------
    DataValueError
        If squidpy has no such score.
    """
    from squidpy.experimental.im import QCMetric
    from squidpy.experimental.im._qc_metrics import InputKind, get_metric_info

    if name not in QUALITY_METRICS:
        raise DataValueError(f"metrics: {name!r} is unknown; possible: {', '.join(map(repr, QUALITY_METRICS))}")
    kind, function = get_metric_info(QCMetric(name))
    if kind == InputKind.GRAYSCALE:
        return lambda tile: float(np.ravel(function(tile.astype(np.float32) @ _LUMINANCE))[0])
    return lambda tile: float(np.ravel(function(tile.astype(np.float32) / 255))[0])
