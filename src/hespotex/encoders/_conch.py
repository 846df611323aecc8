"""CONCH's image tower: a transformer of timm, and one query that attends to all of its tokens."""

from __future__ import annotations

import torch
from torch import nn

from ._pooling import Pooled

__all__ = ["ATTENTION", "ConchTower"]

ATTENTION = "attention"
_WIDTH, _HEADS = 512, 8


class ConchTower(Pooled):
    """From images (b, 3, h, w) to features (b, 512) by attention, or to tokens pooled in another way.

    Parameters
    ----------
    backbone
        The transformer, without classifier.
    pooling
        ``"attention"``, or one of :data:`~hespotex.encoders._pooling.POOLINGS`.
    name
        Of the encoder, for errors.
    """

    def __init__(self, backbone: nn.Module, pooling: str | None, name: str) -> None:
        super().__init__(backbone, None if pooling == ATTENTION else pooling, name)
        self.pooling = pooling
        if pooling == ATTENTION:
            from open_clip.transformer import AttentionalPooler  # has CONCH's, by the same names

            width = int(backbone.num_features)  # type: ignore[arg-type]  # of timm's networks, an int
            self.attn_pool_contrast = AttentionalPooler(_WIDTH, width, n_head=_HEADS, n_queries=1)
            self.ln_contrast = nn.LayerNorm(_WIDTH)

    @property
    def n_features(self) -> int:
        """Width of the features."""
        return _WIDTH if self.pooling == ATTENTION else super().n_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (b, d)."""
        if self.pooling != ATTENTION:
            return super().forward(images)
        tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
