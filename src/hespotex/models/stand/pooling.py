"""From the activations of nuclei to that of their spot: multiple-instance pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ..nn.pooling import Bags

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pooling", "noisy_and", "pool", "singletons"]

Pooling = Literal["noisy_and", "noisy_or", "max", "isr", "gm", "lse", "mean", "sum"]

_SMALL = 1e-7


def noisy_and(mean: Tensor, threshold: Tensor, gamma: float) -> Tensor:
    """Share of a spot that is on, from the mean activation of its nuclei: 0 at 0, 1 at 1, steepest at the threshold.

    Parameters
    ----------
    mean
        Mean activations in [0, 1], (n, G).
    threshold
        Of each gene, (G,).
    gamma
        Slope.
    """
    low = torch.sigmoid(-gamma * threshold)
    high = torch.sigmoid(gamma * (1 - threshold))
    return (torch.sigmoid(gamma * (mean - threshold)) - low) / (high - low + _SMALL)


def pool(kind: Pooling, p: Tensor, bags: Bags, *, gamma: float, threshold: Tensor | None = None) -> Tensor:
    """Pooled activations, (n, G); 0 for an observation without parts.

    Parameters
    ----------
    kind
        ``"noisy_and"``; ``"noisy_or"`` 1 − Π(1 − p); ``"max"``; ``"isr"`` v / (1 + v), v = Σ p / (1 − p);
        ``"gm"`` (mean p^γ)^(1/γ); ``"lse"`` log(mean exp γp) / γ; ``"mean"``; ``"sum"``.
    p
        Activations in [0, 1] of the entries of `bags`, (k, G). A share of a part counts as so much of it, except to
        the maximum.
    bags
        Which entries belong together.
    gamma
        Slope or exponent.
    threshold
        Of ``"noisy_and"``, (G,).
    """
    if kind == "sum":
        return bags.sum(p)
    if kind == "max":
        start = torch.zeros((bags.n, p.shape[1]), dtype=p.dtype, device=p.device)
        return start.scatter_reduce(0, bags.bag[:, None].expand_as(p), p, "amax")
    if kind == "noisy_or":
        return 1 - torch.exp(bags.sum(torch.log1p(-p.clamp(max=1 - _SMALL))))
    if kind == "isr":
        v = bags.sum(p / (1 - p + _SMALL))
        return v / (1 + v + _SMALL)
    if kind == "gm":
        pooled = (bags.mean((p + _SMALL) ** gamma) + _SMALL) ** (1 / gamma)
    elif kind == "lse":
        pooled = bags.mean(torch.exp(gamma * p)).clamp_min(_SMALL).log() / gamma
    elif kind == "noisy_and" and threshold is not None:
        pooled = noisy_and(bags.mean(p), threshold, gamma)
    else:
        pooled = bags.mean(p)
    return torch.where(bags.size()[:, None] > 0, pooled, 0.0)


def singletons(p: Tensor) -> Bags:
    """Each entry an observation of its own: pooling is switched off."""
    own = torch.arange(len(p), device=p.device)
    return Bags(part=own, bag=own, weight=torch.ones(len(p), device=p.device), n=len(p))
