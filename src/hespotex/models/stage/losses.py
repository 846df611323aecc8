"""The terms of STAGE's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import StageConfig

__all__ = ["directions", "latent_loss", "reconstruction_loss", "sliced_wasserstein", "total_loss"]

OVERALL = 0.1  # weight of both losses in the total


def directions(n: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random unit vectors (n, X) in the space of `like` (m, X), on its device, in one draw."""
    draw = like.new_empty(n, like.shape[1]).normal_(generator=generator)
    return F.normalize(draw, dim=1)


def sliced_wasserstein(z: Tensor, c: Tensor, along: Tensor) -> Tensor:
    """Mean squared difference of the sorted projections of two sets of points.

    Parameters
    ----------
    z, c
        As many points each, (n, X).
    along
        Unit vectors, (L, X).

    Examples
    --------
    >>> import torch
    >>> points, axes = torch.rand(9, 2), torch.eye(2)
    >>> float(sliced_wasserstein(points, points.flip(0), axes))
    0.0
    """
    ours, theirs = (points @ along.T for points in (z, c))
    return (ours.sort(dim=0).values - theirs.sort(dim=0).values).square().mean()


def latent_loss(z: Tensor, c: Tensor, along: Tensor, swd_weight: float) -> Tensor:
    """How far the latent (n, X) is from the coordinates, spot by spot and as a whole."""
    return F.l1_loss(z, c) + swd_weight * sliced_wasserstein(z, c, along)


def reconstruction_loss(predicted: Tensor, expression: Tensor, l1_weight: float) -> Tensor:
    """Squared plus weighted absolute error."""
    return F.mse_loss(predicted, expression) + l1_weight * F.l1_loss(predicted, expression)


def total_loss(latent: Tensor | None, reconstruction: Tensor, config: StageConfig) -> Tensor:
    """What is minimised; without an encoder there is no latent."""
    weighted = config.recon_weight * reconstruction
    return OVERALL * (weighted if latent is None else latent + weighted)
