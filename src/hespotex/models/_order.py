"""In which order a fit sees its items, shared out among processes, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

from ._distributed import ALONE, Group

__all__ = ["UNWEIGHTED", "Order", "weighted_steps"]

UNWEIGHTED = "unweighted loss"


class Order:
    """Items in an order that depends on seed and epoch alone; what Lightning takes for a data loader.

    Of several processes each takes every so many items. All need as many: where the items do not suffice, a process
    repeats one, with weight 0.
    """

    def __init__(
        self,
        items: Sequence[Any],
        seed: int,
        *,
        shuffle: bool,
        visit: Callable[[int], Sequence[int]] | None = None,
        group: Group = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.items, self.seed, self.shuffle, self.visit, self.epoch = items, seed, shuffle, visit, 0
        self.group, self.per_step = group, group.size * accumulate

    @property
    def n_visited(self) -> int:
        """Items that all processes see in an epoch."""
        return len(self.items) if self.visit is None else len(self.visit(0))

    def __len__(self) -> int:
        return -(-self.n_visited // self.group.size)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(len(self.items)) if self.visit is None else np.array(self.visit(self.epoch))
        if self.shuffle and self.visit is None:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for batch in range(len(self)):
            yield self.items[int(order[self.place(batch) % len(order)])]

    def place(self, batch: int) -> int:
        """Place in the epoch of a batch of this process."""
        return batch * self.group.size + self.group.rank

    def counts(self, batch: int) -> bool:
        """Whether a batch of this process is not a mere repetition."""
        return self.place(batch) < self.n_visited

    def weight(self, batch: int) -> float:
        """What makes the mean over the batches of a full step one over those that this step has."""
        if not self.counts(batch):
            return 0.0
        first = self.place(batch) // self.per_step * self.per_step
        return self.per_step / min(self.per_step, self.n_visited - first)


@contextmanager
def weighted_steps(module: Any, order: Order) -> Iterator[None]:
    """Let the loss of each batch count as `order` says."""
    if order.per_step == 1:
        yield
        return
    step = module.training_step

    @wraps(step)
    def weighted(batch: Any, batch_idx: int) -> dict[str, Any]:
        values = step(batch, batch_idx)
        values = dict(values) if isinstance(values, Mapping) else {"loss": values}
        return {**values, UNWEIGHTED: values["loss"].detach(), "loss": order.weight(batch_idx) * values["loss"]}

    module.training_step = weighted
    try:
        yield
    finally:
        del module.training_step
