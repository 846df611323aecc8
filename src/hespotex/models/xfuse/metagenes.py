"""Metagenes: slots that training fills and empties, and the two published ways to decide which.

A forest remembers which metagenes were split from which. Its trees are nested pairs whose leaves are slots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .network import EPS

__all__ = ["Change", "Metagenes", "drop_and_split", "extra", "spare"]

Tree = int | tuple["Tree", "Tree"]
_SPLIT, _END = -1, -2
_START_SD = 1e-2


@dataclass(frozen=True)
class Change:
    """What a test of the metagenes leads to.

    Attributes
    ----------
    dropped
        Slots to empty.
    copies
        Pairs (slot, new slot) of exact copies.
    added
        Slots to fill with new metagenes.
    forest
        Trees afterwards.
    """

    dropped: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    forest: list[Tree] = field(default_factory=list)


def _leaves(tree: Tree) -> list[int]:
    """Slots of a tree, left to right."""
    return [tree] if isinstance(tree, int) else _leaves(tree[0]) + _leaves(tree[1])


def drop_and_split(
    forest: Sequence[Tree],
    active: Collection[int],
    useful: Collection[int],
    slots: int,
    shuffle: Callable[[], bool] = lambda: False,
) -> Change:
    """The published default: splits that did not pay collapse, useful metagenes are split.

    Parameters
    ----------
    forest
        Trees so far.
    active, useful
        Slots in use, and those among them that contribute.
    slots
        Most metagenes.
    shuffle
        Whether the children of a split change places, asked once for each.

    Notes
    -----
    What is left of a pair takes over its sibling's share, so it is neither removed nor split before its next test.
    """
    settled: set[int] = set()

    def reduced(tree: Tree) -> Tree | None:
        if isinstance(tree, int):
            return tree if tree in active else None
        left, right = reduced(tree[0]), reduced(tree[1])
        for child, sibling in ((left, right), (right, left)):
            gone = child is None or (isinstance(child, int) and child not in useful and child not in settled)
            if gone and sibling is not None:
                if isinstance(sibling, int):
                    settled.add(sibling)
                return sibling
        return None if left is None or right is None else (left, right)

    trees = [tree for tree in map(reduced, forest) if tree is not None]
    grown = {slot for tree in trees for slot in _leaves(tree)}
    trees += [slot for slot in sorted(active) if slot in useful and slot not in grown]
    kept = [t for t in trees if not isinstance(t, int) or t in useful or t in settled]
    kept = kept or trees[:1] or [min(active)]
    held = [slot for tree in kept for slot in _leaves(tree)]
    free = iter([slot for slot in range(slots) if slot not in held])
    room = slots - len(held)
    copies: list[tuple[int, int]] = []

    def split(tree: Tree) -> Tree:
        nonlocal room
        if isinstance(tree, int):
            if tree not in useful or tree in settled or room < 1:
                return tree
            room -= 1
            copies.append((tree, next(free)))
            return copies[-1][::-1] if shuffle() else copies[-1]
        if all(isinstance(child, int) for child in tree) and not all(child in useful for child in tree):
            return tree
        return (split(tree[0]), split(tree[1]))

    forest = [split(tree) for tree in kept]
    return Change(dropped=sorted(set(active) - set(held)), copies=copies, forest=forest)


def spare(epoch: int, start: int) -> int:
    """Useless metagenes kept in spare by the alternative: from `start` to 1 over 10,000 epochs."""
    return round(start + (1 - start) * min(1.0, epoch / 10_000))


def extra(active: Collection[int], useful: Collection[int], slots: int, kept: int) -> Change:
    """The published alternative: `kept` useless metagenes stay in spare, new ones are added where there are fewer."""
    useless = sorted(set(active) - set(useful))
    staying = useless[:kept]
    dropped = useless[kept:]
    if not useful and not staying:
        dropped = dropped[1:]
    used = set(active) - set(dropped)
    free = [slot for slot in range(slots) if slot not in used]
    return Change(dropped=dropped, added=free[: max(0, kept - len(useless))])


def _head(width: int) -> Tensor:
    """Random weights of an activity head, (1, width, 1, 1), uniform as torch's convolutions start."""
    return torch.empty(1, width, 1, 1).uniform_(-(width**-0.5), width**-0.5)


