"""Features of the patches inside a network's tile: one pass describes hundreds of places."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError
from ._base import Encoder, EncoderInfo, PatchEncoder
from ._groups import grouped
from ._registry import create

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.geometry import Slide

__all__ = ["Dense"]

_TILES_PER_RUN = 256


class Dense(Encoder):
    """Patch tokens of a vision transformer, or the last feature map of a convolutional network.

    The slide is laid out in cells of the size of a patch, and read in tiles of the network's input that overlap. A place
    gets the token of the cell that holds it, from the tile in which that cell is most central: tokens at the border of
    a tile know one side only, and would make seams. The cost depends on the area, not on the number of places.

    Parameters
    ----------
    encoder
        The network, such as ``"timm:vit_small_patch16_224"``, ``"open_clip:ViT-B-16"`` or ``"quiltnet"``.
    tile_um, mpp
        Side of a cell in µm, or the resolution; 0.5 µm/px by default, at which a patch of 16 px is 8 µm wide.
    overlap
        Share of a tile's side by which neighbours overlap. At the default each place of the slide is seen four times.
    options
        Those of the network, such as ``weights=``.

    Raises
    ------
    DataValueError
        If the encoder has no features by patch, or `overlap` is not in [0, 1).
    """

    info = EncoderInfo(
        name="dense",
        summary="patch tokens of a vision transformer, for fine grids and nuclei",
        mpp=0.5,
        licence="that of the weights",
        extra="encoders",
        is_family=True,
        argument="encoder",
    )

    def __init__(
        self,
        encoder: str,
        *,
        tile_um: float | None = None,
        mpp: float | None = None,
        overlap: float = 0.5,
        **options: Any,
    ) -> None:
        if not 0 <= overlap < 1:
            raise DataValueError(f"overlap={overlap!r} must be at least 0 and less than 1")
        network = create(encoder, **options)
        self.name = f"dense:{encoder}"
        if not isinstance(network, PatchEncoder):
            raise DataValueError(
                f"encoder {self.name!r}: {encoder!r} has no features by patch; take a vision transformer"
            )
        self._network, self._overlap = network, float(overlap)
        self._cells, patch_px, self.n_features = _probe(network, self.name)
        self._stride = max(round(self._cells * (1 - overlap)), 1)
        if mpp is not None and tile_um is not None and abs(tile_um / (mpp * patch_px) - 1) > 1e-6:
            raise DataValueError(
                f"tile_um={tile_um!r} and mpp={mpp!r} contradict each other: a cell of {self.name!r} has {patch_px:g} px; "
                f"give one of them"
            )
        self._patch_px = patch_px
        self._set_size(float(tile_um if tile_um is not None else patch_px * (0.5 if mpp is None else mpp)))

    @property
    def trained_mpp(self) -> tuple[float, ...]:
        """Resolutions the network's weights were trained at."""
        return self._network.trained_mpp

    @property
    def is_network(self) -> bool:
        """Always."""
        return True

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        network = {key: value for key, value in self._network.params().items() if key not in ("name", "tile_um")}
        return {**network, "name": self.name, "tile_um": self.tile_um, "overlap": self._overlap}

    def weights_file(self) -> Path | None:
        """That of the network."""
        return self._network.weights_file()

    def compile(self) -> None:
        """Not for patches.

        Raises
        ------
        DataValueError
            Always.
        """
        raise DataValueError(
            f"compile=True is for features of whole tiles; {self.name!r} asks the network for its patches"
        )

    def fitting_batch_size(self, device: str) -> int | None:
        """That of the network."""
        return self._network.fitting_batch_size(device)

    def resized(self, factor: float) -> Dense:
        """The same encoder for cells `factor` times as wide, seen at a coarser resolution; both share one network."""
        other = copy.copy(self)
        other._set_size(factor * self.tile_um)
        return other

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Cells by rows of the tiles that show them, some rows at a time."""
        _, first, _ = self._places(slide, centres)
        order = np.argsort(first[:, 1], kind="stable")
        tiles = np.unique(first, axis=0)[:, 1]
        tops, n_tiles = np.unique(tiles, return_counts=True)
        run = np.cumsum(n_tiles) // max(batch_size, _TILES_PER_RUN)
        return np.split(order, np.flatnonzero(np.diff(run[np.searchsorted(tops, first[order, 1])])) + 1)

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, n_features) float32), tile by tile in storage order."""
        from ..image.stream import iter_tiles

        at, first, cell = self._places(slide, centres)
        tiles, members = grouped(first)
        batches = iter_tiles(
            slide,
            (tiles + self._cells / 2) * cell,
            tile_um=self._cells * self.tile_um,
            tile_px=self._network.tile_px,
            batch_size=batch_size,
            progress_bar=progress_bar,
        )
        for batch in batches:
            tokens = self._network.encode_patches(batch.pixels, device)
            for own, tile in zip(tokens, batch.rows.tolist(), strict=True):
                rows = members[tile]
                column, row = (at[rows] - tiles[tile]).T
                yield rows, own[row, column]

    def _places(self, slide: Slide, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Cell (x, y) of each centre, the first cell of the tile that shows it, and the side of a cell in pixels."""
        cell = self.tile_um / slide.mpp  # in level-0 pixels
        count = np.maximum(np.ceil(np.array(slide.shape[::-1]) / cell - 1e-6), 1).astype(np.int64)
        xy = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
        at = np.clip(np.floor(xy / cell), 0, count - 1).astype(np.int64)
        first = np.column_stack([_first_cells(at[:, axis], self._cells, self._stride, count[axis]) for axis in (0, 1)])
        return at, first, cell

    def _set_size(self, tile_um: float) -> None:
        if not (np.isfinite(tile_um) and tile_um > 0):
            raise DataValueError(f"tile_um={tile_um!r}: the side of a cell must be positive")
        self.tile_um, self.mpp = tile_um, tile_um / self._patch_px


def _probe(network: PatchEncoder, name: str) -> tuple[int, float, int]:
    """Patches along a side, pixels of each and width of their features, as one blank tile shows them."""
    side = network.tile_px
    try:
        rows, columns, width = network.encode_patches(np.zeros((1, side, side, 3), np.uint8), "cpu").shape[1:]
    except (AssertionError, RuntimeError) as error:  # a network made for another size
        raise DataValueError(f"encoder {name!r} takes no tiles of {side} px: {error}") from error
    if rows != columns or rows < 2 or side % rows:
        raise DataValueError(
            f"encoder {name!r} divides a tile of {side} px into {rows} × {columns} patches; a square of whole pixels each, "
            f"and at least 2 × 2 of them, are needed: choose another tile_px="
        )
    return rows, side / rows, width


def _first_cells(cells: np.ndarray, width: int, stride: int, count: int) -> np.ndarray:
    """First cell, along one axis, of the tile whose centre is nearest to each of `cells`.

    Tiles of `width` cells begin every `stride` cells; the last one is moved back so that it ends with the image.
    """
    last = max(count - width, 0)
    starts = np.minimum(np.arange(-(-last // stride) + 1) * stride, last)
    middles = starts + width / 2
    return starts[np.searchsorted((middles[1:] + middles[:-1]) / 2, cells + 0.5)]
