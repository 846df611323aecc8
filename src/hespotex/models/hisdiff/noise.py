"""Random numbers that belong to a spot, whatever is drawn beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["SpotNoise", "spot_keys"]


def spot_keys(ids: Sequence[object] | np.ndarray) -> np.ndarray:
    """A number for each name, (n,) uint64: equal names, equal numbers."""
    digests = [hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in ids]
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


class SpotNoise:
    """A stream of standard normal numbers for each spot.

    Parameters
    ----------
    seed
        Of all streams.
    keys
        One number for each spot, (n,).
    draw
        Number of the sample.
    paired
        Whether samples 1, 3, … get the negative of what samples 0, 2, … get.
    """

    def __init__(self, seed: int, keys: np.ndarray, draw: int, *, paired: bool = False) -> None:
        draw, odd = divmod(draw, 2) if paired else (draw, 0)
        self._sign = np.float32(-1.0 if odd else 1.0)
        self._streams = [np.random.default_rng([seed, draw, int(key)]) for key in keys]

    def __call__(self, width: int) -> np.ndarray:
        """The next `width` numbers of each spot, (n, width) float32."""
        return self._sign * np.stack([stream.standard_normal(width, dtype=np.float32) for stream in self._streams])
