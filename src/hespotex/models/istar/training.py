"""What teaches the network: parts under spots, counts of spots, and the scale of each gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from scipy import sparse

from ..._optional import optional_import
from ...data.section import Section
from ...errors import DataValueError
from .._inner import Scaler, of_shape, read_features, row_blocks
from ..nn.counts import nb_loss, poisson_loss
from ..nn.pooling import Bags, bag_rows
from .config import IStarConfig
from .network import PartNetwork
from .spots import disc, disc_members, published_radius

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GeneScale", "SpotBatches", "Supervision", "batch_loss", "section_depths", "training_step"]

_READ_ROWS = 4096
_PARTITIONS = 8  # ways to divide the spots into batches, visited in turn
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Supervision:
    """Spots that supervise, and the parts under them.

    Attributes
    ----------
    features
        Features of the parts under spots, (k, d) float32.
    share
        Spots × these parts, CSR (n, k).
    counts
        Counts of the spots, (n, G) float32.
    size
        Whole parts that a spot's counts are spread over, (n,): the sum of its shares, or of a whole disc.
    depth
        Depth of the spot's section relative to the mean, (n,).
    """

    features: np.ndarray
    share: sparse.csr_array
    counts: np.ndarray
    size: np.ndarray
    depth: np.ndarray

    @classmethod
    def of(cls, section: Section, features: Section, scaler: Scaler | None, config: IStarConfig) -> Self:
        """Supervision by the spots of one section, whose parts are the observations of `features`.

        Spots are ordered by their place, so that the order they come in does not count.
        """
        parts = section.require_parts()
        if config.pooling == "disc":
            radius = published_radius(parts)
            share = disc_members(parts, section.coordinates, radius)
            size = np.full(section.n_obs, float(len(disc(radius))))
        else:
            share = parts.share
            size = np.asarray(share.sum(axis=1)).ravel()
        rows = bag_rows(share, section.name)
        rows = rows[np.lexsort(np.asarray(section.coordinates)[rows].T)]
        chosen = sparse.csr_array(share[rows])
        covered = np.unique(chosen.indices)
        counts = section.require_targets().in_unit("counts")[rows]
        return cls(
            features=_read(features, covered, scaler),
            share=sparse.csr_array(chosen[:, covered]),
            counts=counts,
            size=size[rows].astype(np.float32),
            depth=np.ones(len(rows), dtype=np.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self], depth: Sequence[float]) -> Self:
        """Supervision by all spots of several sections with their relative depths."""
        return cls(
            features=np.concatenate([each.features for each in parts]),
            share=sparse.csr_array(sparse.block_diag([each.share for each in parts], format="csr")),
            counts=np.concatenate([each.counts for each in parts]),
            size=np.concatenate([each.size for each in parts]),
            depth=np.repeat(np.asarray(depth, dtype=np.float32), [len(each.counts) for each in parts]),
        )

    @property
    def n(self) -> int:
        """Number of spots."""
        return len(self.counts)


def _read(features: Section, covered: np.ndarray, scaler: Scaler | None) -> np.ndarray:
    """Scaled features of some parts, read in consecutive blocks whatever lies where."""
    out = np.empty((len(covered), features.features.shape[1]), dtype=np.float32)
    for rows in row_blocks(features.n_obs, _READ_ROWS):
        first, last = np.searchsorted(covered, [rows.start, rows.stop])
        if first < last:
            block = read_features(features, rows)[covered[first:last] - rows.start]
            out[first:last] = block if scaler is None else scaler(block)
    return out


@dataclass(frozen=True, eq=False)
class GeneScale:
    """Expression of a whole part from an output of the network: ``slope * output + offset``.

    Attributes
    ----------
    slope, offset
        In counts, (G,) float32.
    """

    slope: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, data: Supervision, *, minmax: bool) -> Self:
        """From range and minimum of the spots' counts per part, or from their mean."""
        counts = data.counts.astype(np.float64) / data.depth[:, None]
        if not minmax:
            mean = counts.sum(axis=0) / data.size.sum(dtype=np.float64)
            return cls(mean.astype(np.float32), np.zeros(counts.shape[1], dtype=np.float32))
        density = counts / data.size[:, None]
        low = density.min(axis=0)
        return cls((density.max(axis=0) - low).astype(np.float32), low.astype(np.float32))

    def scaled(self, data: Supervision) -> np.ndarray:
        """Counts of spots per part in units of the network's outputs, (n, G) float32."""
        density = data.counts / (data.size * data.depth)[:, None]
        return ((density - self.offset) / (self.slope + _TINY)).astype(np.float32)

    def __call__(self, outputs: Tensor) -> Tensor:
        """Expected counts of whole parts, (k, G)."""
        return outputs * torch.from_numpy(self.slope).to(outputs) + torch.from_numpy(self.offset).to(outputs)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays, by the names that :meth:`from_state` reads."""
        return {"gene_slope": self.slope, "gene_offset": self.offset}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], n_genes: int) -> Self:
        """Inverse of :meth:`state`."""
        slope, offset = (of_shape(arrays[name], (n_genes,), name) for name in ("gene_slope", "gene_offset"))
        return cls(slope, offset)


class SpotBatches(Sequence[tuple[Any, ...]]):
    """What one optimiser step sees: some spots and all parts under them, put together when asked for.

    Spots are divided into batches in several ways; :meth:`visit` names the batches of an epoch.

    Parameters
    ----------
    data
        Spots and parts.
    target
        What the spots are compared with, (n, G).
    batch
        Spots per batch; by default a sixteenth of them, at most 128.
    seed
        Of the order of the spots.
    """

    def __init__(self, data: Supervision, target: np.ndarray, batch: int | None, seed: int) -> None:
        self._data, self._target = data, target
        self.batch = batch or min(128, max(1, data.n // 16))
        rng = np.random.default_rng(seed)
        self.n_batches = -(-data.n // self.batch)
        n_ways = 1 if self.n_batches == 1 else _PARTITIONS
        self._rows = [rows for _ in range(n_ways) for rows in np.array_split(rng.permutation(data.n), self.n_batches)]

    def visit(self, epoch: int) -> Sequence[int]:
        """Batches of an epoch, each spot once."""
        start = epoch * self.n_batches % len(self._rows)
        return range(start, start + self.n_batches)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Features, bag, share, size, depth and target of a batch."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows = self._rows[index]
        bags = Bags.of(self._data.share, rows)
        return (
            torch.from_numpy(self._data.features[bags.part.numpy()]),
            bags.bag,
            bags.weight,
            torch.from_numpy(self._data.size[rows]),
            torch.from_numpy(self._data.depth[rows]),
            torch.from_numpy(self._target[rows]),
        )


def batch_loss(network: PartNetwork, batch: tuple[Tensor, ...], config: IStarConfig, slope: Tensor) -> Tensor:
    """Loss of the spots of a batch of :class:`SpotBatches`."""
    x, bag, weight, size, depth, target = batch
    bags = Bags(part=bag, bag=bag, weight=weight, n=len(target))
    mean = bags.mean(network(x))
    if config.loss == "mse":
        return ((mean - target) ** 2).mean()
    expected = mean * (size * depth)[:, None] * slope
    if config.loss == "nb":
        assert network.log_dispersion is not None
        return nb_loss(expected, target, torch.exp(-network.log_dispersion))
    return poisson_loss(expected, target)


def training_step(config: IStarConfig, network: PartNetwork, scale: GeneScale) -> Any:
    """The module that Lightning trains."""
    lightning = optional_import("lightning.pytorch", feature="training istar")

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("slope", torch.from_numpy(scale.slope))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch_loss(self.network, batch, config, self.slope)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
            return kind(self.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    return Step()


def section_depths(sections: Sequence[Section], config: IStarConfig) -> np.ndarray:
    """Median library size per covered part of each section, relative to their geometric mean, (k,)."""
    if config.depth == "none" or len(sections) == 1:
        return np.ones(len(sections))
    depths = []
    for section in sections:
        parts = section.require_parts()
        size = np.asarray(parts.share.sum(axis=1)).ravel()
        rows = bag_rows(parts.share, section.name)
        total = np.asarray(section.require_targets().library_size, dtype=np.float64)
        depths.append(float(np.median(total[rows] / size[rows])))
    if min(depths) <= 0:
        names = [section.name for section, depth in zip(sections, depths, strict=True) if depth <= 0]
        raise DataValueError(f"more than half of the spots of {', '.join(names)} have no counts; leave it out")
    return np.asarray(depths) / np.exp(np.mean(np.log(depths)))
