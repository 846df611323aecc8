"""What the network sees of a section: windows of cells, and the measured expression around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from ...data.section import Section
from ...errors import DataValueError
from .._inner import Scaler, read_features
from ..nn.pooling import bag_rows
from .config import HistexConfig, Mode
from .context import Places, densified, is_staggered, staggered_lattice
from .scale import Scale, min_max
from .windows import Cells, block_centre, disc_mask

__all__ = ["Batch", "Batches", "Inputs", "Shape", "Spots", "fit_scale", "spots_of"]

_LEAST_COVERED = 0.5  # of the largest spot, below which the counts of a cut one are too few to be read by others


class Batch(NamedTuple):
    """Spots of one optimiser step.

    `tokens` (b, t, c) and `present` (b, t) of their windows, `context` (b, k, g); the cells under them as entries:
    `cell` (e,) counts tokens of the whole batch, `bag` (e,) spots, `weight` (e,) shares; `target` (b, G) and the
    `importance` (b,) of each spot.
    """

    tokens: torch.Tensor
    present: torch.Tensor
    context: torch.Tensor
    cell: torch.Tensor
    bag: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True)
class Shape:
    """How large windows are.

    Attributes
    ----------
    side
        Cells along one side, odd.
    radius
        Radius of a spot in cells.
    """

    side: int
    radius: float

    @classmethod
    def of(cls, spots: Sequence[Spots], mode: Mode) -> Self:
        """Windows that hold the published disc of cells, or every cell that any spot touches."""
        largest = max(float(each.size.max()) for each in spots)
        radius = round(float(np.sqrt(largest / np.pi)), 6)
        reach = int(np.floor(radius)) if mode == "original" else max(each.reach for each in spots)
        return cls(2 * reach + 1, radius)

    @property
    def disc(self) -> np.ndarray:
        """Cells of a window that the published supervision sums, flat, (n,)."""
        return np.flatnonzero(disc_mask(self.radius))


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots of a section and what lies under them.

    Attributes
    ----------
    cells
        Cells of the section.
    position
        Their centres on the grid, (n, 2).
    counts
        Measured counts, (n, G) float32.
    rows
        Spots that have cells, which supervise.
    size
        Cells under each spot, (n,).
    part, bag, weight
        Cell, spot and share of each overlap, (e,).
    """

    cells: Cells
    position: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    size: np.ndarray
    part: np.ndarray
    bag: np.ndarray
    weight: np.ndarray

    @property
    def reach(self) -> int:
        """Largest distance, along an axis, of a spot's cell from its central one."""
        distance = np.abs(self.cells.place[self.part] - np.floor(self.position[self.bag]).astype(np.int64))
        return int(distance.max())

    @property
    def density(self) -> np.ndarray:
        """Counts per whole cell; of spots without cells, as if they had the most, (n, G)."""
        size = np.where(self.size > 0, self.size, self.size.max())
        return self.counts / size[:, None]

    @property
    def readable(self) -> np.ndarray:
        """Spots whose expression others may read: most of them lies on tissue."""
        return np.flatnonzero(self.size >= _LEAST_COVERED * self.size.max())


def spots_of(section: Section) -> Spots:
    """Spots of a section with measured expression."""
    cells = Cells.of(section)
    counts = section.require_targets().in_unit("counts")[:]
    if not np.isfinite(counts).all():
        raise DataValueError(f"section {section.name!r} has counts that are NaN or infinite; drop those spots or genes")
    share = section.require_parts().share.tocsr()
    share.sort_indices()
    bag = np.repeat(np.arange(share.shape[0]), np.diff(share.indptr))
    return Spots(
        cells=cells,
        position=cells.positions(section.coordinates),
        counts=counts,
        rows=bag_rows(share, section.name),
        size=np.asarray(share.sum(axis=1)).ravel(),
        part=share.indices.astype(np.int64),
        bag=bag,
        weight=share.data.astype(np.float32),
    )


