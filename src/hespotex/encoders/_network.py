"""What encoders share that are one torch network: from tiles to features, and to features of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataValueError
from ._base import PatchEncoder
from ._torch import TileNetwork

if TYPE_CHECKING:
    from ._hub import Weights
    from ._pooling import Pooled

__all__ = ["NetworkEncoder", "triple"]


class NetworkEncoder(PatchEncoder):
    """An encoder that is a pooled network of timm; subclasses make the network and call :meth:`_set_network`."""

    _network: TileNetwork
    _weights: Weights

    def _set_network(self, module: Pooled, mean: Sequence[float], std: Sequence[float], dtype: str) -> None:
        self.n_features = module.n_features
        self._mean, self._std, self._dtype, self._pooling = mean, std, dtype, module.pooling
        self._module = module
        self._network = TileNetwork(module, mean, std, dtype)

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._network(tiles, device)

    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Tokens of a transformer without those of class and registers, or the last map of a convolutional network.

        (b, rows, columns, d) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8.

        Raises
        ------
        DataValueError
            If the network's last features are neither.
        """
        return self._network(tiles, device, forward=self._module.patches)


def triple(value: float | Sequence[float] | None, default: Sequence[float]) -> tuple[float, float, float]:
    """Mean or standard deviation of red, green and blue, from one number or one each.

    Raises
    ------
    DataValueError
        If a number is not finite.
    """
    values = np.broadcast_to(np.asarray(default if value is None else value, dtype=np.float64), (3,))
    if not np.isfinite(values).all():
        raise DataValueError(f"mean and std must be finite, got {value!r}")
    first, second, third = values.tolist()
    return first, second, third
