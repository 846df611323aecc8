"""From the cells of a grid to a raster, and from the raster to training patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...data.section import Section, rows_of
from ...errors import DataValueError
from ..nn.pooling import Bags

if TYPE_CHECKING:
    from ...data.section import Parts
    from .config import XFuseConfig

__all__ = ["Colours", "Patch", "Raster", "Slide", "View", "draw_patches", "draw_view", "jittered", "take"]

_GLASS = 0.94  # bare slide under white light, where there is no cell
_SPAN = 0.9  # of the range of tanh, which saturates beyond
_QUANTILES = (0.005, 0.995)
_MAX_ROTATION, _MAX_LOG_SCALE, _MAX_SHEAR = np.pi, 0.05, np.radians(10)


@dataclass(frozen=True)
class Colours:
    """Linear map of each channel, [low, high] to [−0.9, 0.9]; values outside are clipped.

    Attributes
    ----------
    low, high
        (3,) each; ``None``: the extremes of each raster.
    """

    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @classmethod
    def fit(cls, sections: Sequence[Section]) -> Colours:
        """Quantiles over the cells of all sections; glass is never darker than the brightest."""
        colour = np.concatenate([_colour(section) for section in sections])
        low, high = np.quantile(colour, _QUANTILES, axis=0)
        return cls(low.astype(np.float32), np.maximum(high, _GLASS).astype(np.float32))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Scaled image (3, H, W), float32."""
        flat = image.reshape(3, -1)
        low = flat.min(axis=1) if self.low is None else self.low
        high = flat.max(axis=1) if self.high is None else self.high
        width = np.maximum(high - low, 1e-6)
        unit = np.clip((image - low[:, None, None]) / width[:, None, None], 0, 1)
        return ((2 * unit - 1) * _SPAN).astype(np.float32)


def _colour(section: Section) -> np.ndarray:
    colour = rows_of(section.require_parts().require("colour")).astype(np.float32)
    if not np.isfinite(colour).all():
        raise DataValueError(
            f"section {section.name!r} has colours that are NaN or infinite; make them anew with "
            "hx.pp.embed(sdata, 'rgb', shapes_key='superpixels')"
        )
    return colour


@dataclass(frozen=True, eq=False)
class Raster:
    """The cells of a section side by side, with glass where there are none and around them.

    Attributes
    ----------
    image
        Scaled colours, (3, H, W) float32 in [−0.9, 0.9].
    row, column
        Where each cell is, (m,) int.
    """

    image: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @classmethod
    def of(cls, section: Section, colours: Colours, margin: float) -> Raster:
        """Raster of the cells of `section`, with glass around, `margin` of the longer side wide."""
        parts: Parts = section.require_parts()
        grid = np.asarray(parts.require("grid"))
        colour = _colour(section)
        if len(grid) == 0:
            raise DataValueError(
                f"section {section.name!r} has no superpixels; make them with hx.pp.superpixels(sdata)"
            )
        if len(np.unique(grid, axis=0)) < len(grid):
            raise DataValueError(f"section {section.name!r}: two superpixels lie on one place of the grid")
        extent = np.ptp(grid, axis=0) + 1
        border = int(np.ceil(margin * extent.max()))
        row, column = (grid - grid.min(axis=0) + border).T
        image = np.full((3, *(extent + 2 * border)), _GLASS, dtype=np.float32)
        image[:, row, column] = colour.T
        return cls(colours(image), row, column)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    def cells(self) -> np.ndarray:
        """Index of the cell at each pixel, (H, W); the number of cells where there is none."""
        index = np.full(self.shape, len(self.row), dtype=np.int64)
        index[self.row, self.column] = np.arange(len(self.row))
        return index


