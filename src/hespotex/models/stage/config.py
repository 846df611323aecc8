"""What can be chosen about STAGE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...data.section import Level
from ...errors import DataValueError
from .._config import check_choices

__all__ = ["PAPER", "StageConfig"]

Coordinates = Literal["unit", "published"]


@dataclass(frozen=True)
class StageConfig:
    """Settings of :class:`Stage`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    widths
        Hidden widths of the encoder; the decoder mirrors them. A narrow last one, such as the published 10, allows few
        patterns only.
    relu
        Whether encoder and decoder end in a ReLU, as published. Without it, predictions are clipped at 0.
    vge
        Leave the encoder out and fit the decoder on exact coordinates: the published ablation.
    standardize
        Learn expression less each gene's mean, in units of the spread of all genes together, which makes the weights of
        the losses mean the same in every unit.
    coordinates
        ``"unit"``: coordinates in µm, shifted and scaled by one factor to [0, 1]; ``"published"``: x and y divided by
        `coord_sf`, a third coordinate as it is, nothing shifted.
    coord_sf
        Divisor of published coordinates; ``None``: the largest x or y of the measured spots.
    swd_weight, l1_weight, recon_weight
        Weights of the sliced Wasserstein distance in the loss of the latent, of the absolute beside the squared error
        in that of the reconstruction, and of the reconstruction in the total, all of which is multiplied by 0.1.
    n_projections
        Random directions of the sliced Wasserstein distance.
    lr
        Learning rate of Adam.
    batch
        Spots per optimiser step.
    max_epochs
        Most epochs; also their number where nothing stops them.
    patience
        Epochs without a higher mean Pearson r per gene on held-out spots after which training stops; the fit on all spots
        then takes as many epochs as were best. ``None`` runs `max_epochs` on all spots, as published.
    held_out
        Share of the spots, drawn at random, that is held out to stop by.
    level
        Parts to predict: ``"spot"`` for positions of another lattice, ``"superpixel"`` or ``"nucleus"``.
    """

    widths: tuple[int, ...] = (500, 200, 100)
    relu: bool = False
    vge: bool = False
    standardize: bool = True
    coordinates: Coordinates = "unit"
    coord_sf: float | None = None
    swd_weight: float = 0.1
    l1_weight: float = 0.1
    recon_weight: float = 0.02
    n_projections: int = 100
    lr: float = 1e-3
    batch: int = 512
    max_epochs: int = 2000
    patience: int | None = 100
    held_out: float = 0.2
    level: Level = "spot"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(map(int, self.widths)))
        if min(self.widths, default=0) < 1:
            raise DataValueError(f"widths={self.widths} must be at least 1 each and at least one")
        check_choices(self, {"coordinates": Coordinates, "level": Level})
        for name in ("swd_weight", "l1_weight"):
            if not getattr(self, name) >= 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in ("coord_sf", "recon_weight", "n_projections", "lr", "max_epochs", "patience"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise DataValueError(f"{name}={value!r} must be positive")
        if self.relu and self.standardize:
            raise DataValueError(
                "relu=True goes with standardize=False: behind a ReLU nothing can be below the mean of its gene"
            )
        if self.batch < 2:
            raise DataValueError(f"batch={self.batch} must be at least 2: batch normalisation needs two spots")
        if not 0 < self.held_out <= 0.5:
            raise DataValueError(f"held_out={self.held_out!r} must be in (0, 0.5]")


PAPER = StageConfig(
    widths=(1000, 500, 50, 10),
    relu=True,
    standardize=False,
    coordinates="published",
    recon_weight=0.1,
    n_projections=1000,
    max_epochs=10_000,
    patience=None,
)
