from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hespotex.data.geometry import Level, Slide
from hespotex.encoders import Encoder

MANIFEST: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "manifest.json").read_text())


def tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in the published weights file of an encoder."""
    found = {}
    for pattern, shape in MANIFEST[name]["tensors"].items():
        numbers = re.search(r"\{0\.\.(\d+)\}", pattern)
        for number in range(int(numbers[1]) + 1) if numbers else [None]:
            found[pattern if numbers is None else pattern.replace(numbers[0], str(number))] = tuple(shape)
    return found


@pytest.fixture(scope="session")
def slide_of() -> Callable[..., Slide]:
    """``make(rgb, mpp=0.5, chunk=100, n_levels=1)``: a slide of pixels (h, w, 3) in memory, each level half as wide."""
    import dask.array as da

    def make(rgb: np.ndarray, mpp: float = 0.5, chunk: int = 100, n_levels: int = 1) -> Slide:
        levels, pixels = [], rgb.transpose(2, 0, 1)
        for level in range(n_levels):
            levels.append(Level(da.from_array(np.ascontiguousarray(pixels), chunks=(3, chunk, chunk)), 2.0**level))
            height, width = (size // 2 * 2 for size in pixels.shape[1:])
            halves = pixels[:, :height, :width].reshape(3, height // 2, 2, width // 2, 2)
            pixels = halves.mean((2, 4)).round().astype(np.uint8)
        return Slide(key="image", levels=tuple(levels), mpp=mpp, to_microns=np.diag([mpp, mpp, 1.0]))

    return make


@pytest.fixture(scope="session")
def features_of() -> Callable[..., np.ndarray]:
    """``run(encoder, slide, centres, batch_size=8)``: features of all centres, each of which is given once."""

    def run(encoder: Encoder, slide: Slide, centres: Any, batch_size: int = 8) -> np.ndarray:
        centres = np.asarray(centres, dtype=float)
        out = np.full((len(centres), encoder.n_features), np.nan, np.float32)
        for rows, values in encoder.embed(slide, centres, batch_size=batch_size, device="cpu", progress_bar=False):
            assert values.dtype == np.float32
            assert np.isnan(out[rows]).all()
            out[rows] = values
        assert np.isfinite(out).all()
        return out

    return run


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (301, 402, 3), dtype=np.uint8)