@dataclass(frozen=True, eq=False)
class Slide:
    """A section to train on.

    Attributes
    ----------
    raster
        Its image.
    cells
        As :meth:`Raster.cells`.
    labels
        Share of each cell in each label, sparse (m + 1, n + 1): the last row is what is no cell, the last column
        the background, of which all pixels without a cell are whole parts.
    counts
        Counts of the labels, (n + 1, G); none in the background.
    measured
        Genes whose counts are known, (G,) bool.
    level
        Which of the effects are this section's; beyond the last where it has none.
    """

    raster: Raster
    cells: np.ndarray
    labels: sparse.csr_array
    counts: np.ndarray
    measured: np.ndarray
    level: int = 0

    @classmethod
    def of(
        cls,
        raster: Raster,
        share: sparse.csr_array,
        counts: np.ndarray,
        *,
        level: int = 0,
        missing: str = "mask",
        min_counts: float = 0.0,
        name: str = "section",
    ) -> Slide:
        """Slide of the spots that have cells and at least `min_counts` counts.

        Parameters
        ----------
        raster
            Image of its cells.
        share
            Spots × cells, (n, m).
        counts
            Counts of the spots, (n, G); a column of NaN was not measured. With nothing measured, or no spots, only image
            and background teach.
        level, missing, min_counts
            See :class:`Slide` and :class:`XFuseConfig`.
        name
            Of the section, for messages.
        """
        unknown = np.isnan(counts)
        measured = ~unknown.all(axis=0) if len(counts) else np.ones(counts.shape[1], dtype=bool)
        if unknown[:, measured].any():
            raise DataValueError(
                f"section {name!r} has counts that are NaN in some spots only; a gene is either measured in a section "
                "or NaN in all its spots"
            )
        if not np.isfinite(counts[:, measured]).all() or (counts[:, measured] < 0).any():
            raise DataValueError(f"section {name!r} has counts that are negative or infinite")
        if not measured.any():
            share, counts, measured = share[:0], counts[:0], np.ones(counts.shape[1], dtype=bool)
        counts = np.nan_to_num(counts, nan=0.0)
        share = sparse.csr_array(share, copy=True)
        share.eliminate_zeros()  # a share of 0 may be stored, and is no cell
        if missing == "zero":
            measured = np.ones_like(measured)
        kept = (np.diff(share.indptr) > 0) & (counts.sum(axis=1) >= min_counts)
        labels = sparse.block_diag([share[kept].T, np.ones((1, 1))], format="csr")
        with_background = np.vstack([counts[kept], np.zeros((1, counts.shape[1]))]).astype(np.float32)
        return cls(raster, raster.cells(), sparse.csr_array(labels), with_background, measured, level)

    @cached_property
    def covers(self) -> sparse.csr_array:
        """1 where a label has a share in a cell, (n + 1, m + 1)."""
        return sparse.csr_array((self.labels.T != 0).astype(np.float64))

    @property
    def n_spots(self) -> int:
        """Spots that supervise."""
        return len(self.counts) - 1

    def n_patches(self, patch: int) -> int:
        """Patches of an epoch: as many as would tile the raster."""
        height, width = self.raster.shape
        return int(np.ceil(height / patch * (width / patch)))

    def label_size(self, *, background: bool) -> float:
        """Mean number of pixels of a label, with the background as one of them or without; NaN without labels."""
        per_cell = np.bincount(self.cells.ravel(), minlength=self.labels.shape[0])
        size = np.asarray(self.labels.T @ per_cell).ravel()
        if background and size[-1] > 0:
            return float(size.mean())
        return float(size[:-1].mean()) if self.n_spots else float("nan")


@dataclass(frozen=True)
class View:
    """Where a patch lies in a raster: pixel p of the patch shows raster position ``centre + matrix @ (p − middle)``.

    Attributes
    ----------
    matrix
        Rotation, scale, shear and flip, (2, 2).
    centre
        Raster position (row, column) of the middle of the patch, (2,).
    size
        Rows and columns of the patch.
    """

    matrix: np.ndarray
    centre: np.ndarray
    size: tuple[int, int]

    def positions(self) -> np.ndarray:
        """Raster position of each pixel, (h, w, 2)."""
        offset = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in self.size), indexing="ij"), axis=-1)
        return self.centre + offset @ self.matrix.T

    def inverse(self, position: np.ndarray) -> np.ndarray:
        """Pixel of the patch that shows each raster position, (k, 2)."""
        return (position - self.centre) @ np.linalg.inv(self.matrix).T + (np.array(self.size) - 1) / 2


