"""What the released code does by Keras' defaults, and torch by others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Conv", "ConvTranspose", "KerasAdam", "keras_init"]


class KerasAdam(torch.optim.Adam):
    """Adam with ε = 1e-7 added to the root of the *uncorrected* second moment.

    Matters in the first steps where gradients are small.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr, eps=1e-7)

    def step(self, closure: Any = None) -> Any:
        """One step: torch adds its ε to the corrected root, so ε is corrected too."""
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["eps"] = 1e-7 / math.sqrt(1 - group["betas"][1] ** group["steps"])
        return super().step(closure)


class Conv(nn.Conv2d):
    """Convolution that halves the image, padded by one row and column at the bottom and right only."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, 2h, 2w) → (n, c', h, w)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ConvTranspose(nn.ConvTranspose2d):
    """Transposed convolution that doubles the image: the full result without its last row and column."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(n, c, h, w) → (n, c', 2h, 2w)."""
        return super().forward(x, output_size)[..., :-1, :-1]


def keras_init(module: nn.Module) -> None:
    """Weights of the layers inside `module`: Glorot's uniform distribution, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
