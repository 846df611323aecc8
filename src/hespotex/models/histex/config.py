"""What can be chosen about HISTEX: its two modes, and the sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ...errors import DataValueError

__all__ = ["HEADS", "PAPER", "HistexConfig", "Mode"]

Mode = Literal["original", "fixed"]
HEADS = 8


@dataclass(frozen=True)
class HistexConfig:
    """Settings of :class:`Histex`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of targets and prediction; only ``"counts"``, as supervision is a sum of counts under a spot.
    mode
        ``"original"``: the published network, windows, scaling, order of the training and inference; ``"fixed"``: ours.
        The documentation of the model lists what differs.
    width
        Width of the embeddings; a multiple of 8, the number of attention heads.
    hidden
        Widths of the hidden layers of the decoder.
    n_context
        Measured places near a window whose expression it reads.
    n_members
        Networks trained side by side.
    epochs, lr, weight_decay
        Of AdamW, which without weight decay is Adam.
    batch
        Most spots per optimiser step. There are at least 16 steps per epoch where there are as many spots.
    overlap
        Windows along each axis that cover a superpixel in prediction; their outputs are averaged.
    """

    unit: str = "counts"
    mode: Mode = "fixed"
    width: int = 128
    hidden: tuple[int, ...] = (256,)
    n_context: int = 5
    n_members: int = 3
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 16
    overlap: int = 2

    at_prediction: ClassVar[tuple[str, ...]] = ("overlap",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(map(int, self.hidden)))
        if self.unit != "counts":
            raise DataValueError(f"unit={self.unit!r}: 'histex' learns sums of counts under spots; use unit='counts'")
        if self.mode not in get_args(Mode):
            raise DataValueError(f"mode={self.mode!r} is unknown; possible: 'original', 'fixed'")
        for name in ("n_context", "n_members", "epochs", "batch", "overlap"):
            if not getattr(self, name) >= 1:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.width < HEADS or self.width % HEADS:
            raise DataValueError(f"width={self.width!r} must be a multiple of {HEADS}, the number of attention heads")
        if min(self.hidden, default=0) < 1:
            raise DataValueError(f"hidden={self.hidden} must name at least one layer, each of width 1 or more")
        if not self.lr > 0:
            raise DataValueError(f"lr={self.lr!r} must be positive")
        if not self.weight_decay >= 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")


PAPER = HistexConfig(
    mode="original",
    hidden=(1024, 512, 512, 512),
    n_members=5,
    epochs=500,
    lr=1e-4,
    weight_decay=0.0,
    batch=32,
    overlap=1,
)
