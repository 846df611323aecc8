"""The network from the features of a part to its expression, and what its sums over spots are measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PartNetwork", "positive"]

_FLOOR = 0.01


def positive(x: Tensor) -> Tensor:
    """ELU with α = 0.01, plus 0.01: 0 at −∞, 0.01 at 0, x + 0.01 above."""
    return functional.elu(x, alpha=_FLOOR) + _FLOOR


class PartNetwork(nn.Module):
    """Hidden layers with LeakyReLU(0.1), then one positive output per gene.

    Parameters
    ----------
    n_features, n_genes
        Width of input and output.
    width, n_layers
        Of the hidden layers.
    level
        Bias of the outputs at the start.
    dispersion
        Whether to hold a dispersion per gene for the negative binomial, which the forward pass does not use.
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        width: int = 256,
        n_layers: int = 4,
        level: float | None = None,
        dispersion: bool = False,
    ) -> None:
        super().__init__()
        widths = [n_features, *[width] * n_layers]
        self.latent = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.output = nn.Linear(width, n_genes)
        if level is not None:
            nn.init.constant_(self.output.bias, level)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if dispersion else None

    def embed(self, x: Tensor) -> Tensor:
        """The last hidden layer, (k, width)."""
        for layer in self.latent:
            x = functional.leaky_relu(layer(x), 0.1)
        return x

    def decode(self, latent: Tensor) -> Tensor:
        """Expression in units of each gene's scale, (k, G)."""
        return positive(self.output(latent))

    def forward(self, x: Tensor) -> Tensor:
        """Expression in units of each gene's scale, (k, G), of parts with features (k, d)."""
        return self.decode(self.embed(x))
