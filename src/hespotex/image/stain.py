"""Stain normalisation as a map of colours: the same for each pixel, wherever it lies and however the image is cut.

Arrays in, arrays out. The fits are squidpy's; see :mod:`hespotex.image._squidpy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import DataTypeError, DataValueError
from ._squidpy import fit_stain, from_lab, to_lab
from .color import is_void, optical_density

__all__ = ["METHODS", "StainFit", "StainMap", "fit_stain_to", "stain_map", "stained"]

METHODS: Final = ("macenko", "vahadane", "reinhard")
WHITE: Final = (255.0, 255.0, 255.0)  # glass is at least so bright, so that white stays white
MIN_DENSITY: Final = 0.1  # of the darkest channel; tinted glass reaches 0.06, pale stroma begins at 0.1
MIN_PIXELS: Final = 1000
_GLASS: Final = 238.0  # darkest channel from which nothing is stained, and up to which all is: densities 0.03 and 0.1
_STAIN: Final = 202.0
_STRIP: Final = 1 << 15  # pixels that are worked on at a time: they stay in the processor's cache, twice as fast
_SHAPES: Final = {"matrix": (3, 3), "maxima": (2,), "white": (3,), "mean": (3,), "std": (3,)}


@dataclass(frozen=True, eq=False)
class StainFit:
    """The colours of one slide's stain.

    Attributes
    ----------
    method
        One of ``METHODS``.
    values
        For ``"reinhard"``: ``mean`` and ``std`` (3,) of tissue in Ruderman's colour space. Else ``matrix`` (3, 3),
        absorbance of haematoxylin, eosin and a residual as columns; ``maxima`` (2,), 99th percentiles of the amounts of
        both dyes; ``white`` (3,), the value of glass that absorbance is measured against.

    Raises
    ------
    DataValueError
        If the values are not those of the method.
    """

    method: str
    values: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DataValueError(f"method={self.method!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
        needed = ("mean", "std") if self.method == "reinhard" else ("matrix", "maxima", "white")
        if set(self.values) != set(needed):
            raise DataValueError(f"a stain of method {self.method!r} has {needed}, not {tuple(self.values)}")
        for name in needed:
            value = self.values[name]
            if value.shape != _SHAPES[name] or not np.isfinite(value).all():
                raise DataValueError(f"stain: {name!r} must be {_SHAPES[name]} finite numbers, got {value.tolist()}")
            if name not in ("matrix", "mean") and not (value > 0).all():
                raise DataValueError(f"stain: {name!r} must be positive, got {value.tolist()}")
        if "matrix" in self.values and abs(np.linalg.det(self.values["matrix"])) < 1e-6:
            raise DataValueError("stain: the columns of 'matrix' do not differ")

    def to_record(self) -> dict[str, Any]:
        """JSON values, from which :meth:`from_record` makes the same fit."""
        return {"method": self.method, **{name: value.tolist() for name, value in self.values.items()}}

    @classmethod
    def from_record(cls, record: Any) -> StainFit:
        """The fit that a record holds.

        Raises
        ------
        DataTypeError, DataValueError
            If it holds none.
        """
        if not isinstance(record, Mapping) or "method" not in record:
            raise DataTypeError(f"a stain record holds 'method' and its numbers, got {record!r:.200}")
        try:
            values = {name: np.array(record[name], dtype=np.float64) for name in _SHAPES if name in record}
        except (TypeError, ValueError) as error:
            raise DataValueError(f"a stain record holds numbers: {error}") from error
        return cls(str(record["method"]), values)


def stained(pixels: np.ndarray) -> np.ndarray:
    """Those of `pixels` (…, 3) uint8 that are stained tissue, not glass and not masked out, (n, 3)."""
    pixels = pixels.reshape(-1, 3)
    return pixels[(optical_density(pixels).max(axis=1) > MIN_DENSITY) & ~is_void(pixels)]


def fit_stain_to(pixels: np.ndarray, method: str, options: Mapping[str, Any] | None = None) -> StainFit:
    """Fit the stain of tissue pixels (n, 3) uint8.

    Raises
    ------
    DataValueError
        If there are too few pixels, or they do not look like two dyes.
    """
    if method not in METHODS:
        raise DataValueError(f"method={method!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
    if len(pixels) < MIN_PIXELS:
        raise DataValueError(
            f"only {len(pixels)} stained pixels were found in its tissue, at least {MIN_PIXELS} are needed"
        )
    white = np.array(WHITE)
    values = fit_stain(pixels, method, white=white, options=options)
    if method != "reinhard":
        return StainFit(method, {**values, "white": white})
    if (values["std"] < 1e-6).any():
        raise DataValueError("its tissue is of one colour, which has no spread to match")
    return StainFit(method, values)


@dataclass(frozen=True, eq=False)
class StainMap:
    """A map of colours, called with RGB (3, h, w) uint8.

    Attributes
    ----------
    tables
        For a change of absorbance: the factor that each value of each channel contributes to each new channel, (new,
        old, value). Absorbances add up, so transmitted light multiplies, and no logarithm is taken per pixel.
    white
        Value of glass, (3,).
    slope, offset
        For a transfer of moments in Ruderman's colour space, (3,) each; there are no tables then.
    """

    tables: np.ndarray | None
    white: np.ndarray
    slope: np.ndarray
    offset: np.ndarray

    def __dask_tokenize__(self) -> Any:
        return "hespotex-stain", self.tables, self.white, self.slope, self.offset

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """The mapped colours, (3, h, w) uint8; a few MB are needed beside them, whatever their size."""
        out = np.empty(rgb.shape, dtype=np.uint8)
        rows = max(1, _STRIP // max(rgb.shape[2], 1))
        for start in range(0, rgb.shape[1], rows):
            strip = slice(start, start + rows)
            values = self._through_lab(rgb[:, strip]) if self.tables is None else self._through_light(rgb[:, strip])
            out[:, strip] = np.clip(np.rint(values), 0, 255)
        return out

    def _through_light(self, rgb: np.ndarray) -> np.ndarray:
        tables = self.tables
        assert tables is not None
        out = np.empty(rgb.shape, dtype=np.float32)
        for channel, white in enumerate(self.white):
            light = np.take(tables[channel, 0], rgb[0])
            light *= np.take(tables[channel, 1], rgb[1])
            light *= np.take(tables[channel, 2], rgb[2])
            light *= np.float32(white + 1)
            out[channel] = light - 1
        return out

    def _through_lab(self, rgb: np.ndarray) -> np.ndarray:
        lab = to_lab(rgb)
        lab *= self.slope[:, None, None]
        lab += self.offset[:, None, None]
        # Glass is no tissue and far from its mean: it would be tinted. The stronger the stain, the more is mapped.
        darkest = rgb.min(axis=0).astype(np.float32)
        stain = np.clip((_GLASS - darkest) / (_GLASS - _STAIN), 0, 1)
        return rgb + stain * (from_lab(lab) - rgb)


def stain_map(own: StainFit, reference: StainFit, *, match_strength: bool = True) -> StainMap:
    """The map that takes a slide of stain `own` to that of `reference`.

    Parameters
    ----------
    own, reference
        Fits of one method.
    match_strength
        Whether the amounts of both dyes are scaled to the reference's, as published, or only their colours changed, as
        squidpy does. ``"reinhard"`` always matches both.
    """
    if own.method != reference.method:
        raise DataValueError(f"a stain of method {own.method!r} cannot be taken to one of method {reference.method!r}")
    if own.method == "reinhard":
        slope = reference.values["std"] / own.values["std"]
        offset = reference.values["mean"] - slope * own.values["mean"]
        return StainMap(None, np.array(WHITE), slope.astype(np.float32), offset.astype(np.float32))
    strength = np.ones(3)
    if match_strength:
        strength[:2] = reference.values["maxima"] / own.values["maxima"]
    operator = reference.values["matrix"] @ np.diag(strength) @ np.linalg.inv(own.values["matrix"])
    # absorbance as squidpy has it: -log((value + 1) / (white + 1)), finite for black and 0 for glass
    absorbed = -np.log((np.arange(256.0) + 1) / (own.values["white"][:, None] + 1))
    tables = np.exp(-operator[:, :, None] * absorbed[None]).astype(np.float32)
    return StainMap(tables, reference.values["white"], np.ones(3, np.float32), np.zeros(3, np.float32))
