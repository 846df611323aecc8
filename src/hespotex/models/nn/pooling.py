"""From parts to observations inside a network: the torch side of :func:`hespotex.data.shares.aggregate`.

Every method that learns a fine level from spots pools with :class:`Bags`, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DataValueError

if TYPE_CHECKING:
    import torch
    from scipy import sparse

__all__ = ["Bags", "bag_rows"]


@dataclass(frozen=True, eq=False)
class Bags:
    """The parts of some observations, side by side.

    Attributes
    ----------
    part
        Index of each entry's part in its section, (k,) int64.
    bag
        Which of the observations each entry belongs to, ascending, (k,) int64.
    weight
        Its share, (k,) float32.
    n
        Number of observations.
    """

    part: torch.Tensor
    bag: torch.Tensor
    weight: torch.Tensor
    n: int

    @classmethod
    def of(cls, share: sparse.csr_array, rows: np.ndarray | slice = slice(None)) -> Bags:
        """Entries of the chosen rows of a share matrix (n, m)."""
        import torch

        chosen = share[rows]
        bag = np.repeat(np.arange(chosen.shape[0]), np.diff(chosen.indptr))
        return cls(
            part=torch.from_numpy(chosen.indices.astype(np.int64)),
            bag=torch.from_numpy(bag),
            weight=torch.from_numpy(chosen.data.astype(np.float32)),
            n=int(chosen.shape[0]),
        )

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted sums (n, …) of the entries' values (k, …)."""
        import torch

        weighted = values * self.weight.to(values.dtype).reshape(-1, *([1] * (values.ndim - 1)))
        total = torch.zeros((self.n, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return total.index_add(0, self.bag, weighted)

    def size(self) -> torch.Tensor:
        """Sum of the shares of each observation, (n,)."""
        import torch

        return torch.zeros(self.n, dtype=self.weight.dtype, device=self.weight.device).index_add(
            0, self.bag, self.weight
        )

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted means (n, …) of the entries' values (k, …); 0 for an observation without parts."""
        size = self.size().to(values.dtype).clamp_min(1e-12)
        return self.sum(values) / size.reshape(-1, *([1] * (values.ndim - 1)))


def bag_rows(share: sparse.csr_array, name: str = "section") -> np.ndarray:
    """Observations that have any parts, (k,) int: only they can supervise.

    Raises
    ------
    DataValueError
        If none has.
    """
    rows = np.flatnonzero(np.asarray(share.sum(axis=1)).ravel() > 0)  # a share of 0 may be stored
    if len(rows) == 0:
        raise DataValueError(
            f"section {name!r}: no spot holds any of its {share.shape[1]} parts; check that the superpixels or nuclei lie "
            "on the tissue under the spots"
        )
    return rows
