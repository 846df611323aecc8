"""Encoder, latent heads, decoder and output heads: a U-Net whose skip connections are random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from .config import Norm

__all__ = ["EPS", "Network", "centre_crop", "inverse_softplus", "reach"]

EPS = 1e-8
_SLOPE = 0.2
_CHANNELS_PER_GROUP = 4


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, momentum=0.05)
    return nn.GroupNorm(max(1, channels // _CHANNELS_PER_GROUP), channels)


def _unit(kind: Norm, before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2)
    return [convolution, _norm(kind, after), nn.LeakyReLU(_SLOPE)]


def _block(kind: Norm, channels: int) -> nn.Sequential:
    return nn.Sequential(*_unit(kind, channels, channels, 3), *_unit(kind, channels, channels, 3))


def _head(kind: Norm, channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_unit(kind, channels, channels, 1), nn.Conv2d(channels, outputs, 1))


def _last(head: nn.Module) -> Any:
    """The convolution that a head ends with."""
    return head[-1]  # type: ignore[index]


def centre_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of the last two axes; an odd rest is rounded half to even."""
    top, left = (round((have - want) / 2) for have, want in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def inverse_softplus(x: Tensor) -> Tensor:
    """The value whose softplus is `x` > 0."""
    return x + torch.log(-torch.expm1(-x))


def reach(depth: int) -> int:
    """Pixels beyond which one of the image has no influence on one of the output (an upper bound)."""
    radius = 3
    for level in range(1, depth):
        radius += 2 * 2 ** (level - 1) + 2 * 2**level
    radius += 2 * 2 ** (depth - 1)
    for level in range(depth - 1):
        radius += 5 * 2**level + 2 ** (level + 1)
    return radius


class Network(nn.Module):
    """From an image to latent fields, and from these to the image, the scale and the features of metagene activity.

    Parameters
    ----------
    depth, width
        Levels, and channels c_0 of the finest; level i has c_i = width · 2^i at ⌈n / 2^i⌉ pixels.
    norm
        See :class:`XFuseConfig`.
    checkpoints
        Whether activations are computed anew in the backward pass.
    """

    def __init__(self, depth: int, width: int, norm: Norm, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.depth, self.width, self.checkpoints = depth, width, checkpoints
        channels = self.channels
        pairs = list(zip(channels, channels[1:], strict=False))
        self.enc_in = nn.Sequential(*_unit(norm, 3, width, 3))
        self.enc_block = nn.ModuleList(_block(norm, c) for c in channels)
        self.enc_down = nn.ModuleList(nn.Sequential(*_unit(norm, fine, coarse, 5, 2)) for fine, coarse in pairs)
        self.z_mean = nn.ModuleList(_head(norm, c, c) for c in channels)
        self.z_sd = nn.ModuleList(_head(norm, c, c) for c in channels)
        self.dec_block = nn.ModuleList(_block(norm, c) for c in channels)
        self.dec_up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), *_unit(norm, coarse, fine, 5)
            )
            for fine, coarse in pairs
        )
        self.dec_combine = nn.ModuleList(nn.Sequential(*_unit(norm, 2 * fine, fine, 3)) for fine, _ in pairs)
        self.image_mu = _head(norm, width, 3)
        self.image_sigma = _head(norm, width, 3)
        self.scale_head = _head(norm, width, 1)
        self.activity_shared = nn.Sequential(*_unit(norm, width, width, 1))
        for head in (self.image_mu, self.image_sigma):
            nn.init.zeros_(_last(head).weight)
        nn.init.normal_(_last(self.scale_head).weight, std=1e-5)

    @property
    def channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * 2**level for level in range(self.depth)]

    def start_at(self, colour_mean: Tensor, colour_sd: Tensor, scale: float, latent_sd: float | None = None) -> None:
        """Biases of the output heads: mean colour and its sd, (3,), the scale of a pixel, and the sd of the fields."""
        starts: list[tuple[nn.Module, Tensor]] = [(self.image_mu, torch.atanh(colour_mean.clamp(-0.999, 0.999)))]
        starts += [(self.image_sigma, inverse_softplus(colour_sd.clamp_min(1e-3)))]
        starts += [(self.scale_head, inverse_softplus(torch.tensor([scale], dtype=torch.float64)))]
        if latent_sd is not None:
            starts += [(head, inverse_softplus(torch.tensor(latent_sd))) for head in self.z_sd]
        with torch.no_grad():
            for head, value in starts:
                nn.init.zeros_(bias := _last(head).bias)
                bias += value

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpoints and self.training and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return module(*inputs)

    def encode(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and sd of the latent field of each level, (B, c_i, n_i, n_i), finest first."""
        return [
            (self._run(mean, y), EPS + functional.softplus(self._run(sd, y)))
            for y, mean, sd in zip(self.features(image), self.z_mean, self.z_sd, strict=True)
        ]

    def features(self, image: Tensor) -> list[Tensor]:
        """Features of the encoder at each level, (B, c_i, n_i, n_i), finest first."""
        y = self._run(self.enc_block[0], self.enc_in(image))
        levels = [y]
        for down, block in zip(self.enc_down, self.enc_block[1:], strict=True):
            y = self._run(block, self._run(down, y))
            levels.append(y)
        return levels

    def decode(self, z: Sequence[Tensor]) -> Tensor:
        """Features of each pixel, (B, width, n, n), from the latent fields, finest first."""
        d = self._run(self.dec_block[-1], z[-1])
        for level in range(self.depth - 2, -1, -1):
            up = centre_crop(self._run(self.dec_up[level], d), z[level].shape[-2:])
            d = self._run(self.dec_combine[level], torch.cat([up, z[level]], dim=1))
            d = self._run(self.dec_block[level], d)
        return d

    def image(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the image, (B, 3, n, n) each."""
        return torch.tanh(self._run(self.image_mu, d)), EPS + functional.softplus(self._run(self.image_sigma, d))

    def scale(self, d: Tensor) -> Tensor:
        """Positive scale of each pixel, (B, 1, n, n)."""
        return functional.softplus(self._run(self.scale_head, d))

    def activity_features(self, d: Tensor) -> Tensor:
        """What the activities of all metagenes are read from, (B, width, n, n)."""
        return self._run(self.activity_shared, d)