def fit_scale(spots: Sequence[Spots], shape: Shape, mode: Mode) -> Scale:
    """Scale of all spots that supervise."""
    if mode == "original":
        return Scale.published(np.concatenate([each.counts[each.rows] for each in spots]), len(shape.disc))
    return Scale.of_density(np.concatenate([each.density[each.rows] for each in spots]))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Windows and context of one section.

    Attributes
    ----------
    places
        Expression on the grid, scaled.
    spacing
        Median distance of neighbouring spots in cells.
    scaler
        Standardisation of the channels; ``None``: as they come.
    """

    config: HistexConfig
    shape: Shape
    spots: Spots
    places: Places
    spacing: float
    scaler: Scaler | None

    @classmethod
    def of(cls, config: HistexConfig, shape: Shape, spots: Spots, scale: Scale, scaler: Scaler | None) -> Self:
        """Inputs of the section that `spots` are of."""
        from scipy.spatial import cKDTree

        n = len(spots.position)
        spacing = float(np.median(cKDTree(spots.position).query(spots.position, k=2)[0][:, 1])) if n > 1 else 1.0
        places = _published_places(spots) if config.mode == "original" else _places(spots, scale)
        return cls(config, shape, spots, places, spacing or 1.0, scaler)

    def tokens(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels of the cells of windows (n, side²), and which of them exist."""
        present = windows >= 0
        needed, index = np.unique(windows[present], return_inverse=True)
        channels = read_features(self.spots.cells.section, needed)
        if self.scaler is not None:
            channels = self.scaler(channels)
        tokens = np.zeros((*windows.shape, channels.shape[1]), dtype=np.float32)
        tokens[present] = channels[index]
        if self.config.mode == "fixed":
            half = self.shape.side / 2
            step = (np.arange(self.shape.side, dtype=np.float32) + 0.5 - half) / half
            offset = np.stack(np.meshgrid(step, step, indexing="ij"), axis=-1).reshape(1, -1, 2)
            tokens = np.concatenate([tokens, np.broadcast_to(offset, (len(windows), *offset.shape[1:]))], axis=2)
        return torch.from_numpy(tokens), torch.from_numpy(present)

    def context(self, centres: np.ndarray, without: np.ndarray | None = None) -> torch.Tensor:
        """Expression of the places nearest to the centres of windows (n, 2), as seen from there."""
        index = self.places.nearest(centres, self.config.n_context, without)
        values = self.places.values[index]
        if self.config.mode == "fixed":
            offset = (self.places.positions[index] - centres[:, None]) / self.spacing
            values = np.concatenate([values, offset.astype(np.float32)], axis=2)
        return torch.from_numpy(values)

    def centres(self, corners: np.ndarray) -> np.ndarray:
        """Where the windows of the prediction with these corners (n, 2) look for expression."""
        if self.config.mode == "original":
            return block_centre(corners // self.shape.side, self.shape.side).astype(np.float64)
        return corners + self.shape.side / 2

    def corners(self, place: np.ndarray) -> np.ndarray:
        """Corners of all windows of the prediction that hold any of the cells at `place` (m, 2), (n, 2)."""
        side, step = self.shape.side, self.stride
        last = place // step * step
        back = np.arange(-(-side // step)) * step
        corners = last[:, None, None] - np.stack(np.meshgrid(back, back, indexing="ij"), axis=-1).reshape(1, -1, 1, 2)
        corners = corners.reshape(-1, 2)
        holds = (np.repeat(place, len(back) ** 2, axis=0) - corners < side).all(axis=1)
        return np.unique(corners[holds], axis=0)

    @property
    def stride(self) -> int:
        """Cells between two windows of the prediction."""
        return -(-self.shape.side // self.config.overlap)

    def importance(self) -> np.ndarray:
        """How much each token counts in the mean over overlapping windows, (side²,): less towards the border."""
        if self.config.overlap == 1:
            return np.ones(self.shape.side**2, dtype=np.float32)
        half = (self.shape.side + 1) / 2
        tent = 1 - np.abs(np.arange(self.shape.side) - self.shape.side // 2) / half
        return np.outer(tent, tent).ravel().astype(np.float32)

    def training(self, spots: np.ndarray, scale: Scale) -> Batch:
        """A batch of some of the section's spots."""
        if self.config.mode == "original":
            return self._published_training(spots, scale)
        mine = self.spots
        central = np.floor(mine.position[spots]).astype(np.int64)
        corner = central - self.shape.side // 2
        tokens, present = self.tokens(mine.cells.windows(corner, self.shape.side))
        number = np.full(len(mine.position), -1)
        number[spots] = np.arange(len(spots))
        under = np.flatnonzero(number[mine.bag] >= 0)
        under = under[np.argsort(number[mine.bag[under]], kind="stable")]
        bag = number[mine.bag[under]]
        inside = mine.cells.place[mine.part[under]] - corner[bag]
        cell = bag * self.shape.side**2 + inside[:, 0] * self.shape.side + inside[:, 1]
        return Batch(
            tokens=tokens,
            present=present,
            context=self.context(central + 0.5, without=spots),
            cell=torch.from_numpy(cell),
            bag=torch.from_numpy(bag),
            weight=torch.from_numpy(mine.weight[under]),
            target=torch.from_numpy(scale(mine.density[spots])),
            importance=torch.from_numpy((mine.size[spots] / mine.size.max()).astype(np.float32)),
        )

    def _published_training(self, spots: np.ndarray, scale: Scale) -> Batch:
        corner = np.rint(self.spots.position[spots]).astype(np.int64) - self.shape.side // 2
        tokens, present = self.tokens(self.spots.cells.windows(corner, self.shape.side))
        disc = self.shape.disc
        bag = np.repeat(np.arange(len(spots)), len(disc))
        return Batch(
            tokens=tokens,
            present=present,
            # As published: around the place that has the spot's number, which is another place.
            context=self.context(self.places.positions[spots]),
            cell=torch.from_numpy(bag * self.shape.side**2 + np.tile(disc, len(spots))),
            bag=torch.from_numpy(bag),
            weight=torch.ones(len(bag)),
            target=torch.from_numpy(scale(self.spots.counts[spots])),
            importance=torch.ones(len(spots)),
        )


def _places(spots: Spots, scale: Scale) -> Places:
    """Spots that are well covered, and places between them; sources are numbers of all spots."""
    rows = spots.readable
    places = densified(Places.measured(spots.position[rows], scale(spots.density[rows])))
    return Places(places.positions, places.values, rows[places.sources])


def _published_places(spots: Spots) -> Places:
    """The published enhanced lattice with a scale of its own; where spots lie otherwise, places between them."""
    cells = spots.cells
    xy = cells.frame.microns(spots.position)
    if is_staggered(xy):
        lattice = staggered_lattice(xy, spots.counts)
        positions, values = cells.positions(lattice.coordinates), lattice.expression
        return Places(positions, min_max(values)[0], np.full((len(values), 2), -1))
    places = densified(Places.measured(spots.position, spots.counts))
    return Places(places.positions, min_max(places.values)[0], places.sources)


class Batches(Sequence[Batch]):
    """Batches of the spots of several sections, gathered one at a time when asked for."""

    def __init__(self, inputs: Sequence[Inputs], scale: Scale, *, size: int, seed: int | None) -> None:
        self._inputs, self._scale = inputs, scale
        spots = [(number, row) for number, each in enumerate(inputs) for row in each.spots.rows]
        if seed is not None:
            spots = [spots[i] for i in np.random.default_rng([seed, 1]).permutation(len(spots))]
        self._chosen = [np.array(spots[start : start + size]) for start in range(0, len(spots), size)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        return _joined(list(self._parts(self._chosen[number])))

    def _parts(self, chosen: np.ndarray) -> Iterator[Batch]:
        for number in np.unique(chosen[:, 0]):
            yield self._inputs[number].training(chosen[chosen[:, 0] == number, 1], self._scale)


def _joined(parts: Sequence[Batch]) -> Batch:
    """One batch of several."""
    before = np.cumsum([0] + [len(part.target) for part in parts])
    side2 = parts[0].tokens.shape[1]
    moved = [
        part._replace(cell=part.cell + int(start) * side2, bag=part.bag + int(start))
        for part, start in zip(parts, before[:-1], strict=True)
    ]
    return Batch(*(torch.cat(fields) for fields in zip(*moved, strict=True)))
