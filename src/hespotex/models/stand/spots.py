"""What an optimiser step sees: some spots, the features of their parts, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import torch

from ...data.section import rows_of
from ...errors import DataValueError
from ..nn.pooling import Bags

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor

    from ...data.section import Section

__all__ = ["SpotBatch", "SpotBatches", "Spots", "read_parts"]


class SpotBatch(NamedTuple):
    """Some spots.

    Attributes
    ----------
    features
        Of each entry's part, (k, d) float32, or its crop, (k, 2352) uint8.
    bag, weight
        As in :class:`~hespotex.models.nn.pooling.Bags`, (k,).
    target
        Counts or log expression, (n, G).
    size
        Size factors, (n,).
    """

    features: Tensor
    bag: Tensor
    weight: Tensor
    target: Tensor
    size: Tensor

    @property
    def bags(self) -> Bags:
        """The entries; they have features of their own, so that they are their own parts."""
        return Bags(torch.arange(len(self.bag), device=self.bag.device), self.bag, self.weight, len(self.target))


@dataclass(frozen=True, eq=False)
class Spots:
    """The spots of one section that supervise, with the parts that lie under them.

    Attributes
    ----------
    rows
        Which of the section's observations they are, (n,) int.
    share
        Spots × parts, CSR (n, m); parts under no spot are left out.
    features
        Features of these parts, (m, d) float32, or their crops, (m, 2352) uint8.
    target
        Counts or log expression, (n, G) float32.
    size
        Size factors, (n,) float32.
    """

    rows: np.ndarray
    share: sparse.csr_array
    features: np.ndarray
    target: np.ndarray
    size: np.ndarray

    @property
    def amount(self) -> np.ndarray:
        """How much of parts lies under each spot, in whole parts, (n,) float32."""
        return np.asarray(self.share.sum(axis=1), dtype=np.float32)

    def batch(self, rows: np.ndarray) -> SpotBatch:
        """Some of the spots."""
        bags = Bags.of(self.share, rows)
        return SpotBatch(
            torch.from_numpy(self.features[bags.part.numpy()]),
            bags.bag,
            bags.weight,
            torch.from_numpy(self.target[rows]),
            torch.from_numpy(self.size[rows]),
        )


class SpotBatches(Sequence[SpotBatch]):
    """Spots of several sections in batches that mix them; each batch is put together when asked for."""

    def __init__(
        self, spots: Sequence[Spots], chosen: Mapping[int, np.ndarray], size: int, seed: int, *, drop_last: bool = False
    ) -> None:
        self.spots = spots
        pairs = np.concatenate([np.column_stack([np.full(len(rows), i), rows]) for i, rows in chosen.items()])
        order = np.random.default_rng(seed).permutation(len(pairs))
        self.batches = [pairs[order[start : start + size]] for start in range(0, len(pairs), size)]
        if drop_last and len(self.batches) > 1 and len(self.batches[-1]) < size:
            self.batches.pop()

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> SpotBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[SpotBatch]: ...
    def __getitem__(self, index: int | slice) -> SpotBatch | list[SpotBatch]:
        """One batch, or several."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        pairs = self.batches[index]
        parts = [self.spots[i].batch(pairs[pairs[:, 0] == i, 1]) for i in np.unique(pairs[:, 0])]
        starts = np.cumsum([0] + [len(part.target) for part in parts])
        return SpotBatch(
            torch.cat([part.features for part in parts]),
            torch.cat([part.bag + int(start) for part, start in zip(parts, starts[:-1], strict=True)]),
            torch.cat([part.weight for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat([part.size for part in parts]),
        )


def read_parts(section: Section, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """Features of some parts, dense float32.

    Raises
    ------
    DataValueError
        If one is not finite.
    """
    block = np.ascontiguousarray(rows_of(section.require_parts().require("features"), rows), dtype=np.float32)
    if not np.isfinite(block).all():
        raise DataValueError(
            f"section {section.name!r} has parts whose features are NaN or infinite; embed them anew, or drop those parts"
        )
    return block
