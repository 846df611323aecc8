"""Dense texture of H&E on a pyramid of octaves, and its means over any window.

The amounts of haematoxylin and eosin are taken apart into bands, each an octave wide. From every band come maps whose
local means describe the tissue: how strong the band is, how its strength is itself patterned at coarser scales
(second-order scattering), how strictly its gradients keep to one direction, and where it has maxima (nuclei). Each
octave is computed on half the pixels per side of the one before, so that all of them cost little more than the
finest; and as a window's feature is the mean of a map, overlapping windows share all of the work.

Level *j* has pixels of ``2**j`` working pixels. Halving averages 2 x 2 pixels and all filters are symmetric: turning
the image by 90 degrees turns the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

__all__ = ["Octaves", "block_mean", "halve", "level_names", "smooth", "window_means"]

DYES = ("h", "e")
MAX_SOURCE = 4  # bands of level 4 and coarser are larger than nuclei: their strength has no pattern of its own left
TENSOR_REACH = 2  # octaves above that of a gradient over which its direction is compared
BLOB_LEVELS = (1, 2, 3)
BLOB_CONTRASTS = (0.01, 0.03, 0.07)  # optical density by which a nucleus stands out of its surroundings
_TABLES_AT_ONCE = 32  # a table has the size of the maps in float64, so all at once would take too much memory
_TINY = np.float32(1e-5)  # squared density, about the noise of an 8-bit gradient: bare glass has no direction


def smooth(stack: np.ndarray) -> np.ndarray:
    """Filter the last two axes with the binomial kernel ``[1 4 6 4 1] / 16``; borders are continued.

    Examples
    --------
    >>> import numpy as np
    >>> impulse = np.zeros((5, 5), np.float32)
    >>> impulse[2, 2] = 256
    >>> smooth(impulse)[2].tolist()
    [6.0, 24.0, 36.0, 24.0, 6.0]
    """
    height, width = stack.shape[-2:]
    source = np.pad(stack, [(0, 0)] * (stack.ndim - 2) + [(2, 2), (2, 2)], mode="edge")
    target = np.empty_like(source)
    # The kernel is [1 1] four times: eight sums of neighbours for both axes, no products.
    for rows in range(height + 3, height - 1, -1):
        np.add(source[..., :rows, :], source[..., 1 : rows + 1, :], out=target[..., :rows, :])
        source, target = target, source
    for columns in range(width + 3, width - 1, -1):
        np.add(
            source[..., :height, :columns], source[..., :height, 1 : columns + 1], out=target[..., :height, :columns]
        )
        source, target = target, source
    return source[..., :height, :width] * np.float32(1 / 256)


def halve(stack: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels over the last two axes, whose lengths are even."""
    return block_mean(stack, 2)


def block_mean(stack: np.ndarray, side: int) -> np.ndarray:
    """Means of squares of `side` pixels over the last two axes, whose lengths are multiples of `side`."""
    # One strided addition per row and column of a square is several times faster than a reduction over short axes.
    rows = stack[..., ::side, :].copy()
    for shift in range(1, side):
        rows += stack[..., shift::side, :]
    out = rows[..., ::side].copy()
    for shift in range(1, side):
        out += rows[..., shift::side]
    out *= np.float32(1 / side**2)
    return out


def level_names(level: int) -> list[str]:
    """Names of the maps that :meth:`Octaves.step` gives at a level, in its order."""
    names = []
    for dye in DYES:
        names += [f"{dye}_{what}{level}" for what in ("band", "power", "skew")]
    names.append(f"he_band{level}")
    for dye in DYES:
        names += [f"{dye}_pattern{source}_{level}" for source in range(min(level, MAX_SOURCE))]
    for dye in DYES:
        for source in range(max(level - TENSOR_REACH, 0), min(level, MAX_SOURCE)):
            names += [f"{dye}_direction{source}_{level}", f"{dye}_coherence{source}_{level}"]
    if level in BLOB_LEVELS:
        names += [f"blobs{level}_{rank}" for rank in range(len(BLOB_CONTRASTS))]
        names += [f"blob{level}_{what}" for what in ("contrast", "density", "eosin")]
        names += [f"gaps{level}", f"gap{level}_contrast"]
    return names