def draw_matrix(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A random change of a patch: published (``"affine"``), a symmetry of the grid (``"exact"``), or none."""
    if kind == "none":
        return np.eye(2)
    flip = np.diag([-1.0, 1.0]) if rng.random() < 0.5 else np.eye(2)
    if kind == "exact":
        turn = np.array([[0.0, -1.0], [1.0, 0.0]])
        return np.linalg.matrix_power(turn, int(rng.integers(4))) @ flip
    angle = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    shear = np.tan(rng.uniform(-_MAX_SHEAR, _MAX_SHEAR, size=2))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale = np.exp(rng.uniform(-_MAX_LOG_SCALE, _MAX_LOG_SCALE))
    return rotation @ np.array([[1.0, shear[0]], [shear[1], 1.0]]) @ flip / scale


def fitting_size(shape: tuple[int, int], matrix: np.ndarray, patch: int) -> tuple[int, int]:
    """Size of the largest patch, at most `patch` a side, that lies within a raster whatever its place."""
    reach = np.abs(matrix)
    if np.count_nonzero(reach) == 2:  # axes stay axes: each side by itself
        limit = (reach.T @ np.array(shape)).round().astype(int)
        return int(min(patch, limit[0])), int(min(patch, limit[1]))
    need = reach.sum(axis=1) * (patch - 1)
    fits = min(1.0, float(((np.array(shape) - 1) / need).min())) if patch > 1 else 1.0
    side = int(np.floor(fits * (patch - 1) + 1e-9)) + 1
    return side, side


def draw_view(shape: tuple[int, int], matrix: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> View:
    """A place for the patch, uniform among those where the raster fills it."""
    half = np.abs(matrix) @ (np.array(size) - 1) / 2
    room = np.maximum(np.array(shape) - 1 - 2 * half, 0)
    if np.count_nonzero(matrix) == 2:
        return View(matrix, half + rng.integers(np.round(room).astype(int) + 1), size)
    return View(matrix, half + rng.uniform(0, 1, size=2) * room, size)


@dataclass(frozen=True, eq=False)
class Patch:
    """What the model sees of a slide at once.

    Attributes
    ----------
    image
        (3, h, w).
    bags
        Pixels (row-major) of each label that teaches, with their shares.
    counts
        Their counts, (n, G).
    measured
        Genes that teach, (G,) bool.
    level
        Which of the effects are the section's.
    """

    image: Tensor
    bags: Bags
    counts: Tensor
    measured: Tensor
    level: int

    def to(self, device: torch.device) -> Patch:
        """The same on a device."""
        bags = replace(self.bags, **{name: getattr(self.bags, name).to(device) for name in ("part", "bag", "weight")})
        return Patch(self.image.to(device), bags, self.counts.to(device), self.measured.to(device), self.level)


def take(slide: Slide, view: View) -> Patch:
    """The patch of `slide` that `view` shows: image bilinear, labels of the nearest cell.

    A spot teaches if all its cells lie within the patch and off its border; the background always does.
    """
    at = view.positions()
    nearest = np.rint(at).astype(np.int64)
    nearest = np.clip(nearest, 0, np.array(slide.raster.shape) - 1)
    cell = slide.cells[nearest[..., 0], nearest[..., 1]].ravel()
    place = view.inverse(np.column_stack([slide.raster.row, slide.raster.column]).astype(float))
    inside = ((place > 0.5) & (place < np.array(view.size) - 1.5)).all(axis=1)
    outside = np.append(~inside, 0)  # nothing is cut off the background
    shown = slide.labels[cell].T.tocsr()
    whole = slide.covers @ outside == 0
    used = np.flatnonzero(whole & (np.diff(shown.indptr) > 0))
    return Patch(
        image=_bilinear(slide.raster.image, at),
        bags=Bags.of(shown, used),
        counts=torch.from_numpy(slide.counts[used]),
        measured=torch.from_numpy(slide.measured),
        level=slide.level,
    )


def _bilinear(image: np.ndarray, at: np.ndarray) -> Tensor:
    low = np.clip(np.floor(at + 1e-9).astype(np.int64), 0, np.array(image.shape[1:]) - 1)
    high = np.minimum(low + 1, np.array(image.shape[1:]) - 1)
    (fr, fc) = np.clip(at - low, 0, 1).transpose(2, 0, 1).astype(np.float32)
    (r0, c0), (r1, c1) = low.transpose(2, 0, 1), high.transpose(2, 0, 1)
    top = image[:, r0, c0] * (1 - fc) + image[:, r0, c1] * fc
    bottom = image[:, r1, c0] * (1 - fc) + image[:, r1, c1] * fc
    return torch.from_numpy(np.ascontiguousarray(top * (1 - fr) + bottom * fr))


_GREY = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def jittered(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """`image` (3, h, w) in [−0.9, 0.9] with random brightness, contrast, saturation and hue."""
    if strength == 0:
        return image
    brightness, contrast, saturation = (1 + rng.uniform(-strength, strength, size=3)).tolist()
    angle = 2 * np.pi * rng.uniform(-strength, strength)
    x = ((image / _SPAN + 1) / 2 * brightness).clamp(0, 1)
    grey = torch.tensordot(_GREY, x, dims=1)
    x = (grey.mean() + contrast * (x - grey.mean())).clamp(0, 1)
    grey = torch.tensordot(_GREY, x, dims=1)
    x = (grey + saturation * (x - grey)).clamp(0, 1)
    turn = torch.tensor([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    hue = torch.linalg.inv(_TO_YIQ) @ turn.float() @ _TO_YIQ
    x = torch.tensordot(hue, x, dims=1).clamp(0, 1)
    return (2 * x - 1) * _SPAN


def draw_patches(
    slides: Sequence[Slide], chosen: Sequence[int], config: XFuseConfig, rng: np.random.Generator
) -> list[Patch]:
    """One random patch of each of the chosen slides, all of one size."""
    matrices = [draw_matrix(config.augmentation, rng) for _ in chosen]
    shapes = [slides[index].raster.shape for index in chosen]
    sizes = [fitting_size(shape, matrix, config.patch) for shape, matrix in zip(shapes, matrices, strict=True)]
    height, width = (min(each) for each in zip(*sizes, strict=True))
    patches = []
    for index, shape, matrix in zip(chosen, shapes, matrices, strict=True):
        patch = take(slides[index], draw_view(shape, matrix, (height, width), rng))
        image = jittered(patch.image, config.colour_jitter, rng)
        patches.append(Patch(image, patch.bags, patch.counts, patch.measured, patch.level))
    return patches
