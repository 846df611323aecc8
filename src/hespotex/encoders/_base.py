"""What an encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["Encoder", "TileEncoder"]


class Encoder(ABC):
    """Turns places on a slide into features.

    Attributes
    ----------
    name
        Registry name; the embedding is stored as ``obsm["X_<name>"]``.
    mpp
        Working resolution in µm per pixel: the slide is read at this scale, whatever its own.
    tile_um
        Side of the square tile a feature describes, in µm.
    n_features
        Width of the embedding.
    """

    name: ClassVar[str] | str
    mpp: float
    tile_um: float
    n_features: int

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding: equal parameters give equal features.

        ``create(**params)`` rebuilds the encoder; weights appear as name and SHA-256, never as a path.
        """

    @abstractmethod
    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, n_features) float32) until each of `centres` is covered once.

        `centres` are (x, y) in pixels of the slide's level 0, (n, 2).
        """


class TileEncoder(Encoder):
    """An encoder that looks at one tile at a time, such as a neural network.

    Subclasses say the pixel side they want and implement :meth:`encode`; reading, resizing, batching and
    prefetching are done here.
    """

    tile_px: int

    @abstractmethod
    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Stream the tiles in storage order through :meth:`encode`."""
        from ..image.stream import iter_tiles

        tiles = iter_tiles(
            slide,
            centres,
            tile_um=self.tile_um,
            tile_px=self.tile_px,
            batch_size=batch_size,
            progress_bar=progress_bar,
        )
        for batch in tiles:
            yield batch.rows, self.encode(batch.pixels, device)