@dataclass
class Octaves:
    """State of the pyramid at one level: what the next octave is computed from.

    Attributes
    ----------
    dyes
        Haematoxylin and eosin, smoothed down to this level, (2, h, w) float32.
    level
        Index of the level.
    bands
        Strength of each finer band, (2 * number of sources, h, w): haematoxylin and eosin in turn.
    tensors
        Structure tensors of finer gradients (xx + yy, xx - yy, 2 xy of each dye), by their level.
    """

    dyes: np.ndarray
    level: int = 0
    bands: list[np.ndarray] = field(default_factory=list)
    tensors: dict[int, np.ndarray] = field(default_factory=dict)

    def step(self) -> list[np.ndarray]:
        """Maps of this level in the order of :func:`level_names`; the state moves one octave up."""
        level = self.level
        low = smooth(self.dyes)
        band = self.dyes - low
        strength = np.abs(band)
        maps = []
        for dye in range(2):
            maps += [strength[dye], band[dye] * band[dye], band[dye] * strength[dye]]
        maps.append(band[0] * band[1])

        means = [smooth(source) for source in self.bands]
        for dye in range(2):
            maps += [np.abs(source[dye] - mean[dye]) for source, mean in zip(self.bands, means, strict=True)]

        tensors = {source: smooth(tensor) for source, tensor in self.tensors.items()}
        for dye in range(2):
            for tensor in tensors.values():
                total, straight, oblique = tensor[3 * dye : 3 * dye + 3]
                directed = np.hypot(straight, oblique)
                maps += [np.sqrt(directed), directed / (total + _TINY)]

        if level in BLOB_LEVELS:
            maps += _blobs(band[0], low)

        self.tensors = {s: halve(t) for s, t in tensors.items() if level + 1 - s <= TENSOR_REACH}
        if level < MAX_SOURCE:
            self.tensors[level] = halve(_tensor(self.dyes))
            means.append(strength)
        self.bands = [halve(mean) for mean in means]
        self.dyes = halve(low)
        self.level = level + 1
        return maps

    def state(self) -> np.ndarray:
        """All state as one stack, which :meth:`restore` takes apart."""
        return np.concatenate([self.dyes, *self.bands, *self.tensors.values()])

    @staticmethod
    def restore(level: int, state: np.ndarray) -> Octaves:
        """The pyramid at `level` from what :meth:`state` gave."""
        n_bands = min(level, MAX_SOURCE)
        cut = 2 + 2 * n_bands
        bands = [state[2 + 2 * index : 4 + 2 * index] for index in range(n_bands)]
        sources = range(max(level - TENSOR_REACH, 0), min(level, MAX_SOURCE))
        tensors = {source: state[cut + 6 * index : cut + 6 * index + 6] for index, source in enumerate(sources)}
        return Octaves(state[:2], level, bands, tensors)

    @staticmethod
    def width(level: int) -> int:
        """Number of maps in the state at `level`."""
        sources = min(level, MAX_SOURCE) - max(level - TENSOR_REACH, 0)
        return 2 + 2 * min(level, MAX_SOURCE) + 6 * sources


def _tensor(dyes: np.ndarray) -> np.ndarray:
    """Structure tensor of each dye: (xx + yy, xx - yy, 2 xy) one after another, (6, h, w); 0 at the borders."""
    out = np.zeros((6, *dyes.shape[1:]), np.float32)
    for dye, values in enumerate(dyes):
        total, straight, oblique = out[3 * dye : 3 * dye + 3, 1:-1, 1:-1]
        along_y = values[2:, 1:-1] - values[:-2, 1:-1]
        along_x = values[1:-1, 2:] - values[1:-1, :-2]
        np.multiply(along_x, along_y, out=oblique)
        oblique *= np.float32(0.5)
        along_x *= along_x
        along_y *= along_y
        np.add(along_x, along_y, out=total)
        np.subtract(along_x, along_y, out=straight)
        total *= np.float32(0.25)
        straight *= np.float32(0.25)
    return out


def _blobs(band: np.ndarray, low: np.ndarray) -> list[np.ndarray]:
    """Maxima of a band of haematoxylin: nuclei of that size; and minima: vacuoles, lumina, clefts."""
    peak = _is_peak(band)
    nuclei = [(peak & (band > contrast)).astype(np.float32) for contrast in BLOB_CONTRASTS]
    gaps = (_is_peak(-band) & (band < -BLOB_CONTRASTS[0])).astype(np.float32)
    return [*nuclei, nuclei[0] * band, nuclei[0] * low[0], nuclei[0] * low[1], gaps, -gaps * band]


