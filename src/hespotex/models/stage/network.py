"""Encoder, decoder and the scaling of what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
from torch import nn

from ...errors import DataValueError

if TYPE_CHECKING:
    from torch import Tensor

    from .config import StageConfig

__all__ = ["Autoencoder", "ExpressionScale", "Frame", "decoder", "encoder"]


@dataclass(frozen=True, eq=False)
class Frame:
    """The coordinates that the networks see: (position - origin) / scale.

    Attributes
    ----------
    origin, scale
        Of each axis, in the units of the positions, (X,) float64.
    """

    origin: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, positions: np.ndarray, config: StageConfig, name: str = "section") -> Self:
        """The frame of the measured spots `positions` (n, X), X being 2 or 3.

        Raises
        ------
        DataValueError
            If a coordinate is not finite, all are the same or, with a ReLU behind the encoder, one is negative.
        """
        positions = _finite(positions, name)
        width = positions.shape[1]
        low, high = positions.min(axis=0), positions.max(axis=0)
        if (high == low).all():
            raise DataValueError(f"section {name!r}: all {len(positions)} spots have the same coordinates")
        if config.coordinates == "unit":
            return cls(low, np.full(width, (high - low).max()))
        if config.relu and (low < 0).any():
            raise DataValueError(
                f"section {name!r} has negative coordinates, which a ReLU behind the encoder cannot reach; use "
                "relu=False, or coordinates='unit'"
            )
        scale = np.ones(width)
        scale[:2] = np.abs(positions[:, :2]).max() if config.coord_sf is None else config.coord_sf
        return cls(np.zeros(width), scale)

    def __call__(self, positions: np.ndarray, name: str = "section") -> np.ndarray:
        """Scaled coordinates of `positions` (m, X), float32."""
        positions = _finite(positions, name)
        if positions.shape[1] != len(self.scale):
            raise DataValueError(
                f"section {name!r} has {positions.shape[1]} coordinates per position, its spots have {len(self.scale)}"
            )
        return ((positions - self.origin) / self.scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ExpressionScale:
    """The expression that the networks see: (expression - mean) / spread.

    Attributes
    ----------
    mean
        Of each gene, (G,) float32.
    spread
        Of all genes together.
    """

    mean: np.ndarray
    spread: float

    @classmethod
    def fit(cls, expression: np.ndarray, *, standardize: bool) -> Self:
        """The scale of measured expression (n, G), or one that changes nothing."""
        if not standardize:
            return cls(np.zeros(expression.shape[1], dtype=np.float32), 1.0)
        spread = float(np.sqrt(expression.var(axis=0, dtype=np.float64).mean()))
        mean = expression.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(mean, spread if spread > 0 else 1.0)

    def __call__(self, expression: np.ndarray) -> np.ndarray:
        """Scaled expression, (n, G) float32."""
        return (expression - self.mean) / self.spread

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """Expression from what the networks put out, (n, G) float32; none is negative."""
        return np.maximum(scaled * self.spread + self.mean, 0)


def _finite(positions: np.ndarray, name: str) -> np.ndarray:
    positions = np.asarray(positions, dtype=np.float64)
    if not np.isfinite(positions).all():
        raise DataValueError(f"section {name!r} has coordinates that are NaN or infinite; drop those spots or parts")
    return positions


def encoder(n_genes: int, width: int, config: StageConfig) -> nn.Sequential:
    """From expression (n, G) to coordinates (n, X)."""
    return _perceptron([n_genes, *config.widths, width], relu=config.relu)


def decoder(n_genes: int, width: int, config: StageConfig) -> nn.Sequential:
    """From coordinates (n, X) to expression (n, G)."""
    return _perceptron([width, *reversed(config.widths), n_genes], relu=config.relu)


def _perceptron(widths: Sequence[int], *, relu: bool) -> nn.Sequential:
    """Linear, batch normalisation and ReLU in turn, the last layer without normalisation."""
    *hidden, last = pairwise(widths)
    layers: list[nn.Module] = []
    for n_in, n_out in hidden:
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
    layers.append(nn.Linear(*last))
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """Encoder and decoder; with ``config.vge`` the decoder alone."""

    def __init__(self, n_genes: int, width: int, config: StageConfig) -> None:
        super().__init__()
        self.encoder = None if config.vge else encoder(n_genes, width, config)
        self.decoder = decoder(n_genes, width, config)

    def forward(self, expression: Tensor, coordinates: Tensor) -> tuple[Tensor | None, Tensor]:
        """Latent (n, X), ``None`` without an encoder, and reconstruction (n, G)."""
        if self.encoder is None:
            return None, self.decoder(coordinates)
        latent = self.encoder(expression)
        return latent, self.decoder(latent)
