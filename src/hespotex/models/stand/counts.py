"""The repaired decoder: expected counts of parts, which add up to those of spots under a count likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..nn.counts import nb_loss, poisson_loss

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.pooling import Bags

__all__ = ["CountDecoder", "count_variance"]

_SHIFT = math.log(math.e - 1)  # softplus gives 1 here
_AMBIENT = 0.1  # of a spot's expression, to start with
_WORTH = 10  # spots without parts that this guess is worth
_LEAST = 1e-6  # expected count of a gene that was never seen
_TINY = 1e-8


class CountDecoder(nn.Module):
    """Features of a part to its expected counts, all positive by construction.

    Parameters
    ----------
    n_features, n_genes
        Widths.
    hidden
        Widths of the hidden layers.
    dropout
        Share of hidden units dropped in training.
    pooling
        ``"sum"`` or ``"mean"`` over the parts of a spot.
    dispersion
        Whether each gene has a dispersion θ, with variance μ + μ²/θ.
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        hidden: Sequence[int] = (128,),
        dropout: float = 0.2,
        pooling: str = "sum",
        dispersion: bool = True,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        layers: list[nn.Module] = []
        width = n_features
        for each in hidden:
            layers += [nn.Linear(width, each), nn.LayerNorm(each), nn.GELU(), nn.Dropout(dropout)]
            width = each
        last = nn.Linear(width, n_genes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)
        self.log_scale = nn.Parameter(torch.zeros(n_genes))
        self.log_ambient = nn.Parameter(torch.zeros(n_genes))
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if dispersion else None

    def start(self, counts: Tensor, size: Tensor, amount: Tensor) -> None:
        """Set scales, ambient term and dispersions from the spots' counts (n, G), size factors and amounts of parts (n,).

        To start with, parts are all alike, and what they leave unexplained is a tenth, or what spots without parts show.
        """
        with torch.no_grad():
            relative = counts / size[:, None]
            level = relative.mean(dim=0)
            empty = relative[amount == 0]
            ambient = (empty.sum(dim=0) + _WORTH * _AMBIENT * level) / (len(empty) + _WORTH)
            amount = (amount > 0).float() if self.pooling == "mean" else amount
            from_parts = torch.maximum(level - ambient, _AMBIENT * level) / amount.mean().clamp_min(_TINY)
            self.log_ambient.copy_(ambient.clamp_min(_LEAST).log())
            self.log_scale.copy_(from_parts.clamp_min(_LEAST).log())
            if self.log_dispersion is not None:
                excess = (counts - size[:, None] * level).square().mean(dim=0) - level
                self.log_dispersion.copy_((level.square() / excess.clamp_min(_TINY)).clamp(0.1, 100.0).log())

    def relative(self, features: Tensor) -> Tensor:
        """Expected counts of parts in units of each gene's scale, (k, G)."""
        return F.softplus(self.network(features).float() + _SHIFT)

    def expected(self, features: Tensor) -> Tensor:
        """Expected counts of whole parts at unit size factor, (k, G)."""
        return self.relative(features) * self.log_scale.exp()

    @property
    def ambient(self) -> Tensor:
        """Expected counts at unit size factor that no part accounts for, (G,)."""
        return self.log_ambient.exp()

    def forward(self, features: Tensor, bags: Bags) -> Tensor:
        """Expected counts of spots at unit size factor, (n, G), from the features of the bags' entries."""
        relative = self.relative(features)
        pooled = bags.mean(relative) if self.pooling == "mean" else bags.sum(relative)
        return self.ambient + pooled * self.log_scale.exp()  # scaled after the sum, where rows are few

    def loss(self, mu: Tensor, counts: Tensor) -> Tensor:
        """Mean negative log-likelihood of counts (n, G) with expectation `mu`."""
        if self.log_dispersion is None:
            return poisson_loss(mu, counts)
        return nb_loss(mu, counts, self.log_dispersion.exp())

    def variance(self, mu: Tensor) -> Tensor:
        """Variance of counts with expectation `mu` (n, G)."""
        return count_variance(mu, None if self.log_dispersion is None else self.log_dispersion.exp())


def count_variance(mu: Tensor, theta: Tensor | None) -> Tensor:
    """Variance of negative binomial counts, of Poisson counts where there is no dispersion."""
    return mu if theta is None else mu + mu.square() / theta
