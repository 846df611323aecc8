"""A place and its surroundings: one encoder at several tile sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError
from ._base import Encoder, EncoderInfo, TileEncoder
from ._registry import create

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.geometry import Slide

__all__ = ["Pyramid"]

_BYTES_AT_ONCE = 128 * 2**20  # of features of all scales


class Pyramid(Encoder):
    """Features of tiles of several sizes around each place, one after another: local, regional, global.

    A regional feature changes little from one cell of a fine grid to the next. For encoders that look at one tile at a
    time, scales whose lattice is coarser than the smallest tile are therefore computed on that lattice and interpolated
    bilinearly in between, so that their cost depends on the area and not on the number of places. The lattice is that
    of the slide: features of a place do not depend on which others are asked for. Interpolated features are smoother than
    exact ones: on a section of her2st they share 70 % of the variance at the default spacing, 58 % at 0.5 (median over the
    features of a MobileNet, which changes with every shift of a pixel; tiles of 128 µm). Encoders that compute maps
    (``morphology``, ``rgb``, ``dense:…``) are evaluated exactly, at next to no cost.

    Parameters
    ----------
    encoder
        The encoder, such as ``"morphology"`` or ``"dense:timm:vit_small_patch16_224"``.
    factors
        Sides of the tiles, in tiles of the encoder.
    interpolate
        Whether coarse scales may be interpolated.
    spacing
        Spacing of the lattice, in tiles of its scale.
    options
        Those of the encoder at factor 1, such as ``tile_um=`` and ``weights=``. Sizes grow with the factor.

    Raises
    ------
    DataValueError
        If `factors` are not positive and different, or `spacing` is not in (0, 1].

    Examples
    --------
    >>> from hespotex.encoders import create
    >>> encoder = create("pyramid:morphology", tile_um=8, context_um=0)
    >>> [scale.tile_um for scale in encoder.scales]
    [8.0, 32.0, 128.0]
    """

    info = EncoderInfo(
        name="pyramid",
        summary="another encoder at several tile sizes: local, regional, global",
        licence="that of the encoder",
        is_family=True,
        argument="encoder",
    )

    def __init__(
        self,
        encoder: str,
        *,
        factors: Sequence[float] = (1.0, 4.0, 16.0),
        interpolate: bool = True,
        spacing: float = 0.25,
        **options: Any,
    ) -> None:
        sizes = np.atleast_1d(np.asarray(factors, dtype=np.float64))
        if sizes.ndim != 1 or not len(sizes) or not (np.isfinite(sizes) & (sizes > 0)).all():
            raise DataValueError(f"factors={factors!r} must be positive numbers, at least one")
        if len(np.unique(sizes)) < len(sizes):
            raise DataValueError(f"factors={factors!r} must differ from each other")
        if not 0 < spacing <= 1:
            raise DataValueError(f"spacing={spacing!r} must be more than 0 and at most 1")
        self.name = f"pyramid:{encoder}"
        self._factors: list[float] = sizes.tolist()
        self._interpolate, self._spacing = bool(interpolate), float(spacing)
        self._base = create(encoder, **options)
        self.scales = tuple(self._base.resized(factor) for factor in self._factors)
        # The slide is held to the scale that looks closest at it: coarser ones are meant to see less detail.
        self.tile_um, self.mpp = self._base.tile_um, min(scale.mpp for scale in self.scales)
        self.n_features = sum(scale.n_features for scale in self.scales)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            **self._base.params(),
            "name": self.name,
            "factors": self._factors,
            "interpolate": self._interpolate,
            "spacing": self._spacing,
        }

    @property
    def trained_mpp(self) -> tuple[float, ...]:
        """Those of the encoder."""
        return self._base.trained_mpp

    @property
    def is_network(self) -> bool:
        """Whether the encoder is one."""
        return self._base.is_network

    def code_hash(self) -> str:
        """That of the encoder."""
        return self._base.code_hash()

    def weights_file(self) -> Path | None:
        """That of the encoder."""
        return self._base.weights_file()

    @property
    def is_compiled(self) -> bool:
        """Whether the encoder is."""
        return self._base.is_compiled

    def compile(self) -> None:
        """Have torch compile the network, which all scales share; see :meth:`Encoder.compile`."""
        self._base.compile()

    def fitting_batch_size(self, device: str) -> int | None:
        """That of the encoder."""
        return self._base.fitting_batch_size(device)

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Horizontal parts of the slide, whose features fit into memory together."""
        y = np.asarray(centres, dtype=np.float64).reshape(-1, 2)[:, 1]
        n_parts = -(-len(y) * self.n_features * 4 // _BYTES_AT_ONCE)
        return np.array_split(np.argsort(y, kind="stable"), n_parts) if n_parts else []

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, n_features) float32), in horizontal parts of the slide."""
        xy = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
        run: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress_bar": progress_bar}
        for rows in self.runs(slide, xy, batch_size=batch_size):
            parts = [
                _interpolated(scale, slide, xy[rows], self._spacing, run)
                if self._on_lattice(scale)
                else _embedded(scale, slide, xy[rows], run)
                for scale in self.scales
            ]
            yield rows, np.concatenate(parts, axis=1)

    def _on_lattice(self, scale: Encoder) -> bool:
        smallest = min(other.tile_um for other in self.scales)
        is_coarse = self._spacing * scale.tile_um > smallest * (1 + 1e-9)
        return self._interpolate and is_coarse and isinstance(scale, TileEncoder)


def _embedded(encoder: Encoder, slide: Slide, xy: np.ndarray, run: dict[str, Any]) -> np.ndarray:
    features = np.empty((len(xy), encoder.n_features), np.float32)
    for rows, values in encoder.embed(slide, xy, **run):
        features[rows] = values
    return features


def _interpolated(encoder: Encoder, slide: Slide, xy: np.ndarray, spacing: float, run: dict[str, Any]) -> np.ndarray:
    """Features at `xy`, bilinear between those at the points of a lattice."""
    step, limit = spacing * encoder.tile_um / slide.mpp, np.array(slide.shape[::-1], dtype=np.float64)
    (x, x_weight), (y, y_weight) = (_neighbours(xy[:, axis], step, limit[axis]) for axis in (0, 1))
    corners = np.stack(np.broadcast_arrays(x[:, None, :], y[:, :, None]), axis=-1).reshape(-1, 2)
    width = corners[:, 0].max() + 1
    numbers, which = np.unique(corners[:, 1] * width + corners[:, 0], return_inverse=True)
    points = np.column_stack([numbers % width, numbers // width])
    values = _embedded(encoder, slide, np.minimum(points * step, limit), run)
    weights = (y_weight[:, :, None] * x_weight[:, None, :]).reshape(-1, 4).astype(np.float32)
    features = np.zeros((len(xy), encoder.n_features), np.float32)
    for corner, weight in zip(which.reshape(-1, 4).T, weights.T, strict=True):
        features += weight[:, None] * values[corner]
    return features


def _neighbours(at: np.ndarray, step: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the lattice points before and behind each position, (n, 2), and their weights, (n, 2).

    The last point is the image's border, so that no tile is centred beyond it.
    """
    before = np.clip(np.floor(at / step), 0, np.ceil(limit / step - 1e-9) - 1).astype(np.int64)
    low, high = before * step, np.minimum((before + 1) * step, limit)
    share = np.clip((at - low) / (high - low), 0, 1)
    return np.stack([before, before + 1], axis=1), np.stack([1 - share, share], axis=1)
