"""Counts of spots: negative binomials whose size is the sum of their pixels'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .network import EPS

__all__ = ["nb_log_prob", "nb_mean", "normal_log_ratio", "total_counts"]


def nb_log_prob(x: Tensor, total: Tensor, logits: Tensor) -> Tensor:
    """Log probability of counts `x` under NB(total_count = `total` > 0, `logits`); shapes broadcast.

    Examples
    --------
    >>> one = torch.ones(())
    >>> round(float(nb_log_prob(0 * one, one, 0 * one).exp()), 3)
    0.5
    """
    kept = total * functional.logsigmoid(-logits) + x * functional.logsigmoid(logits)
    return kept + torch.lgamma(total + x) - torch.lgamma(total) - torch.lgamma(x + 1)


def nb_mean(total: Tensor, logits: Tensor) -> Tensor:
    """Mean of the same; its variance is the mean times (1 + e^logits)."""
    return total * torch.exp(logits)


def total_counts(pooled: Tensor, log_rates: Tensor) -> Tensor:
    """Size of each spot's negative binomials, (n, G).

    Parameters
    ----------
    pooled
        Scale times activity, summed over the pixels of each spot, (n, K).
    log_rates
        Log rate of each gene in each metagene, (K, G).
    """
    return EPS + pooled @ torch.exp(log_rates)


def normal_log_ratio(eps: Tensor, mean: Tensor, sd: Tensor, prior_sd: Tensor | float = 1.0) -> Tensor:
    """Log N(z; 0, prior_sd) − log N(z; mean, sd) at z = mean + sd · eps, element-wise."""
    prior = torch.as_tensor(prior_sd, dtype=sd.dtype, device=sd.device)
    z = mean + sd * eps
    return 0.5 * (eps.square() - (z / prior).square()) + torch.log(sd) - torch.log(prior)
