"""What can be chosen about iStar: each switch, its published value and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...errors import DataValueError
from .._config import check_choices

__all__ = ["PAPER", "IStarConfig"]

Standardize = Literal["none", "global", "section"]
Smooth = Literal["none", "centred", "published"]
Pooling = Literal["share", "disc"]
Loss = Literal["mse", "poisson", "nb"]
Depth = Literal["none", "section"]
Aggregate = Literal["mean", "median"]
Latent = Literal["none", "first", "concatenate", "median"]

_CHOICES: dict[str, Any] = {
    "standardize": Standardize,
    "smooth": Smooth,
    "pooling": Pooling,
    "loss": Loss,
    "depth": Depth,
    "aggregate": Aggregate,
    "latent": Latent,
}
_POSITIVE = ("width", "n_layers", "epochs", "lr", "n_members")


@dataclass(frozen=True)
class IStarConfig:
    """Settings of :class:`IStar`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of the prediction: ``"counts"``, as only counts of parts add up to those of a spot.
    gene_selection
        Keyword arguments of :func:`hespotex.pp.select_genes` that :func:`hespotex.tl.train` chooses the genes with.
    standardize
        Features as they come (``"none"``); or less their mean, in units of their spread, over the parts of all training
        sections (``"global"``) or of their own section (``"section"``, against stain shift).
    smooth
        Features of the encoder ``hipt`` (known by their 579 columns) averaged over squares of superpixels: 17 for regional
        and 5 for local ones (``"centred"``), or 16 and 4, which shifts them by half a superpixel (``"published"``).
        Other features stay as they are.
    pooling
        What a spot covers: the exact share of each part (``"share"``), or all superpixels of a disc on the integer
        grid around the rounded centre (``"disc"``, as published).
    loss
        ``"poisson"`` or ``"nb"``: deviance of the counts of spots from the sums over their parts; ``"mse"``: squared
        error of the mean over a spot's parts from the count, scaled to [0, 1] over the spots, as published.
    depth
        With several training sections, whether counts are taken relative to the depth of their section
        (``"section"``: median library size per covered part); predictions are then at the mean depth. A single section
        keeps its own.
    width, n_layers
        Hidden layers of a network.
    epochs, lr, weight_decay
        Training of each network by AdamW, or Adam without weight decay.
    batch
        Spots per optimiser step; by default a sixteenth of them, at most 128.
    n_members
        Networks with different starts.
    aggregate
        Prediction from those of the members.
    latent
        Last hidden layer to return: of the first member, of all side by side, or the median over them, which mixes
        unrelated coordinates (as published).
    """

    unit: str = "counts"
    gene_selection: Mapping[str, Any] = field(default_factory=dict)
    standardize: Standardize = "section"
    smooth: Smooth = "centred"
    pooling: Pooling = "share"
    loss: Loss = "poisson"
    depth: Depth = "section"
    width: int = 256
    n_layers: int = 4
    epochs: int = 40
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch: int | None = None
    n_members: int = 5
    aggregate: Aggregate = "mean"
    latent: Latent = "none"

    at_prediction: ClassVar[tuple[str, ...]] = ("aggregate", "latent")

    def __post_init__(self) -> None:
        if self.unit != "counts":
            raise DataValueError(
                f"unit={self.unit!r}: sums over a spot's parts are meaningful for counts only; leave it at 'counts'"
            )
        check_choices(self, _CHOICES)
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.batch is not None and self.batch < 1:
            raise DataValueError(f"batch={self.batch!r} must be at least 1")
        if not self.weight_decay >= 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")


# What the authors' scripts do, with seeds.
PAPER = IStarConfig(
    gene_selection={"method": "variance", "n_top": 1000},
    standardize="none",
    smooth="published",
    pooling="disc",
    loss="mse",
    depth="none",
    epochs=400,
    lr=1e-4,
    weight_decay=0.0,
    aggregate="median",
    latent="median",
)
