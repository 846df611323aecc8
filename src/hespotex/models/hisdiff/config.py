"""What can be chosen about HisDiff: each switch, its published value, Stem's and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from ...data.units import check_unit
from ...errors import DataValueError
from .._config import check_choices
from .._standardize import Standardize
from .diffusion import N_TIMES, Likelihood, Output, Sampler

__all__ = ["PAPER", "PRESETS", "SMALL", "STEM", "HisDiffConfig", "patch_half_width"]

Condition = Literal["neighbourhood", "spot"]
Stopping = Literal["fixed", "inner"]

_CHOICES: dict[str, Any] = {
    "condition": Condition,
    "standardize": Standardize,
    "output": Output,
    "likelihood": Likelihood,
    "stopping": Stopping,
    "sampler": Sampler,
}


@dataclass(frozen=True)
class HisDiffConfig:
    """Settings of :class:`HisDiff`; the defaults are ours, ``preset="paper"`` and ``"stem"`` give the published ones.

    Attributes
    ----------
    unit
        Unit of the targets that :func:`hespotex.tl.train` uses for this model.
    gene_selection
        Keyword arguments of :func:`hespotex.pp.select_genes` that it chooses the genes with.
    condition
        What a spot's expression is generated from: its own embedding and the attention it pays to two neighbourhoods
        (``"neighbourhood"``, HisDiff), or its own embedding alone (``"spot"``, Stem).
    near, wide
        Most spots of the two neighbourhoods, the spot itself included.
    near_um, wide_um
        Their radii in µm; ``None``: the nearest spots, however far.
    condition_width
        Width that embeddings are brought to before the attention; ``None``: their own.
    local_path
        Add the spot's own embedding to what it attends to, normalised; published: it acts as a query only.
    standardize
        Embeddings as they come (``"none"``); or in units of their spread in training, about their mean over all
        training spots (``"global"``) or over their own section (``"section"``, against stain shift).
    dropout
        Share of the condition's hidden values dropped in training.
    scale_genes
        Learn each gene in units of its spread over the training spots, about its mean.
    components
        Generate so many principal components of the (scaled) genes, and the rest of each gene as independent noise of
        the spread it had in training; ``None``: the genes themselves, one token each.
    depth, width, heads
        Transformer blocks, width of a token, attention heads.
    output
        What the network estimates: the noise, as published, or the velocity; see
        :meth:`hespotex.models.hisdiff.diffusion.Tables.noise_of`.
    direct_path
        Add to the velocity what a linear function of the spot's own embedding expects; published: the image reaches a
        gene only through scales and shifts that all genes share.
    likelihood
        Of the variational term that trains the variance; see :func:`hespotex.models.hisdiff.diffusion.denoising_terms`.
        ``"none"``: the variance is not trained, which deterministic samplers never read.
    batch, lr, weight_decay
        Of AdamW.
    epochs, max_updates
        Training ends at whichever comes first: so many passes over the spots, or steps of the optimiser.
    average
        Decay of the running mean of the weights that samples are drawn with; 0: the last weights.
    stopping
        ``"fixed"``: all epochs; ``"inner"``: as many as serve best, by the error of denoising, on a left-out training
        group, then anew on all.
    gradient_clip
        Largest norm of the gradient; ``None``: any.
    mixed_precision
        Whether bfloat16 may be used on a GPU.
    sampler, steps
        How samples are drawn, see :func:`hespotex.models.hisdiff.diffusion.sample`, and in how many passes.
    n_samples
        Samples of each spot; the prediction is their mean, its spread their standard deviation (none of a single one).
    paired
        Every second sample starts from the negative of the noise of the one before it, which lets most of the noise of
        the mean cancel: 20 samples then give the mean of 200. Samples are independent between pairs, not within them.
    keep_samples
        Return the samples too.
    sample_seed
        Seed of the noise; ``None``: that of the fit.
    clip
        Cut samples off below 0, which no unit goes below.
    """

    at_prediction: ClassVar[tuple[str, ...]] = (
        "n_samples",
        "steps",
        "sampler",
        "paired",
        "keep_samples",
        "sample_seed",
        "clip",
    )

    unit: str = "log1p_cp10k"
    gene_selection: Mapping[str, Any] = field(default_factory=dict)
    condition: Condition = "neighbourhood"
    near: int = 9
    wide: int = 49
    near_um: float | None = 300.0
    wide_um: float | None = 800.0
    condition_width: int | None = 256
    local_path: bool = True
    standardize: Standardize = "section"
    dropout: float = 0.6
    scale_genes: bool = True
    components: int | None = None
    depth: int = 6
    width: int = 192
    heads: int = 6
    output: Output = "velocity"
    direct_path: bool = True
    likelihood: Likelihood = "none"
    batch: int = 128
    lr: float = 2e-4
    weight_decay: float = 1e-2
    epochs: int = 1000
    max_updates: int | None = 20_000
    average: float = 0.999
    stopping: Stopping = "fixed"
    gradient_clip: float | None = 1.0
    mixed_precision: bool = True
    sampler: Sampler = "dpm++"
    steps: int = 20
    n_samples: int = 20
    paired: bool = True
    keep_samples: bool = False
    sample_seed: int | None = None
    clip: bool = True

    def __post_init__(self) -> None:
        check_unit(self.unit)
        check_choices(self, _CHOICES)
        for name in ("near", "wide", "depth", "width", "heads", "batch", "epochs", "n_samples"):
            if getattr(self, name) < 1:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("near_um", "wide_um", "condition_width", "components", "max_updates", "gradient_clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise DataValueError(f"{name}={value!r} must be positive")
        if not self.lr > 0:
            raise DataValueError(f"lr={self.lr!r} must be positive")
        if self.weight_decay < 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")
        for name in ("average", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if self.direct_path and self.output != "velocity":
            raise DataValueError("direct_path=True goes with output='velocity'")
        if self.width % self.heads:
            raise DataValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if not 2 <= self.steps <= N_TIMES:
            raise DataValueError(f"steps={self.steps!r} must lie between 2 and {N_TIMES}")
        if self.sample_seed is not None and self.sample_seed < 0:
            raise DataValueError(f"sample_seed={self.sample_seed!r} must not be negative")


# What the authors do, less what looks at the section to be predicted: the panel is chosen on the training sections.
PAPER = HisDiffConfig(
    unit="log2_counts",
    gene_selection={"method": "high_mean_and_spread", "n_top": 200},
    near_um=None,
    wide_um=None,
    condition_width=None,
    local_path=False,
    standardize="none",
    dropout=0.0,
    scale_genes=False,
    depth=12,
    width=384,
    heads=12,
    output="noise",
    direct_path=False,
    likelihood="discrete",
    lr=1e-4,
    weight_decay=0.0,
    epochs=2000,
    max_updates=None,
    average=0.0,
    gradient_clip=None,
    mixed_precision=False,
    sampler="ddpm",
    steps=N_TIMES,
    n_samples=1,
    paired=False,
    clip=False,
)
STEM = replace(PAPER, condition="spot", heads=6, batch=256, epochs=4000, average=0.9999, n_samples=20)
SMALL = HisDiffConfig(
    components=32, depth=3, width=64, heads=4, condition_width=64, lr=1e-3, max_updates=2000, stopping="inner"
)
PRESETS = {"default": HisDiffConfig(), "small": SMALL, "paper": PAPER, "stem": STEM}


def patch_half_width(diameter_px: float) -> int:
    """Half the side of the published crop around a spot, in pixels of the image.

    Examples
    --------
    >>> patch_half_width(75.8), patch_half_width(301.0)
    (112, 150)
    """
    return 112 if diameter_px < 224 else int(diameter_px // 2)