class Metagenes(nn.Module):
    """Profiles and activity heads of the metagenes, one of each per slot.

    Parameters
    ----------
    slots
        Most metagenes.
    width
        Channels of the features that activities are read from.
    n_genes
        Number of genes G.
    active
        How many of the slots are in use.
    """

    active: Tensor
    trees: Tensor

    def __init__(self, slots: int, width: int, n_genes: int, active: int) -> None:
        super().__init__()
        self.mean = nn.ParameterList(torch.zeros(n_genes) for _ in range(slots))
        self.log_sd = nn.ParameterList(torch.full((n_genes,), _START_SD).log() for _ in range(slots))
        self.weight = nn.ParameterList(_head(width) for _ in range(slots))
        self.bias = nn.ParameterList(torch.zeros(1) for _ in range(slots))
        self.register_buffer("active", torch.arange(slots) < active)
        self.register_buffer("trees", torch.full((2 * slots,), _END))
        self.plant(list(range(active)))

    def start_at(self, means: Tensor, sd: Tensor) -> None:
        """Profiles of the slots in use: their means, (K, G), and one sd for each gene, (G,)."""
        with torch.no_grad():
            for slot, mean in zip(self.slots, means, strict=True):
                self.mean[slot].copy_(mean)
                self.log_sd[slot].copy_(sd.log())

    @property
    def slots(self) -> list[int]:
        """Slots in use, ascending."""
        return torch.nonzero(self.active).flatten().tolist()

    @property
    def forest(self) -> list[Tree]:
        """Trees of the slots in use."""
        codes = iter([code for code in self.trees.tolist() if code != _END])

        def read(code: int) -> Tree:
            return (read(next(codes)), read(next(codes))) if code == _SPLIT else code

        return [read(code) for code in codes]

    def plant(self, forest: Iterable[Tree]) -> None:
        """Remember the trees."""

        def written(tree: Tree) -> list[int]:
            return [tree] if isinstance(tree, int) else [_SPLIT, *written(tree[0]), *written(tree[1])]

        codes = [code for tree in forest for code in written(tree)]
        self.trees.fill_(_END)
        self.trees[: len(codes)] = torch.tensor(codes, dtype=self.trees.dtype)

    def profiles(self) -> tuple[Tensor, Tensor]:
        """Mean and sd of the log effects, (K, G) each, of the slots in use; constants while there is but one."""
        slots = self.slots
        mean = torch.stack([self.mean[slot] for slot in slots])
        sd = EPS + torch.stack([self.log_sd[slot] for slot in slots]).exp()
        return (mean.detach(), sd.detach()) if len(slots) == 1 else (mean, sd)

    def logits(self, features: Tensor) -> Tensor:
        """Activities before the softmax, (B, K, h, w)."""
        weight = torch.cat([self.weight[slot] for slot in self.slots])
        bias = torch.cat([self.bias[slot] for slot in self.slots])
        return nn.functional.conv2d(features, weight, bias)

    def apply_change(self, change: Change, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Empty, copy and fill slots; the optimiser forgets what it knew of those that change."""
        with torch.no_grad():
            for slot in change.dropped:
                self.active[slot] = False
            for source, slot in change.copies:
                self.active[slot] = True
                for new, old in zip(self._of(slot), self._of(source), strict=True):
                    new.copy_(old)
            for slot in change.added:
                self.active[slot] = True
                self.mean[slot].zero_()
                self.log_sd[slot].fill_(_START_SD).log_()
                self.weight[slot].copy_(_head(self.weight[slot].shape[1]))
                self.bias[slot].zero_()
        if optimizer is not None:
            new_slots = [*change.dropped, *(slot for _, slot in change.copies), *change.added]
            for parameter in (p for slot in new_slots for p in self._of(slot)):
                optimizer.state.pop(parameter, None)
                parameter.grad = None
        self.plant(change.forest)

    def take_over(self, slot: int, other: Metagenes, source: int) -> None:
        """Copy a metagene of another model into one of the slots."""
        with torch.no_grad():
            for new, old in zip(self._of(slot), other._of(source), strict=True):
                new.copy_(old)

    def _of(self, slot: int) -> list[nn.Parameter]:
        return [each[slot] for each in (self.mean, self.log_sd, self.weight, self.bias)]
