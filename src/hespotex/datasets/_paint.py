"""Painting a synthetic section: what absorbs light is laid down in optical density, then mixed as stains do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ._tissue import CELL_TYPES, STEP_UM, Cells, Region, Tissue, smooth_field

__all__ = ["Stain", "paint"]

_HEMATOXYLIN: Final = (0.59, 0.73, 0.35)
_EOSIN: Final = (0.12, 0.90, 0.40)
_TILE: Final = 1024  # longest side of the noise that is repeated over the image
_ORIENTATIONS: Final = 6
_ROWS: Final = 256  # rows mixed at a time
_GROUND_MPP: Final = 1.0  # fibres and cytoplasm hold nothing finer

# eosin and hematoxylin of the ground substance of each region, in the order of the region codes
_EOSIN_OF: Final = np.array([0.0, 0.48, 0.40, 0.30, 0.03, 0.52, 0.04], dtype=np.float32)
_HEMATOXYLIN_OF: Final = np.array([0.0, 0.035, 0.20, 0.17, 0.0, 0.13, 0.0], dtype=np.float32)
_FIBROUS: Final = np.array([0.0, 1.0, 0.22, 0.35, 0.0, 0.25, 0.0], dtype=np.float32)


@dataclass(frozen=True)
class Stain:
    """How one laboratory stains and scans.

    Attributes
    ----------
    hematoxylin, eosin
        Strength of each stain.
    turn
        Shift of the two stain vectors, (2, 3).
    background
        Colour of the glass, (3,).
    """

    hematoxylin: float
    eosin: float
    turn: np.ndarray
    background: np.ndarray

    @staticmethod
    def draw(rng: np.random.Generator, shift: float) -> Stain:
        """A laboratory; `shift` 0 gives the same stain to all."""
        return Stain(
            hematoxylin=float(np.exp(0.16 * shift * rng.normal())),
            eosin=float(np.exp(0.20 * shift * rng.normal())),
            turn=0.035 * shift * rng.normal(size=(2, 3)),
            background=np.clip(np.array([243.0, 240.0, 244.0]) + 3.0 * shift * rng.normal(size=3), 228, 252),
        )

    def vectors(self) -> np.ndarray:
        """Absorbance of hematoxylin and eosin in R, G, B, unit length, (2, 3)."""
        vectors = np.clip(np.array([_HEMATOXYLIN, _EOSIN]) + self.turn, 0.02, None)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def paint(
    rng: np.random.Generator, tissue: Tissue, cells: Cells, shape: tuple[int, int], mpp: float, stain: Stain
) -> np.ndarray:
    """H&E image of a tissue.

    Parameters
    ----------
    rng
        Source of randomness.
    tissue, cells
        What is to be seen.
    shape
        Height and width in pixels.
    mpp
        µm per pixel.
    stain
        The laboratory.

    Returns
    -------
    numpy.ndarray
        (3, h, w) uint8.
    """
    from scipy.ndimage import gaussian_filter

    ground_mpp = max(mpp, _GROUND_MPP)
    height, width = (int(np.ceil(length * mpp / ground_mpp)) + 1 for length in shape)
    ground_shape = height, width
    ground = _ground(rng, tissue, ground_shape, ground_mpp)
    _paint_fat(rng, tissue, ground[0], ground_mpp)
    stretch = _Stretch(shape, mpp, ground_shape, ground_mpp)
    eosin, hematoxylin = (stretch(layer, slice(0, shape[0])) for layer in ground)
    _paint_nuclei(rng, cells, hematoxylin, eosin, mpp)
    optics = 0.32 / mpp
    for layer in (eosin, hematoxylin):
        gaussian_filter(layer, optics, output=layer, truncate=3)
    return _mix(rng, hematoxylin, eosin, stain)


class _Grain:
    """Repeated tiles of noise: fine enough that the repetition is not seen."""

    def __init__(self, rng: np.random.Generator, mpp: float, shape: tuple[int, int]) -> None:
        self.side = min(_TILE, 1 << (max(shape) - 1).bit_length())
        self._noise = np.fft.rfft2(rng.standard_normal((self.side, self.side), dtype=np.float32))
        self._fy = np.fft.fftfreq(self.side)[:, None] / mpp  # cycles per µm
        self._fx = np.fft.rfftfreq(self.side)[None, :] / mpp

    def isotropic(self, scale_um: float) -> np.ndarray:
        """Unit-variance noise with that correlation length."""
        return self._filtered((self._fx**2 + self._fy**2) * scale_um**2)

    def fibres(self, angle: float, length_um: float, width_um: float) -> np.ndarray:
        """Unit-variance noise drawn out along `angle`."""
        along = self._fx * np.cos(angle) + self._fy * np.sin(angle)
        across = self._fy * np.cos(angle) - self._fx * np.sin(angle)
        return self._filtered((along * length_um) ** 2 + (across * width_um) ** 2)

    def _filtered(self, exponent: np.ndarray) -> np.ndarray:
        tile = np.fft.irfft2(self._noise * np.exp(-2 * np.pi**2 * exponent), s=(self.side, self.side)).astype(
            np.float32
        )
        return tile / tile.std()


def _spread(tile: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """Rows of the plane that is covered with a tile."""
    side = len(tile)
    taken = tile[np.arange(rows.start, rows.stop) % side]
    return np.tile(taken, (1, -(-width // side)))[:, :width]


class _Stretch:
    """Linear interpolation from a coarse grid to pixels, row block by row block."""

    def __init__(self, shape: tuple[int, int], mpp: float, grid: tuple[int, int], step_um: float = STEP_UM) -> None:
        self._rows, self._columns = (
            self._weights(length, mpp / step_um, cells) for length, cells in zip(shape, grid, strict=True)
        )

    @staticmethod
    def _weights(length: int, step: float, cells: int) -> Any:
        from scipy import sparse

        position = ((np.arange(length) + 0.5) * step - 0.5).clip(0, cells - 1)
        left = np.minimum(position.astype(np.intp), cells - 2)
        right_share = (position - left).astype(np.float32)
        pixels = np.arange(length)
        return sparse.csr_matrix(
            (
                np.concatenate([1 - right_share, right_share]),
                (np.concatenate([pixels, pixels]), np.concatenate([left, left + 1])),
            ),
            shape=(length, cells),
            dtype=np.float32,
        )

    def __call__(self, field: np.ndarray, rows: slice) -> np.ndarray:
        fine_rows = self._rows[rows] @ field.astype(np.float32)
        return np.ascontiguousarray((self._columns @ fine_rows.T).T)


def _ground(
    rng: np.random.Generator, tissue: Tissue, shape: tuple[int, int], mpp: float
) -> tuple[np.ndarray, np.ndarray]:
    """Eosin and hematoxylin of everything but nuclei: fibres, cytoplasm, clefts, lumens, glass."""
    from scipy.ndimage import gaussian_filter

    grain = _Grain(rng, mpp, shape)
    grid = tissue.region.shape
    stretch = _Stretch(shape, mpp, grid)
    soften = {"sigma": 0.5}
    eosin_map = gaussian_filter(_EOSIN_OF[tissue.region], **soften)
    hematoxylin_map = gaussian_filter(_HEMATOXYLIN_OF[tissue.region], **soften)
    fibrous = gaussian_filter(_FIBROUS[tissue.region], **soften)
    uneven = 1 + 0.13 * smooth_field(rng, grid, 90) + 0.06 * smooth_field(rng, grid, 20)
    eosin_map *= uneven
    # tumour nests shrink away from the stroma around them and leave a cleft
    outside = -tissue.depth_in_tumour
    cleft = np.exp(-(((outside - 5) / 4.0) ** 2)) * (smooth_field(rng, grid, 40) > 0.75) * (tissue.region == 1)
    tumour = gaussian_filter((tissue.region == Region.TUMOUR).astype(np.float32), **soften)

    bundles = [grain.fibres(k * np.pi / _ORIENTATIONS, 32.0, 2.2) for k in range(_ORIENTATIONS)]
    mottle, cytoplasm = grain.isotropic(1.2), grain.isotropic(4.0)
    turn = np.mod(tissue.angle, np.pi) / np.pi * _ORIENTATIONS
    # weights are stretched, not the angle itself, which jumps at pi
    weights = [
        np.maximum(0, 1 - np.abs((turn - k + _ORIENTATIONS / 2) % _ORIENTATIONS - _ORIENTATIONS / 2))
        for k in range(_ORIENTATIONS)
    ]

    height, width = shape
    eosin = np.empty(shape, dtype=np.float32)
    hematoxylin = np.empty(shape, dtype=np.float32)
    for start in range(0, height, _ROWS):
        rows = slice(start, min(start + _ROWS, height))
        base = stretch(eosin_map, rows)
        fibre = np.zeros_like(base)
        for weight, bundle in zip(weights, bundles, strict=True):
            fibre += stretch(weight, rows) * _spread(bundle, rows, width)
        fine, coarse = _spread(mottle, rows, width), _spread(cytoplasm, rows, width)
        fibre_share = stretch(fibrous, rows)
        wave = 1 + fibre_share * 0.26 * fibre + 0.06 * fine + 0.10 * coarse
        # cracks between collagen bundles
        crack = np.clip((fibre + 1.55) * 2.5, 0, 1)
        open_space = 1 - fibre_share * (1 - crack) * 0.75
        open_space *= 1 - 0.85 * np.clip(stretch(cleft, rows), 0, 1)
        eosin[rows] = np.maximum(base * wave, 0) * open_space
        purple = stretch(hematoxylin_map, rows) * (1 + 0.10 * fine + (0.1 + 0.25 * stretch(tumour, rows)) * coarse)
        hematoxylin[rows] = np.maximum(purple, 0) * open_space
    return eosin, hematoxylin


def _paint_fat(rng: np.random.Generator, tissue: Tissue, eosin: np.ndarray, mpp: float) -> None:
    """Adipose tissue: empty vacuoles behind thin membranes."""
    from scipy.spatial import cKDTree

    fat = tissue.region == Region.ADIPOSE
    if not fat.any():
        return
    height, width = tissue.size_um
    spacing = 58.0
    rows, columns = np.arange(-spacing, height + spacing, spacing * 0.87), np.arange(-spacing, width + spacing, spacing)
    centres = np.stack(np.meshgrid(columns, rows), axis=-1)
    centres[1::2, :, 0] += spacing / 2
    centres = centres.reshape(-1, 2)
    centres = centres + rng.normal(0, 0.16 * spacing, centres.shape)
    tree = cKDTree(centres)
    side = int(np.ceil(STEP_UM / mpp))
    offsets = (np.arange(side) + 0.5) * STEP_UM / side
    for row in np.unique(np.flatnonzero(fat.any(axis=1)) // 16):
        block = fat[16 * row : 16 * row + 16]
        cells = np.argwhere(block) * STEP_UM + [16 * row * STEP_UM, 0]
        y = (cells[:, 0, None, None] + offsets[None, :, None]).repeat(side, axis=2).ravel()
        x = (cells[:, 1, None, None] + offsets[None, None, :]).repeat(side, axis=1).ravel()
        pixel_y, pixel_x = (y / mpp).astype(np.intp), (x / mpp).astype(np.intp)
        inside = (pixel_y < eosin.shape[0]) & (pixel_x < eosin.shape[1])
        pixel_y, pixel_x = pixel_y[inside], pixel_x[inside]
        distance, _ = tree.query(np.stack([(pixel_x + 0.5) * mpp, (pixel_y + 0.5) * mpp], axis=1), k=2)
        membrane = np.exp(-(((distance[:, 1] - distance[:, 0]) / 2.6) ** 2))
        eosin[pixel_y, pixel_x] += 0.42 * membrane.astype(np.float32)


def _paint_nuclei(
    rng: np.random.Generator, cells: Cells, hematoxylin: np.ndarray, eosin: np.ndarray, mpp: float
) -> None:
    """Lay down all nuclei, pixel offset by pixel offset: at one offset no two nuclei meet in a pixel."""
    chromatin = _Grain(rng, mpp, hematoxylin.shape).isotropic(0.55)
    side = len(chromatin)
    height, width = hematoxylin.shape
    centre = np.floor(cells.xy_um / mpp).astype(np.intp)
    _, first = np.unique(centre[:, 1] * width + centre[:, 0], return_index=True)
    reach = np.ceil(cells.axes_um.max(axis=1) * 1.25 / mpp + 1).astype(np.intp)
    order = first[np.argsort(-reach[first], kind="stable")]
    reach = reach[order]
    centre, fraction = centre[order], cells.xy_um[order] / mpp - centre[order] - 0.5
    half = (cells.axes_um[order] / mpp).astype(np.float32)
    cos, sin = np.cos(cells.angle[order]).astype(np.float32), np.sin(cells.angle[order]).astype(np.float32)
    stain, texture = cells.stain[order].astype(np.float32), cells.texture[order].astype(np.float32)
    bump = rng.uniform(-0.10, 0.10, (2, len(order))).astype(np.float32)
    # one nucleolus in each atypical nucleus
    nucleolus = rng.uniform(-0.35, 0.35, (2, len(order))).astype(np.float32)
    has_nucleolus = (
        (cells.kind[order] == CELL_TYPES.index("tumour")) & (rng.random(len(order)) < 0.25 + 0.6 * cells.grade[order])
    ).astype(np.float32)
    flat_h, flat_e = hematoxylin.reshape(-1), eosin.reshape(-1)
    for dy in range(-int(reach.max(initial=0)), int(reach.max(initial=0)) + 1):
        for dx in range(-int(reach.max(initial=0)), int(reach.max(initial=0)) + 1):
            n = int(np.searchsorted(-reach, -max(abs(dx), abs(dy)), side="right"))
            x, y = dx - fraction[:n, 0].astype(np.float32), dy - fraction[:n, 1].astype(np.float32)
            u = (x * cos[:n] + y * sin[:n]) / half[:n, 0]
            v = (y * cos[:n] - x * sin[:n]) / half[:n, 1]
            rho = np.sqrt(u * u + v * v)
            near = rho < 1.35
            px, py = centre[:n, 0] + dx, centre[:n, 1] + dy
            near &= (px >= 0) & (px < width) & (py >= 0) & (py < height)
            hit = np.flatnonzero(near)
            if not len(hit):
                continue
            u, v, rho = u[hit], v[hit], rho[hit]
            safe = np.maximum(rho, 1e-3)
            edge = 1 + bump[0, hit] * (u**3 - 3 * u * v * v) / safe**3 + bump[1, hit] * (u * u - v * v) / safe**2
            alpha = np.clip((edge - rho) * half[hit, 1] + 0.5, 0, 1)
            speckle = chromatin[py[hit] % side, px[hit] % side]
            rim = np.clip((rho / edge) ** 4, 0, 1)
            density = stain[hit] * (0.86 + 0.28 * rim + texture[hit] * 0.55 * speckle)
            spot = (u - nucleolus[0, hit]) ** 2 + (v - nucleolus[1, hit]) ** 2
            density += has_nucleolus[hit] * 0.75 * np.exp(-spot / 0.045)
            target = py[hit] * width + px[hit]
            flat_h[target] = np.maximum(flat_h[target], alpha * np.maximum(density, 0.25 * stain[hit]))
            flat_e[target] *= 1 - 0.45 * alpha


def _mix(rng: np.random.Generator, hematoxylin: np.ndarray, eosin: np.ndarray, stain: Stain) -> np.ndarray:
    """Beer-Lambert law, dirt and camera noise."""
    vectors = stain.vectors()
    height, width = eosin.shape
    noise = rng.normal(0, 1.6, (_TILE, _TILE)).astype(np.float32)
    image = np.empty((3, height, width), dtype=np.uint8)
    for start in range(0, height, _ROWS):
        rows = slice(start, min(start + _ROWS, height))
        h, e = stain.hematoxylin * hematoxylin[rows], stain.eosin * eosin[rows]
        for channel in range(3):
            density = np.float32(vectors[0, channel] * 1.25) * h
            density += np.float32(vectors[1, channel] * 1.15) * e
            light = np.float32(stain.background[channel]) * np.exp(-density)
            light += _spread(np.roll(noise, 137 * channel, axis=1), rows, width)
            image[channel, rows] = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return image
