"""The denoiser: a transformer over gene tokens, steered by time and by what the image shows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import HisDiffConfig
from .diffusion import Schedule

__all__ = ["Context", "Denoiser", "NeighbourhoodCondition", "Sight", "SpotCondition"]

_SINUSOIDS, _LONGEST = 256, 10_000.0
_CONDITION_HEADS = 8
_MLP_RATIO = 4


class Context(NamedTuple):
    """What the image shows of some spots.

    Attributes
    ----------
    local
        Embedding of each spot, (n, d).
    near, wide
        Embeddings of its two neighbourhoods, (n, k, d); ``None`` where only the spot itself counts.
    near_absent, wide_absent
        Which of them stand for no neighbour, (n, k) bool.
    """

    local: Tensor
    near: Tensor | None = None
    wide: Tensor | None = None
    near_absent: Tensor | None = None
    wide_absent: Tensor | None = None


class Sight(NamedTuple):
    """What the image says of some spots.

    Attributes
    ----------
    condition
        What steers the transformer, (n, width).
    expected
        Expected clean values by the direct path, (n, G); ``None`` without one.
    """

    condition: Tensor
    expected: Tensor | None = None


class SpotCondition(nn.Module):
    """The spot's own embedding through two layers, as in Stem."""

    def __init__(self, n_features: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, n_features)
        self.out = nn.Linear(n_features, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, context: Context) -> Tensor:
        """Condition, (n, width)."""
        return self.out(self.dropout(functional.silu(self.hidden(context.local))))


