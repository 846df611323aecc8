"""A vision transformer whose positions stretch to grids of any size, with the parameter names of DINO's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["VisionTransformer"]

_EPS = 1e-6
_TRAINED_GRID = 14  # tokens per side that positions were learnt for
_MARGIN = 0.1  # added to the asked side of a grid of positions, as where the weights come from


class VisionTransformer(nn.Module):
    """From an image or a grid of features to tokens, the class token first.

    Parameters
    ----------
    width, depth, heads
        Of the transformer.
    patch_px
        Side of the patches that an image is cut into; ``None`` for a grid of features.
    n_inputs
        Width of the features of a grid.
    """

    def __init__(
        self, width: int, depth: int, heads: int, *, patch_px: int | None = None, n_inputs: int | None = None
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _TRAINED_GRID**2, width))
        if patch_px is not None:
            self.patch_embed = _Patches(width, patch_px)
        elif n_inputs is not None:
            self.phi = nn.Sequential(nn.Linear(n_inputs, width), nn.GELU())
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (b, 1 + h·w, width) of images (b, 3, h·patch, w·patch) or grids (b, c, h, w)."""
        if hasattr(self, "patch_embed"):
            x = self.patch_embed.proj(x)
            rows, columns = x.shape[2:]
            tokens = x.flatten(2).transpose(1, 2)
        else:
            rows, columns = x.shape[2:]
            tokens = self.phi(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(rows, columns)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Positions of the class token and a grid of tokens, (1, 1 + rows·columns, width)."""
        if rows == columns == _TRAINED_GRID:
            return self.pos_embed
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.reshape(1, _TRAINED_GRID, _TRAINED_GRID, -1).permute(0, 3, 1, 2)
        factors = ((rows + _MARGIN) / _TRAINED_GRID, (columns + _MARGIN) / _TRAINED_GRID)
        grid = functional.interpolate(grid.float(), scale_factor=factors, mode="bicubic").to(first.dtype)
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


class _Patches(nn.Module):
    def __init__(self, width: int, patch_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_px, stride=patch_px)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, width))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = _MLP(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
