"""Training on rows of arrays that stay where they are: batches are row numbers, mixed anew in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RowBatches", "mark_of"]


class RowBatches(Sequence["Tensor"]):
    """Row numbers of the batches of all epochs, mixed anew in each; made when asked for.

    Items of :func:`~hespotex.models._training.fit_lightning`, with :meth:`visit` as its ``visit``.
    """

    def __init__(self, rows: np.ndarray, size: int, epochs: int, seed: int) -> None:
        self.rows, self.size, self.epochs, self.seed = rows, size, epochs, seed
        self.per_epoch = -(-len(rows) // size)
        self._mixed: tuple[int, np.ndarray] = (-1, rows)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, number: Any) -> Any:
        import torch

        epoch, batch = divmod(number, self.per_epoch)
        if self._mixed[0] != epoch:
            self._mixed = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return torch.from_numpy(self._mixed[1][batch * self.size : (batch + 1) * self.size])

    def visit(self, epoch: int) -> range:
        """Numbers of the batches of an epoch."""
        return range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)


def mark_of(tensors: Iterable[Tensor | None], config: Any) -> str:
    """Differs whenever data or settings of a training do; settings of prediction do not count.

    Row numbers do not say what they stand for, so that a module which trains on them keeps this as an attribute.
    """
    later = getattr(config, "at_prediction", ())
    digest = hashlib.sha256(repr({name: value for name, value in vars(config).items() if name not in later}).encode())
    for value in tensors:
        if value is not None:
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()