class NeighbourhoodCondition(nn.Module):
    """The spot's embedding asks its two neighbourhoods, as in HisDiff.

    Parameters
    ----------
    n_features
        Width of the embeddings.
    width
        Width of the condition.
    attention_width
        Width the embeddings are brought to; ``None``: their own, without a layer.
    local_path
        Add the spot's own embedding to the answers, and normalise before and after.
    dropout
        Share of the hidden values dropped in training.
    """

    def __init__(
        self, n_features: int, width: int, *, attention_width: int | None, local_path: bool, dropout: float
    ) -> None:
        super().__init__()
        inner = n_features if attention_width is None else attention_width
        n_heads = max(h for h in range(1, _CONDITION_HEADS + 1) if inner % h == 0)
        self.enter = nn.Identity() if attention_width is None else nn.Linear(n_features, inner)
        self.near = nn.MultiheadAttention(inner, n_heads, batch_first=True)
        self.wide = nn.MultiheadAttention(inner, n_heads, batch_first=True)
        self.local_path, self.dropout = local_path, nn.Dropout(dropout)
        self.norm_in, self.norm_out = (nn.LayerNorm(inner) if local_path else nn.Identity() for _ in range(2))
        self.hidden = nn.Linear(inner, inner)
        self.out = nn.Linear(inner, width)

    def attend(self, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The spot's embedding, and what it gathers from the near and the wide neighbourhood, (n, inner) each."""
        local = self.norm_in(self.enter(context.local))
        near = self._ask(self.near, local, context.near, context.near_absent)
        wide = self._ask(self.wide, local, context.wide, context.wide_absent)
        return local, near, wide

    def _ask(self, attention: nn.Module, local: Tensor, keys: Tensor | None, absent: Tensor | None) -> Tensor:
        assert keys is not None
        keys = self.norm_in(self.enter(keys))
        answer, _ = attention(local[:, None], keys, keys, key_padding_mask=absent, need_weights=False)
        return answer[:, 0]

    def forward(self, context: Context) -> Tensor:
        """Condition, (n, width)."""
        local, near, wide = self.attend(context)
        y = self.norm_out(local + near + wide) if self.local_path else near + wide
        return self.out(self.dropout(functional.relu(self.hidden(y))))


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(_SINUSOIDS, width)
        self.out = nn.Linear(width, width)

    @staticmethod
    def sinusoid(time: Tensor) -> Tensor:
        """Cosines, then sines of a time (n,), (n, 256)."""
        half = _SINUSOIDS // 2
        frequency = torch.exp(-math.log(_LONGEST) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
        angle = time[:, None].float() * frequency
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)

    def forward(self, time: Tensor) -> Tensor:
        """Embedding of the time, (n, width)."""
        return self.out(functional.silu(self.hidden(self.sinusoid(time))))


class Block(nn.Module):
    """Self-attention and MLP whose scale, shift and gate the condition sets (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.expand = nn.Linear(width, _MLP_RATIO * width)
        self.contract = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (n, G, width) under a condition (n, width)."""
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + parts[2] * self.attention(_modulated(x, parts[0], parts[1]))
        return x + parts[5] * self.mlp(_modulated(x, parts[3], parts[4]))

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention over the tokens."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.projection(mixed.transpose(1, 2).reshape(n, length, width))

    def mlp(self, x: Tensor) -> Tensor:
        """Each token by itself."""
        return self.contract(functional.gelu(self.expand(x), approximate="tanh"))


class Denoiser(nn.Module):
    """Estimates noise and variance of every gene's value from all genes' noisy values.

    Parameters
    ----------
    n_genes
        Number of tokens G: genes, or components of them.
    n_features
        Width of the embeddings.
    config
        Widths, depth and kind of condition.

    Notes
    -----
    A gene is known by its learned vector alone: permuting genes together with their vectors permutes the output. All
    gates and the last layer start at zero, so that an untrained network returns 0.
    """

    def __init__(self, n_genes: int, n_features: int, config: HisDiffConfig) -> None:
        super().__init__()
        width = config.width
        self.condition: SpotCondition | NeighbourhoodCondition
        if config.condition == "spot":
            self.condition = SpotCondition(n_features, width, dropout=config.dropout)
        else:
            self.condition = NeighbourhoodCondition(
                n_features,
                width,
                attention_width=config.condition_width,
                local_path=config.local_path,
                dropout=config.dropout,
            )
        self.time = TimeEmbedding(width)
        self.gene = nn.Parameter(torch.empty(n_genes, width))
        self.value_hidden = nn.Linear(1, width)
        self.value_out = nn.Linear(width, width)
        self.blocks: Any = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, 2)
        self.direct = nn.Linear(n_features, n_genes) if config.direct_path else None
        if self.direct is not None:
            self.register_buffer("noise", Schedule.linear().tables().noise, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.gene, a=math.sqrt(5))
        for layer in (self.time.hidden, self.time.out, self.condition.out):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.last_modulation.weight)
        nn.init.zeros_(self.last.weight)
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)

    def tokens(self, x: Tensor) -> Tensor:
        """Token of each gene from its noisy value, (n, G, width)."""
        return self.gene + self.value_out(functional.silu(self.value_hidden(x[:, :, None])))

    def look(self, context: Context) -> Sight:
        """What the image says, whatever the time."""
        return Sight(self.condition(context), None if self.direct is None else self.direct(context.local))

    def denoise(self, x: Tensor, time: Tensor, sight: Sight) -> Tensor:
        """Noise (or velocity) estimate and variance's interpolation value, (n, 2, G).

        Parameters
        ----------
        x
            Noisy values, (n, G).
        time
            Times 0 … 999, (n,) or (1,).
        sight
            What the image says, from :meth:`look`.
        """
        c = self.time(time) + sight.condition
        tokens = self.tokens(x)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.last_modulation(functional.silu(c))[:, None].chunk(2, dim=-1)
        output = self.last(_modulated(tokens, shift, scale)).transpose(1, 2)
        if sight.expected is None:
            return output
        # The velocity that leads to an expected clean value, where noise and clean values have unit variance.
        towards = -self.noise[time] * sight.expected  # type: ignore[index]
        return torch.stack([output[:, 0] + towards, output[:, 1]], dim=1)

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """The same, from what the image shows."""
        return self.denoise(x, time, self.look(context))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
