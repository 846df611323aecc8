"""What an encoder is."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..errors import DataValueError, HespotexWarning

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.geometry import Slide
    from ._hub import Weights
    from ._torch import TileNetwork

__all__ = ["Encoder", "EncoderInfo", "PatchEncoder", "TileEncoder", "identifying"]

_TILES_PER_RUN = 512
_SMALLEST_BATCH, _LARGEST_BATCH = 8, 512
_WORTHWHILE = 0.03  # a doubling that gains less is not worth its memory


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder is and may be used for; shown by :func:`hespotex.encoders.available`."""

    name: str
    summary: str = ""
    n_features: int | None = None  # None: depends on the options
    mpp: float | None = None
    tile_um: float | None = None
    licence: str = ""
    gated: bool = False
    extra: str = ""  # what to install: hespotex[<extra>]
    is_family: bool = False  # asked for as "<name>:<architecture>"
    argument: str = "architecture"  # of the family: what stands behind the colon
    hub_id: str = ""  # "owner/model" where the weights are published
    hub_files: tuple[str, ...] = ()  # names of their file there, preferred first
    needs_weights: bool = False  # of somebody else, without which nothing runs
    trained_mpp: tuple[float, ...] = ()  # resolutions the weights were trained at; empty: unknown, or none
    is_network: bool = False  # a trained one, to which an enlarged image is another one


