"""Likelihoods of counts given their expectation, as losses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nb_loss", "poisson_loss"]

_TINY = 1e-8


def poisson_loss(expected: Tensor, counts: Tensor) -> Tensor:
    """Mean negative log-likelihood of Poisson counts, both (n, G)."""
    return -(torch.xlogy(counts, expected + _TINY) - expected - torch.lgamma(counts + 1)).mean()


def nb_loss(expected: Tensor, counts: Tensor, theta: Tensor) -> Tensor:
    """Mean negative log-likelihood of negative binomial counts (n, G) of variance μ + μ²/θ, `theta` (G,)."""
    total = torch.log(theta + expected + _TINY)
    log_likelihood = (
        torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1)
        + theta * (theta.log() - total)
        + counts * (torch.log(expected + _TINY) - total)
    )
    return -log_likelihood.mean()
