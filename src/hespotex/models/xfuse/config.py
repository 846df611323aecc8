"""What can be chosen about XFuse: each switch, its published value and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import DataValueError
from .._config import check_choices, check_least

__all__ = ["PAPER", "SMALL", "XFuseConfig"]

Norm = Literal["batch", "group"]
Augmentation = Literal["none", "exact", "affine"]
Expansion = Literal["none", "split", "extra"]
FinalPurge = Literal["none", "drop", "extra"]
ColourRange = Literal["quantile", "extremes"]
MissingGenes = Literal["mask", "zero"]
Scale = Literal["fitted", "one"]
StartProfiles = Literal["equal", "clusters"]

_CHOICES: dict[str, Any] = {
    "norm": Norm,
    "augmentation": Augmentation,
    "expansion": Expansion,
    "final_purge": FinalPurge,
    "colour_range": ColourRange,
    "missing_genes": MissingGenes,
    "scale": Scale,
    "start_profiles": StartProfiles,
}


@dataclass(frozen=True)
class XFuseConfig:
    """Settings of :class:`XFuse`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of targets and prediction; the likelihood is one of counts, so there is no other.
    depth, width
        Levels of the network, and channels of its finest; each level has twice as many.
    norm
        Normalisation: ``"batch"``, as published; or ``"group"``, which depends on no other patch, but on all of the
        image, so that a raster is then predicted in one piece.
    metagenes, max_metagenes
        Metagenes at the start, and the most there may be.
    start_profiles
        Where several metagenes start: as one, to be told apart by chance (``"equal"``); or at the compositions of as many
        clusters of the spots (``"clusters"``), which saves most of the training.
    expansion
        How tests change their number: useful ones are split (``"split"``, as published); a few useless ones are kept in
        spare (``"extra"``); or their number stays (``"none"``).
    purge_interval, purge_samples
        Epochs between two tests, and draws of each.
    final_purge
        What happens after training: all useless metagenes are dropped (``"drop"``); the published clean-up, which after a
        long run leaves one of them or adds one (``"extra"``); or nothing.
    patch, batch
        Side of the training patches in cells, and patches per optimiser step.
    epochs, lr
        Passes over as many random patches as would tile the sections, and learning rate of the networks.
    steps_per_epoch
        Optimiser steps that an epoch has at least: sections too small for them are visited several times.
    margin
        Glass around the tissue, as a share of its longer side.
    latent_sd
        Posterior sd of the latent fields at the start; ``None``: what random weights make of it, as published.
    warm_up
        Share of the epochs during which the weight of the prior grows from 0 to 1; 0 as published.
    anneal
        Whether the learning rates fall along half a cosine, to a fiftieth; constant as published.
    freeze_norm
        Share of the epochs after which batch normalisation keeps its statistics, so that training sees the network that
        predicts; 1 as published.
    augmentation
        Patches at any angle, size and shear, with the nearest cell's label (``"affine"``, as published); the eight
        symmetries of the grid, which keep every share (``"exact"``); or windows as they are.
    colour_jitter
        Strength of random changes of brightness, contrast, saturation and hue.
    colour_range
        What is mapped to the ends of the colour scale: the extremes of each section, as published, or quantiles
        of the training sections, kept in the model.
    background_in_size
        Count the background as one spot in the mean size of spots that the scale starts from, as published.
    missing_genes
        A gene that a section did not measure (a column of NaN) stays out of that section's likelihood, or counts as
        zeros, as published.
    section_effects
        Effects of each section on the baselines of the genes, where several have spots that teach.
    min_counts
        Spots with fewer counts over the panel do not supervise.
    activation_checkpoints
        Compute activations anew in the backward pass: less memory, and batch statistics updated twice a step.
    n_samples
        Draws of the prediction.
    scale
        ``"one"``: predict as if the scale were 1 at every cell, without depth and cellularity.
    keep_samples
        Return the draws themselves.
    tile
        Side of the tiles, in cells, that a large raster is predicted in; no number depends on it. With ``norm="group"``
        there are none.
    """

    at_prediction: ClassVar[tuple[str, ...]] = ("n_samples", "scale", "keep_samples", "tile")

    unit: str = "counts"
    depth: int = 4
    width: int = 16
    norm: Norm = "batch"
    metagenes: int = 8
    max_metagenes: int = 50
    start_profiles: StartProfiles = "clusters"
    expansion: Expansion = "split"
    purge_interval: int = 200
    purge_samples: int = 3
    final_purge: FinalPurge = "drop"
    patch: int = 256
    batch: int = 2
    epochs: int = 3000
    lr: float = 1e-3
    steps_per_epoch: int = 1
    margin: float = 0.04
    latent_sd: float | None = 0.1
    warm_up: float = 0.5
    anneal: bool = True
    freeze_norm: float = 0.5
    augmentation: Augmentation = "exact"
    colour_jitter: float = 0.05
    colour_range: ColourRange = "quantile"
    background_in_size: bool = False
    missing_genes: MissingGenes = "mask"
    section_effects: bool = True
    min_counts: float = 1.0
    activation_checkpoints: bool = False
    n_samples: int = 10
    scale: Scale = "fitted"
    keep_samples: bool = False
    tile: int = 512

    def __post_init__(self) -> None:
        if self.unit != "counts":
            raise DataValueError(f"unit={self.unit!r}: xfuse has a likelihood of counts; unit must be 'counts'")
        check_choices(self, _CHOICES)
        check_least(self, _LEAST)
        if not self.lr > 0:
            raise DataValueError(f"lr={self.lr!r} must be positive")
        if self.latent_sd is not None and not self.latent_sd > 0:
            raise DataValueError(f"latent_sd={self.latent_sd!r} must be positive or None")
        for name in ("warm_up", "freeze_norm"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be in [0, 1]")
        if not 0 <= self.colour_jitter < 0.5:
            raise DataValueError(f"colour_jitter={self.colour_jitter!r} must be in [0, 0.5)")
        if self.metagenes > self.max_metagenes:
            raise DataValueError(f"metagenes={self.metagenes} exceeds max_metagenes={self.max_metagenes}")
        if self.patch < 2**self.depth:
            raise DataValueError(f"patch={self.patch} is too small for depth={self.depth}: at least {2**self.depth}")


_LEAST: dict[str, float] = {
    "depth": 1,
    "width": 1,
    "metagenes": 1,
    "max_metagenes": 1,
    "purge_interval": 1,
    "purge_samples": 1,
    "patch": 2,
    "batch": 1,
    "epochs": 1,
    "steps_per_epoch": 1,
    "margin": 0,
    "min_counts": 0,
    "n_samples": 1,
    "tile": 1,
}

PAPER = XFuseConfig(
    depth=6,
    width=16,
    norm="batch",
    metagenes=1,
    start_profiles="equal",
    purge_interval=1000,
    final_purge="extra",
    patch=768,
    batch=4,
    epochs=20_000,
    lr=3e-4,
    margin=0.12,
    latent_sd=None,
    warm_up=0.0,
    anneal=False,
    freeze_norm=1.0,
    augmentation="affine",
    colour_range="extremes",
    background_in_size=True,
    missing_genes="zero",
    min_counts=0.0,
    activation_checkpoints=True,
)

# One section of a few hundred spots in minutes: a smaller network, and no more metagenes than it starts from. On made-up
# sections twice the epochs fit the spots better and the cells under them worse.
SMALL = XFuseConfig(
    depth=4,
    width=8,
    max_metagenes=8,
    expansion="none",
    patch=128,
    batch=1,
    epochs=100,
    steps_per_epoch=10,
    lr=3e-3,
)
