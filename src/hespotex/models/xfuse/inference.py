"""From an image to draws of the scale and the activities at its cells, tile by tile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...data.blockwise import available_bytes
from ...errors import DataValueError
from .network import reach

if TYPE_CHECKING:
    from .objective import Generative
    from .slides import Raster

__all__ = ["activities", "check_draws", "field_noise", "mean_and_std", "tiles"]

_NOISE_BLOCK = 64  # pixels of the finest level


def tiles(shape: tuple[int, int], side: int, depth: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Windows that cover a raster: what each is to give, and what the network must see for it.

    What is seen begins at a multiple of the coarsest pixel and reaches as far as the network does, so that tiles agree
    with the whole raster.
    """
    coarsest = 2 ** (depth - 1)
    margin = -(-reach(depth) // coarsest) * coarsest
    side = -(-side // coarsest) * coarsest

    def axis(length: int) -> list[tuple[slice, slice]]:
        return [
            (
                slice(start, min(start + side, length)),
                slice(max(0, start - margin), min(start + side + margin, length)),
            )
            for start in range(0, length, side)
        ]

    for given_rows, seen_rows in axis(shape[0]):
        for given_columns, seen_columns in axis(shape[1]):
            yield (given_rows, given_columns), (seen_rows, seen_columns)


def field_noise(channels: Sequence[int], seen: tuple[slice, slice], seed: int, sample: int) -> list[Tensor]:
    """Standard normal fields of all levels in a window, (1, c_i, h_i, w_i): the same numbers at one place in any window.

    They are drawn in blocks whose seeds are their places.
    """
    fields = []
    block = max(_NOISE_BLOCK, 2 ** (len(channels) - 1))
    for level, count in enumerate(channels):
        side, factor = block >> level, 2**level
        top, left = (window.start // factor for window in seen)
        bottom, right = (-(-window.stop // factor) for window in seen)
        rows = range(top // side, -(-bottom // side))
        columns = range(left // side, -(-right // side))
        drawn = np.concatenate(
            [
                np.concatenate(
                    [
                        np.random.default_rng([seed, sample, level, row, column]).standard_normal(
                            (count, side, side), dtype=np.float32
                        )
                        for column in columns
                    ],
                    axis=2,
                )
                for row in rows
            ],
            axis=1,
        )
        up, across = top - rows.start * side, left - columns.start * side
        window = drawn[None, :, up : up + bottom - top, across : across + right - left]
        fields.append(torch.from_numpy(np.ascontiguousarray(window)))
    return fields


def check_draws(n_cells: int, n_metagenes: int, n_samples: int) -> None:
    """Raise if the draws of scale times activity do not fit in memory.

    Raises
    ------
    DataValueError
        Naming the number of draws that would fit.
    """
    each, free = 4 * n_cells * n_metagenes, available_bytes()
    if free is not None and each * n_samples > free:
        raise DataValueError(
            f"n_samples={n_samples}: draws of {n_metagenes} metagenes at {n_cells} superpixels take "
            f"{each * n_samples / 2**30:.1f} GiB; memory allows n_samples={free // each}"
        )


def mean_and_std(draws: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and unbiased standard deviation, float32, of draws seen one at a time; of a single one there is no spread."""
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for count, draw in enumerate(draws, start=1):
        off = draw - mean
        mean = mean + off / count
        squares = squares + off * (draw - mean)
    std = np.sqrt(squares / (count - 1)).astype(np.float32) if count > 1 else None
    return mean.astype(np.float32), std


def activities(
    model: Generative, raster: Raster, n_samples: int, seed: int, *, tile: int, unit_scale: bool = False
) -> np.ndarray:
    """Draws of scale times activity at the cells of a raster, (n_samples, m, K) float32.

    Parameters
    ----------
    model
        In evaluation mode, on the device to be used.
    raster
        The image.
    n_samples, seed
        Draws, and what they come from.
    tile
        Side of the windows; changes no number.
    unit_scale
        Take the scale for 1 everywhere.
    """
    network = model.network
    device = next(model.parameters()).device
    drawn = np.empty((n_samples, len(raster.row), len(model.metagenes.slots)), dtype=np.float32)
    for given, seen in tiles(raster.shape, tile, network.depth):
        inside = np.ones(len(raster.row), dtype=bool)
        for position, window in zip((raster.row, raster.column), given, strict=True):
            inside &= (position >= window.start) & (position < window.stop)
        if not inside.any():
            continue
        row, column = raster.row[inside] - seen[0].start, raster.column[inside] - seen[1].start
        image = torch.from_numpy(np.ascontiguousarray(raster.image[:, seen[0], seen[1]]))[None].to(device)
        with torch.inference_mode():
            posterior = network.encode(image)
            for sample in range(n_samples):
                noise = field_noise(network.channels, seen, seed, sample)
                z = [mean + sd * eps.to(device) for (mean, sd), eps in zip(posterior, noise, strict=True)]
                d = network.decode(z)
                activity = torch.softmax(model.metagenes.logits(network.activity_features(d)), dim=1)
                if not unit_scale:
                    activity = activity * network.scale(d)
                drawn[sample, inside] = activity[0, :, row, column].T.cpu().numpy()
    return drawn
