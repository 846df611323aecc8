"""Losses of HESpotEx as matrix reductions: no loop over spots or genes, no NaN, in value or gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alignment_loss", "pearson"]


def pearson(target: Tensor, prediction: Tensor, dim: int) -> Tensor:
    """Pearson correlation along `dim`, from population moments.

    Where either side has no spread beyond rounding (a constant, or values so close that their squares
    underflow), r is 0 and so is its gradient.

    Parameters
    ----------
    target, prediction
        Matrices of one shape.
    dim
        Axis to correlate along: 1 gives one value per row, 0 one per column.
    """
    x, x_scale = _unit(target, dim)
    y, y_scale = _unit(prediction, dim)
    return torch.where(x_scale & y_scale, (x * y).sum(dim), 0.0)


def alignment_loss(target: Tensor, embedding: Tensor) -> Tensor:
    """1 − mean over spots of the correlation between a spot's target and its embedding, across dimensions.

    Parameters
    ----------
    target
        Spot embeddings of the expression stream, (n, D).
    embedding
        Patch embeddings of the image stream, (n, D).
    """
    return 1.0 - pearson(target, embedding, dim=1).mean()


def _unit(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Centred values of unit length along `dim`, and where there is any spread."""
    centred = values - values.mean(dim, keepdim=True)
    # What rounding leaves of a constant is of the order of its own size times the machine epsilon.
    floor = 8 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim, keepdim=True)
    largest = centred.detach().abs().amax(dim, keepdim=True)
    varies = largest > torch.clamp(floor, min=torch.finfo(values.dtype).tiny)
    # Dividing by the largest deviation first keeps squares from underflowing; the safe 1 keeps 0/0 out of the gradient.
    scaled = torch.where(varies, centred, 0.0) / torch.where(varies, largest, 1.0)
    norm = torch.where(varies, (scaled.square().sum(dim, keepdim=True)), 1.0).sqrt()
    return scaled / norm, varies.squeeze(dim)
