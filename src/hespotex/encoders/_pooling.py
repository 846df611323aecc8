"""From the tokens of a vision transformer to one row of features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ..errors import DataValueError

__all__ = ["POOLINGS", "Pooled", "pool"]

POOLINGS = ("class", "mean", "class+mean", "class+centre")


def pool(
    tokens: torch.Tensor, n_prefix: int, how: str, norm: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Features (b, d) or (b, 2 d) of tokens (b, n_prefix + n, d), the class token first.

    ``"class"`` is the class token, ``"mean"`` the mean of the patches, ``"class+mean"`` one after the other, and
    ``"class+centre"`` the class token and the mean of the 2 × 2 or 3 × 3 patches in the middle of the tile: what lies at
    the place itself, beside what surrounds it. Registers count as neither. `norm` is what a network that normalises
    after pooling does to a token or a mean of tokens.

    Examples
    --------
    >>> import torch
    >>> pool(torch.arange(5.0).view(1, 5, 1), 1, "class+mean").tolist()
    [[0.0, 2.5]]
    """
    patches = tokens[:, n_prefix:]
    parts = [] if how == "mean" else [tokens[:, 0]]
    if how != "class":
        parts.append((_middle(patches) if how == "class+centre" else patches).mean(1))
    return torch.cat(parts if norm is None else [norm(part) for part in parts], dim=-1)


def _middle(patches: torch.Tensor) -> torch.Tensor:
    side = math.isqrt(patches.shape[1])
    width = 2 + side % 2
    first = (side - width) // 2
    grid = patches.unflatten(1, (side, side))
    return grid[:, first : first + width, first : first + width].flatten(1, 2)


class Pooled(nn.Module):
    """A network of timm, from images (b, 3, h, w) to pooled features (b, d).

    Parameters
    ----------
    backbone
        The network without classifier.
    pooling
        One of :data:`POOLINGS`; ``None`` for the network's own.
    name
        Of the encoder, for errors.

    Raises
    ------
    DataValueError
        If `pooling` is unknown, or the network is no vision transformer that gives a class token before the patches.
    """

    def __init__(self, backbone: nn.Module, pooling: str | None, name: str) -> None:
        super().__init__()
        self.backbone, self.pooling, self.name = backbone, pooling, name
        self.n_prefix = int(getattr(backbone, "num_prefix_tokens", 0))
        if pooling is None:
            return
        if pooling not in POOLINGS:
            raise DataValueError(f"pooling={pooling!r} is unknown; possible: {', '.join(map(repr, POOLINGS))}")
        if not self._has_class_token:
            raise DataValueError(
                f"encoder {name!r} is no vision transformer with a class token before its patches, which pooling="
                f"{pooling!r} needs"
            )

    @property
    def _has_class_token(self) -> bool:
        """Whether it comes first of the tokens; those of pit and coat are not given that way."""
        return self.n_prefix > 0 and getattr(self.backbone, "cls_token", None) is not None

    @property
    def n_features(self) -> int:
        """Width of the features."""
        width: int = self.backbone.num_features  # type: ignore[assignment]  # of timm's networks, an int
        if self.pooling is None:  # some have a layer between their last map and the classifier
            width = getattr(self.backbone, "head_hidden_size", None) or width
        return int(width) * (2 if self.pooling and "+" in self.pooling else 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (b, d)."""
        if self.pooling is None:
            return self.backbone(images)
        tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        # The mean that timm itself takes is normalised after it, where the tokens are not.
        return pool(tokens, self.n_prefix, self.pooling, getattr(self.backbone, "fc_norm", None))

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens (b, rows, columns, d) of a transformer's patches, or the last map of a convolutional network.

        Raises
        ------
        DataValueError
            If the network's last features are neither.
        """
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        if features.ndim == 3 and (self.n_prefix or getattr(self.backbone, "cls_token", None) is None):
            tokens = features[:, self.n_prefix :]
            side = math.isqrt(tokens.shape[1])
            if side**2 == tokens.shape[1]:
                return tokens.unflatten(1, (side, side))
        elif features.ndim == 4:
            return features if features.shape[-1] == self.backbone.num_features else features.permute(0, 2, 3, 1)
        raise DataValueError(
            f"encoder {self.name!r} gives features of shape {tuple(features.shape[1:])} before pooling, which are no square "
            f"of patches; take a vision transformer, such as 'timm:vit_small_patch16_224'"
        )
