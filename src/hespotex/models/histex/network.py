"""The networks: tokens of a window and vectors of expression attend to each other, and a decoder gives the genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from .config import HEADS, HistexConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CrossAttention", "Exchange", "FixedNetwork", "OriginalNetwork", "elu_output", "network_of"]

_SHIFT = 0.01  # added by every published layer without a bias, and the slope of the published output


class CrossAttention(nn.Module):
    """Multi-head attention of queries (n, q, query_dim) to keys (n, k, key_dim), (n, q, width).

    Parameters
    ----------
    scale
        What the logits are multiplied by: the published code takes the number of *heads* to the power -1/2, others the
        width of a head.
    """

    def __init__(self, query_dim: int, key_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.query = nn.Linear(query_dim, width)
        self.key = nn.Linear(key_dim, width)
        self.value = nn.Linear(key_dim, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, present: Tensor | None = None) -> Tensor:
        """Attend; keys where `present` (n, k) is false are not there."""
        logits = self.logits(queries, keys)
        if present is not None:
            logits = logits.masked_fill(~present[:, None, None], torch.finfo(logits.dtype).min)
        mixed = logits.softmax(dim=-1) @ _split(self.value(keys))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled products of queries and keys, (n, heads, q, k)."""
        return _split(self.query(queries)) @ _split(self.key(keys)).transpose(-1, -2) * self.scale


def _split(x: Tensor) -> Tensor:
    """(n, t, width) as (n, heads, t, width / heads)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Exchange(nn.Module):
    """Bidirectional cross-attention as published: the output's values come from what expression saw of the tokens."""

    def __init__(self, token_dim: int, context_dim: int, width: int) -> None:
        super().__init__()
        scale = HEADS**-0.5
        self.attn1 = CrossAttention(token_dim, context_dim, width, scale)
        self.attn2 = CrossAttention(context_dim, token_dim, width, scale)
        self.attn3 = CrossAttention(width, width, width, scale)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Tokens (n, t, token_dim) and context (n, k, context_dim) to (n, t, width)."""
        return self.attn3(self.attn1(tokens, context), self.attn2(context, tokens))


class _Shifted(nn.Module):
    """``x W + 0.01``, the published layer without a bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-(n_out**-0.5), n_out**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + _SHIFT


def elu_output(z: Tensor) -> Tensor:
    """The published output: ELU with slope 0.01, plus 0.01, hence never negative."""
    return functional.elu(z, alpha=_SHIFT) + _SHIFT


class OriginalNetwork(nn.Module):
    """The published network; 2,910,080 + 1,280 G parameters at the published sizes."""

    def __init__(self, n_tokens: int, n_genes: int, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.block1 = Exchange(n_tokens, n_genes, width)
        self.link1 = _Shifted(width, width)
        self.block2 = Exchange(width, n_genes, width)
        self.link2 = _Shifted(width, width)
        widths = [width + n_tokens, *hidden]
        self.layers = nn.ModuleList(_Shifted(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.last = _Shifted(widths[-1], n_genes)

    def encode(self, tokens: Tensor, context: Tensor, present: Tensor | None = None) -> Tensor:
        """Latent of each token (n, t, width); tokens that are not `present` count like others, as published."""
        x = self.block1(tokens, context)
        x = x + self.link1(x)
        x = self.block2(x, context)
        return x + self.link2(x)

    def decode(self, latent: Tensor, tokens: Tensor, genes: Tensor | None = None) -> Tensor:
        """Scaled expression of tokens, (..., G) or that of the columns `genes`; no activation before the last layer."""
        x = torch.cat([latent, tokens], dim=-1)
        for layer in self.layers:
            x = layer(x)
        return elu_output(x @ (self.last.weight if genes is None else self.last.weight[:, genes]))


class _ResidualExchange(nn.Module):
    """Bidirectional cross-attention whose queries stay in what they become."""

    def __init__(self, width: int) -> None:
        super().__init__()
        scale = (width // HEADS) ** -0.5
        self.attn1, self.attn2, self.attn3 = (CrossAttention(width, width, width, scale) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, tokens: Tensor, context: Tensor, present: Tensor | None) -> Tensor:
        seen = self.norm1(tokens + self.attn1(tokens, context))
        summary = self.norm2(context + self.attn2(context, tokens, present))
        return self.norm3(seen + self.attn3(seen, summary))


class FixedNetwork(nn.Module):
    """Ours: expression reaches the output, missing cells are masked, the decoder is not linear.

    Parameters
    ----------
    level
        Scaled expression that the output starts at, (G,).
    """

    def __init__(
        self, n_tokens: int, n_context: int, n_genes: int, width: int, hidden: Sequence[int], level: Tensor | None
    ) -> None:
        super().__init__()
        self.token = nn.Linear(n_tokens, width)
        self.expression = nn.Linear(n_context, width)
        self.block1, self.block2 = _ResidualExchange(width), _ResidualExchange(width)
        self.link1, self.link2 = nn.Linear(width, width), nn.Linear(width, width)
        layers: list[nn.Module] = []
        n_in = width + n_tokens
        for n_out in hidden:
            layers += [nn.Linear(n_in, n_out), nn.GELU()]
            n_in = n_out
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(n_in, n_genes)
        if level is not None:
            self.last.bias.data = torch.log(torch.expm1(level.clamp_min(1e-3)))  # inverse of softplus

    def encode(self, tokens: Tensor, context: Tensor, present: Tensor | None = None) -> Tensor:
        """Latent of each token, (n, t, width)."""
        b = self.expression(context)
        x = self.block1(self.token(tokens), b, present)
        x = x + self.link1(x)
        x = self.block2(x, b, present)
        return x + self.link2(x)

    def decode(self, latent: Tensor, tokens: Tensor, genes: Tensor | None = None) -> Tensor:
        """Scaled expression of tokens, (..., G) or that of the columns `genes`; never negative."""
        x = self.hidden(torch.cat([latent, tokens], dim=-1))
        if genes is None:
            return functional.softplus(self.last(x))
        return functional.softplus(functional.linear(x, self.last.weight[genes], self.last.bias[genes]))


def network_of(config: HistexConfig, n_channels: int, n_genes: int, level: Tensor | None = None) -> Any:
    """A network of this config for cells of `n_channels` channels; initial weights follow torch's global seed."""
    if config.mode == "original":
        return OriginalNetwork(n_channels, n_genes, config.width, config.hidden)
    # Cells and places of expression carry their offset from the window's centre.
    return FixedNetwork(n_channels + 2, n_genes + 2, n_genes, config.width, config.hidden, level)