def identifying(params: Mapping[str, Any]) -> dict[str, Any]:
    """What of :meth:`Encoder.params` determines features: not how the weights file is called where its hash is known."""
    return {key: value for key, value in params.items() if key != "weights_name" or "weights_sha256" not in params}


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

    info: ClassVar[EncoderInfo]
    name: str
    mpp: float
    tile_um: float
    n_features: int

    @property
    def trained_mpp(self) -> tuple[float, ...]:
        """Resolutions the weights were trained at, in µm per pixel; empty where that is unknown or means nothing."""
        return self.info.trained_mpp

    @property
    def is_network(self) -> bool:
        """Whether it is a trained network, which sees detail and misses it where an image is enlarged."""
        return self.info.is_network

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding: equal parameters give equal features.

        ``create(**params)`` rebuilds the encoder; weights appear as name and SHA-256, never as a path.
        """

    def code_hash(self) -> str:
        """What else tells features apart, of encoders with code that is not this package's; empty for others."""
        return ""

    @abstractmethod
    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, n_features) float32) until each of `centres` is covered once.

        `centres` are (x, y) in pixels of the slide's level 0, (n, 2).
        """

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Row indices of `centres` in groups that can be embedded apart: on several machines, or on several days.

        The features of a run must not depend, to the last bit, on which others are embedded with it. By default all
        rows are one run.
        """
        return [np.arange(len(centres))]

    def embed_runs(
        self,
        slide: Slide,
        centres: np.ndarray,
        runs: list[np.ndarray],
        *,
        batch_size: int,
        device: str,
        progress_bar: bool,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position in `runs`, features (b, n_features) float32) of each of some runs."""
        for number, run in enumerate(runs):
            values = np.full((len(run), self.n_features), np.nan, dtype=np.float32)
            batches = self.embed(slide, centres[run], batch_size=batch_size, device=device, progress_bar=progress_bar)
            for rows, features in batches:
                values[rows] = features
            yield number, values

    def weights_file(self) -> Path | None:
        """The file from which ``create(**params(), weights=file)`` makes the encoder again; ``None`` if of no one file."""
        return None

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return False

    def compile(self) -> None:
        """Have torch compile the network: worth some seconds to a minute where many thousand tiles follow.

        Raises
        ------
        DataValueError
            If the encoder is no network of torch.
        """
        raise DataValueError(f"compile=True is for encoders that are networks of torch, which {self.name!r} is not")

    def fitting_batch_size(self, device: str) -> int | None:
        """Tiles per forward pass that are fastest on `device`; ``None`` for encoders that have no such thing."""
        return None

    def resized(self, factor: float) -> Encoder:
        """The same encoder for tiles `factor` times as wide."""
        from ._registry import create

        return create(**{**self.params(), "tile_um": factor * self.tile_um})


class TileEncoder(Encoder):
    """An encoder that looks at one tile at a time, such as a neural network.

    Subclasses say the pixel side they want and implement :meth:`encode`; reading, resizing, batching and
    prefetching are done here.
    """

    tile_px: int
    _network: TileNetwork | None = None  # of encoders that are one
    _weights: Weights | None = None  # of encoders that have them from a file

    def weights_file(self) -> Path | None:
        """The file of the weights; see :meth:`Encoder.weights_file`."""
        return None if self._weights is None else self._weights.path

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._network is not None and self._network.is_compiled

    def compile(self) -> None:
        """Have torch compile the network; see :meth:`Encoder.compile`."""
        if self._network is None:
            super().compile()
        else:
            self._network.compile()

    def fitting_batch_size(self, device: str) -> int:
        """Tiles per forward pass from which more of them no longer make it faster, found by trying on noise.

        Takes some seconds on a CPU. A batch that does not fit into the memory of the device is taken in halves, is
        therefore not faster, and ends the search.
        """
        rng = np.random.default_rng(0)
        tiles = rng.integers(0, 255, (_LARGEST_BATCH, self.tile_px, self.tile_px, 3), dtype=np.uint8)
        best, size, fastest = _SMALLEST_BATCH, _SMALLEST_BATCH, np.inf
        with nullcontext() if self._network is None else self._network.uncompiled(), warnings.catch_warnings():
            warnings.simplefilter("ignore", HespotexWarning)
            self.encode(tiles[:1], device)  # moves the network, wakes libraries
            while size <= _LARGEST_BATCH:
                start = perf_counter()
                self.encode(tiles[:size], device)
                per_tile = (perf_counter() - start) / size
                if per_tile > fastest * (1 - _WORTHWHILE):
                    break
                best, fastest = size, per_tile
                size *= 2
        return best

    def set_size(self, tile_um: float | None, mpp: float | None, *, default_um: float) -> None:
        """Set the size of a tile from its side in µm or the resolution it is looked at; :attr:`tile_px` is given.

        Raises
        ------
        DataValueError
            If both are given and contradict each other, or are not positive.
        """
        if mpp is not None and tile_um is not None and abs(tile_um / (mpp * self.tile_px) - 1) > 1e-6:
            raise DataValueError(
                f"tile_um={tile_um!r} and mpp={mpp!r} contradict each other: {self.name!r} sees {self.tile_px} px, so "
                f"mpp is tile_um / {self.tile_px}; give one of them"
            )
        self.tile_um = float(tile_um if tile_um is not None else mpp * self.tile_px if mpp is not None else default_um)
        if not self.tile_um > 0:
            raise DataValueError(f"tile_um={tile_um!r}, mpp={mpp!r}: sizes must be positive")
        self.mpp = self.tile_um / self.tile_px

    def resized(self, factor: float) -> Self:
        """The same encoder for tiles `factor` times as wide, seen at a coarser resolution; both share one network."""
        other = copy.copy(self)
        other.set_size(factor * self.tile_um, None, default_um=self.tile_um)
        return other

    @abstractmethod
    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Stream the tiles in storage order through :meth:`encode`."""
        for rows, pixels in self._tiles(slide, centres, batch_size=batch_size, progress_bar=progress_bar):
            yield rows, self.encode(pixels, device)

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Tiles that follow each other in storage, whole batches of them."""
        from ..image.stream import storage_order

        size = batch_size * -(-_TILES_PER_RUN // batch_size)
        order = storage_order(slide.level_for(self.mpp), np.asarray(centres, dtype=np.float64))
        return np.split(order, range(size, len(order), size))

    def embed_runs(
        self,
        slide: Slide,
        centres: np.ndarray,
        runs: list[np.ndarray],
        *,
        batch_size: int,
        device: str,
        progress_bar: bool,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position in `runs`, features (b, n_features) float32) of each of some runs.

        All are read as one stream, so that a chunk of the image that two runs share is decoded once. As runs are whole
        batches in the order of the stream, a batch holds the same tiles whichever runs are asked for.
        """
        if not runs:
            return
        sizes = np.array([len(run) for run in runs])
        owner, first = np.repeat(np.arange(len(runs)), sizes), np.cumsum(sizes) - sizes
        unfinished: dict[int, np.ndarray] = {}
        every = centres[np.concatenate(runs)]
        for rows, values in self.embed(slide, every, batch_size=batch_size, device=device, progress_bar=progress_bar):
            for number in np.unique(owner[rows]).tolist():
                own = owner[rows] == number
                run = unfinished.setdefault(number, np.full((len(runs[number]), self.n_features), np.nan, np.float32))
                run[rows[own] - first[number]] = values[own]
                sizes[number] -= own.sum()
                if sizes[number] == 0:
                    yield number, unfinished.pop(number)

    def _tiles(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of `centres` and their pixels, batch by batch in storage order."""
        from ..image.stream import iter_tiles

        size: dict[str, Any] = {"tile_um": self.tile_um, "tile_px": self.tile_px}
        for batch in iter_tiles(slide, centres, **size, batch_size=batch_size, progress_bar=progress_bar):
            yield batch.rows, batch.pixels


class PatchEncoder(TileEncoder):
    """A tile encoder whose network describes the patches of a tile, too."""

    @abstractmethod
    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, rows, columns, d) float32 of the patches of RGB tiles (b, tile_px, tile_px, 3) uint8.

        Raises
        ------
        DataValueError
            If the network has no features by patch.
        """
