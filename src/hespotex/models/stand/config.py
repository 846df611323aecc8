"""What can be chosen about ST-AnD: each switch, its published value and ours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from ...errors import DataValueError
from .._config import check_choices
from .pooling import Pooling

__all__ = ["PAPER", "STAnDConfig"]

Encoder = Literal["frozen", "vqvae"]
Decoder = Literal["counts", "published"]
Likelihood = Literal["nb", "poisson"]
SizeFactor = Literal["section", "spot"]
Output = Literal["share", "intensity"]

_CHOICES: dict[str, Any] = {
    "encoder": Encoder,
    "decoder": Decoder,
    "pooling": Pooling,
    "likelihood": Likelihood,
    "size_factor": SizeFactor,
    "output": Output,
}


@dataclass(frozen=True)
class STAnDConfig:
    """Settings of :class:`STAnD`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    encoder
        ``"frozen"``: the features of the parts as they come; ``"vqvae"``: the features are raw crops, and a VQ-VAE
        trained on those of the training sections makes 784 numbers of each.
    decoder
        ``"counts"``: expected counts of each part, whose sum a count likelihood compares with the spot; ``"published"``:
        sigmoid activations, pooled and scaled to log expression.
    pooling
        How the parts of a spot are pooled; ``"counts"`` takes ``"sum"``, or ``"mean"``, which leaves the number of
        parts out.
    likelihood
        Of the counts: negative binomial or Poisson.
    size_factor
        What a spot's expectation is multiplied by: the median total count of its section (``"section"``: differences
        within a section are left to the parts to explain) or its own total (``"spot"``), over the median of all.
    hidden
        Widths of the hidden layers of the count decoder; the published one has one, as wide as there are genes.
    dropout
        Share of hidden units of the count decoder dropped in training.
    beta, gamma
        Of the published decoder: one over the number of nuclei that makes a spot full, and the slope of the poolings.
    coexpression
        Whether the published decoder has its layer of co-expression.
    lr, weight_decay
        Of the optimiser; the published decoder knows no decay.
    batch
        Spots per optimiser step.
    max_epochs
        Most epochs; also their number where there is too little to stop by.
    patience
        Epochs without a better held-out score after which training stops; ``None``: all epochs, nothing held out.
    vqvae_epochs, vqvae_lr, vqvae_batch
        Training of the VQ-VAE.
    reencode
        Whether the VQ-VAE encodes each crop anew in each step, under a random symmetry, as published; else once.
    output
        ``"share"``: what one part adds to a spot; ``"intensity"``: a spot full of such parts, as many as a training spot
        with parts holds on average, or 1 / `beta` as published.
    """

    encoder: Encoder = "frozen"
    decoder: Decoder = "counts"
    pooling: Pooling = "sum"
    likelihood: Likelihood = "nb"
    size_factor: SizeFactor = "section"
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.2
    beta: float = 0.05
    gamma: float = 5.0
    coexpression: bool = False
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 32
    max_epochs: int = 60
    patience: int | None = 10
    vqvae_epochs: int = 20
    vqvae_lr: float = 1e-3
    vqvae_batch: int = 128
    reencode: bool = False
    output: Output = "share"

    at_prediction: ClassVar[tuple[str, ...]] = ("output",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(map(int, self.hidden)))
        check_choices(self, _CHOICES)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _POSITIVE and value is not None and not value > 0:
                raise DataValueError(f"{each.name}={value!r} must be positive")
        if min(self.hidden, default=1) < 1:
            raise DataValueError(f"hidden={self.hidden} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise DataValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if self.weight_decay < 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")
        if self.decoder == "counts" and self.pooling not in ("sum", "mean"):
            raise DataValueError(
                f"pooling={self.pooling!r} goes with decoder='published'; counts add up: 'sum', or 'mean'"
            )
        if self.reencode and (self.encoder, self.decoder) != ("vqvae", "published"):
            raise DataValueError("reencode=True goes with encoder='vqvae' and decoder='published'")

    @property
    def unit(self) -> str:
        """Unit of the targets and of the prediction; the decoder decides."""
        return "counts" if self.decoder == "counts" else "log1p_cp10k"


_POSITIVE = {
    "beta",
    "gamma",
    "lr",
    "batch",
    "max_epochs",
    "patience",
    "vqvae_epochs",
    "vqvae_lr",
    "vqvae_batch",
}

# What the authors do, less what looks at the sections to be predicted: their VQ-VAE sees test crops, and theirs are
# augmented at random. Counts are normalised to 10,000, where theirs go to the median total.
PAPER = STAnDConfig(
    encoder="vqvae",
    decoder="published",
    pooling="noisy_and",
    batch=8,
    max_epochs=100,
    patience=None,
    vqvae_epochs=100,
    reencode=True,
    output="intensity",
)