def _is_peak(values: np.ndarray) -> np.ndarray:
    """Whether a pixel is the largest of its 3 x 3 neighbours (equal ones all count)."""
    largest = values
    for axis in (0, 1):
        pad = [(1, 1) if axis == a else (0, 0) for a in (0, 1)]
        padded = np.moveaxis(np.pad(largest, pad, mode="edge"), axis, 0)
        largest = np.moveaxis(np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:]), 0, axis)
    return values >= largest


def window_means(
    maps: np.ndarray, centres: np.ndarray, sides: Sequence[float], *, size: tuple[float, float] | None = None
) -> np.ndarray:
    """Means of maps over square windows, by summed-area tables: the cost does not depend on the windows' size.

    A window's border may cut a cell, which then counts by the share that lies inside. What lies beyond the maps does
    not count; a window that misses them altogether gives the value at the nearest border.

    Parameters
    ----------
    maps
        Maps of cells, (m, h, w).
    centres
        Centres of the windows (x, y) in cells, where cell *i* covers [i, i + 1), (n, 2).
    sides
        Sides of the windows in cells.
    size
        Width and height that count, in cells, if the last cells are only partly valid; (w, h) by default.

    Returns
    -------
    (n, number of sides, m) float32.

    Examples
    --------
    >>> import numpy as np
    >>> maps = np.array([[[0.0, 4.0]]])
    >>> window_means(maps, np.array([[1.0, 0.5], [0.5, 0.5]]), [1.0]).ravel().tolist()
    [2.0, 0.0]
    """
    count, height, width = maps.shape
    extent = size or (float(width), float(height))
    sums = [_window_sums(np.asarray(centres, dtype=np.float64), side, (height, width), extent) for side in sides]
    out = np.empty((len(centres), len(sums), count), np.float32)
    for start in range(0, count, _TABLES_AT_ONCE):
        part = maps[start : start + _TABLES_AT_ONCE]
        tables = np.zeros((height + 1, width + 1, len(part)))
        np.cumsum(part.transpose(1, 2, 0), axis=0, dtype=np.float64, out=tables[1:, 1:])
        np.cumsum(tables[1:, 1:], axis=1, out=tables[1:, 1:])
        tables = tables.reshape(-1, len(part))
        for column, matrix in enumerate(sums):
            out[:, column, start : start + len(part)] = matrix @ tables
    return out


def _window_sums(
    centres: np.ndarray, side: float, shape: tuple[int, int], extent: tuple[float, float]
) -> sparse.csr_array:
    """Matrix that takes the entries of a summed-area table to means over windows, (n, table entries).

    Between its entries the table is bilinear, which is exact for cells of constant value.
    """
    (x_at, x_weight), (y_at, y_weight) = (
        _ends(centres[:, axis], side, limit, cells)
        for axis, limit, cells in zip((0, 1), extent, shape[::-1], strict=True)
    )
    columns = (y_at[:, :, None] * (shape[1] + 1) + x_at[:, None, :]).reshape(-1)
    weights = (y_weight[:, :, None] * x_weight[:, None, :]).reshape(-1)
    rows = np.arange(0, 16 * len(centres) + 1, 16)
    return sparse.csr_array((weights, columns, rows), shape=(len(centres), (shape[0] + 1) * (shape[1] + 1)))


def _ends(centre: np.ndarray, side: float, limit: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Table entries around both ends of intervals, and weights that make their sum the interval's mean, (n, 4)."""
    least = min(side, 1.0, limit) / 2
    low = np.clip(centre - side / 2, 0, limit - least)
    high = np.maximum(np.minimum(centre + side / 2, limit), low + least)
    length = high - low
    first, last = (np.minimum(end.astype(np.int64), cells - 1) for end in (low, high))
    before, behind = low - first, high - last
    at = np.stack([first, first + 1, last, last + 1], axis=1)
    weight = np.stack([before - 1, -before, 1 - behind, behind], axis=1) / length[:, None]
    return at, weight
