"""Structural similarity of gene maps on a regular array of observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy import sparse

from ..errors import DataValueError
from ._inputs import NanPolicy, is_flat, is_undefined, pair_of, per_gene

__all__ = ["Windows", "lattice_windows", "ssim"]

_C1: Final = 0.01**2
_C2: Final = 0.03**2
_SD: Final = 1.5  # of the Gaussian window, in array steps
_REACH: Final = 5  # the customary 11 x 11 window


@dataclass(frozen=True, eq=False)
class Windows:
    """Gaussian windows over the observations of one section; rows sum to 1.

    Attributes
    ----------
    weights
        Sparse (windows, n).
    lattice
        ``"square"`` or ``"hex"``: what the value has to be labelled with.
    """

    weights: sparse.csr_array
    lattice: str


def lattice_windows(
    array_row: np.ndarray, array_col: np.ndarray, *, lattice: Literal["square", "hex"] = "square"
) -> Windows:
    """Windows of :func:`ssim` from array positions: built once, used for every gene and model.

    Parameters
    ----------
    array_row, array_col
        Integer array position of each observation, (n,). In the hexagonal array of Visium
        ``row + col`` is even, and neighbours in a row are two columns apart.
    lattice
        ``"square"``: the masked raster windows of ordinary SSIM. ``"hex"``: the same Gaussian on the true
        distances of the hexagonal array, so nothing is resampled.

    Returns
    -------
    One window per position of the array (holes included) whose weight lies in tissue by at least half,
    its weights renormalised by the tissue.

    Raises
    ------
    DataValueError
        If positions are not whole numbers, occur twice, or do not fit the lattice.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import lattice_windows
    >>> row, col = np.divmod(np.arange(36), 6)
    >>> lattice_windows(row, col).weights.shape
    (32, 36)
    """
    if lattice not in ("square", "hex"):
        raise DataValueError(f"lattice={lattice!r} is unknown; possible: 'square', 'hex'")
    position = np.column_stack([np.asarray(array_row, dtype=np.float64), np.asarray(array_col, dtype=np.float64)])
    if not (np.isfinite(position).all() and (position == np.round(position)).all()):
        raise DataValueError("array_row and array_col must be whole numbers: SSIM needs a regular array")
    position = position.astype(np.int64)
    if lattice == "hex" and len({int(p) for p in position.sum(axis=1) % 2}) > 1:
        raise DataValueError("array_row + array_col is even for some and odd for other spots: not a hexagonal array")
    position = position - position.min(axis=0)
    if lattice == "hex" and position[0].sum() % 2:
        position[:, 1] += 1  # keep row + col even
    grid = np.full(tuple(position.max(axis=0) + 1), -1, dtype=np.int64)
    grid[position[:, 0], position[:, 1]] = np.arange(len(position))
    if (grid >= 0).sum() != len(position):
        raise DataValueError("array_row and array_col: two observations share a position")

    row_step, col_step, col_reach = (1.0, 1.0, _REACH) if lattice == "square" else (np.sqrt(3) / 2, 0.5, 2 * _REACH)
    row_reach = int(_REACH / row_step)
    centres = np.indices(grid.shape).reshape(2, -1)
    if lattice == "hex":
        centres = centres[:, centres.sum(axis=0) % 2 == 0]
    centre_row, centre_col = centres[0], centres[1]
    numbers = np.arange(len(centre_row))
    rows, cols, values, total = [], [], [], 0.0
    for d_row in range(-row_reach, row_reach + 1):
        for d_col in range(-col_reach, col_reach + 1):
            if lattice == "hex" and (d_row + d_col) % 2:
                continue
            weight = float(np.exp(-((d_row * row_step) ** 2 + (d_col * col_step) ** 2) / (2 * _SD**2)))
            total += weight
            r, c = centre_row + d_row, centre_col + d_col
            inside = (r >= 0) & (r < grid.shape[0]) & (c >= 0) & (c < grid.shape[1])
            spot = grid[r[inside], c[inside]]
            rows.append(numbers[inside][spot >= 0])
            cols.append(spot[spot >= 0])
            values.append(np.full(len(cols[-1]), weight))
    weights = sparse.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))), shape=(len(numbers), len(position))
    )
    covered = weights.sum(axis=1)
    kept = covered >= total / 2
    if not kept.any():
        raise DataValueError("no window lies in tissue by half: the observations are too scattered for SSIM")
    weights = sparse.csr_array(sparse.diags_array(1 / covered[kept]) @ weights[kept])
    return Windows(weights, lattice)


def ssim(
    measured: np.ndarray, predicted: np.ndarray, windows: Windows, *, nan_policy: NanPolicy = "raise"
) -> np.ndarray:
    """Mean structural similarity of every gene map.

    Both maps are scaled by the one affine map that takes the measurement to [0, 1], then clipped: a map
    scaled by its own range would hide its amplitude error.

    Parameters
    ----------
    measured, predicted, nan_policy
        As in :func:`pearson`.
    windows
        From :func:`lattice_windows`.

    Returns
    -------
    (G,). NaN where the measurement is constant or missing; 0 where the prediction is constant, as its
    structure term is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import lattice_windows, ssim
    >>> row, col = np.divmod(np.arange(64), 8)
    >>> truth = np.sin(row)[:, None]
    >>> ssim(truth, truth, lattice_windows(row, col)).round(6)
    array([1.])
    """
    measured, predicted = pair_of(measured, predicted, nan_policy)
    if windows.weights.shape[1] != measured.shape[0]:
        raise DataValueError(f"windows are for {windows.weights.shape[1]} observations, measured has {len(measured)}")
    undefined, flat = is_undefined(measured), is_flat(predicted)
    result = np.where(flat, 0.0, np.nan)
    scored = ~undefined & ~flat
    result[scored] = per_gene(
        lambda y, p: _similarity(y, p, windows.weights), measured[:, scored], predicted[:, scored]
    )
    result[undefined] = np.nan
    return result


def _similarity(measured: np.ndarray, predicted: np.ndarray, weights: sparse.csr_array) -> np.ndarray:
    low = measured.min(axis=0)
    scale = measured.max(axis=0) - low
    y, p = (np.clip((values - low) / scale, 0, 1) for values in (measured, predicted))
    mean_y, mean_p = weights @ y, weights @ p
    # Second moments about each map's own centre: what is left to cancel is far below c2.
    centre_y, centre_p = y.mean(axis=0), p.mean(axis=0)
    y, p = y - centre_y, p - centre_p
    shift_y, shift_p = mean_y - centre_y, mean_p - centre_p
    var_y = np.maximum(weights @ (y * y) - shift_y**2, 0)
    var_p = np.maximum(weights @ (p * p) - shift_p**2, 0)
    covariance = weights @ (y * p) - shift_y * shift_p
    luminance = (2 * mean_y * mean_p + _C1) / (mean_y**2 + mean_p**2 + _C1)
    structure = (2 * covariance + _C2) / (var_y + var_p + _C2)
    return (luminance * structure).mean(axis=0)
