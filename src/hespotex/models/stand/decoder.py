"""The published decoder: sigmoid activations of nuclei, pooled, multiplied by their number, scaled to log expression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .keras import keras_init
from .pooling import Pooling, pool, singletons

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.pooling import Bags

__all__ = ["PublishedDecoder"]


class PublishedDecoder(nn.Module):
    """784 → G → G with sigmoids, pooling, abundance and one scale per gene.

    A gene whose scale starts below zero is zero for ever, as published: about half of them.

    Parameters
    ----------
    n_features
        Width of the nuclei's features.
    n_genes
        G.
    pooling
        See :func:`~hespotex.models.stand.pooling.pool`.
    beta
        One over the number of nuclei that makes a spot full.
    gamma
        Slope of the pooling.
    coexpression
        Whether a dense layer follows the pooling.
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        pooling: Pooling = "noisy_and",
        beta: float = 0.05,
        gamma: float = 5.0,
        coexpression: bool = False,
    ) -> None:
        super().__init__()
        self.pooling, self.beta, self.gamma = pooling, beta, gamma
        self.hidden = nn.Linear(n_features, n_genes)
        self.last = nn.Linear(n_genes, n_genes)
        self.coexpression = nn.Linear(n_genes, n_genes) if coexpression else None
        self.threshold = nn.Parameter(torch.empty(n_genes).uniform_(-0.05, 0.05)) if pooling == "noisy_and" else None
        self.scale = nn.Parameter(torch.empty(n_genes).uniform_(-0.05, 0.05))
        keras_init(self)

    def activations(self, features: Tensor) -> Tensor:
        """Activation of each nucleus, in (0, 1), (k, G)."""
        return torch.sigmoid(self.last(torch.sigmoid(self.hidden(features))))

    def abundance(self, p: Tensor, bags: Bags) -> Tensor:
        """Pooled activations times the number of nuclei and β, (n, G); pooling by the mean knows no number."""
        pooled = pool(self.pooling, p, bags, gamma=self.gamma, threshold=self.threshold)
        if self.pooling == "mean":
            return pooled
        if self.pooling == "sum":
            return self.beta * pooled
        return self.beta * bags.size()[:, None] * pooled

    def expression(self, abundance: Tensor) -> Tensor:
        """Expression of an abundance in linear units, (n, G)."""
        if self.coexpression is not None:
            abundance = torch.sigmoid(self.coexpression(abundance))
        return torch.relu(self.scale * abundance)

    def denormalize(self, abundance: Tensor) -> Tensor:
        """Log expression of an abundance, (n, G)."""
        return torch.log1p(self.expression(abundance))

    def forward(self, features: Tensor, bags: Bags) -> Tensor:
        """Log expression of spots from the features of the bags' entries, (n, G)."""
        return self.denormalize(self.abundance(self.activations(features), bags))

    def single(self, features: Tensor, *, share: bool = False) -> Tensor:
        """Log expression of single nuclei, (k, G), pooling off.

        As published, on the scale of a spot of 1/β copies of the nucleus; with `share`, β of that in linear units.
        """
        p = self.activations(features)
        abundance = pool(self.pooling, p, singletons(p), gamma=self.gamma, threshold=self.threshold)
        return torch.log1p((self.beta if share else 1.0) * self.expression(abundance))
