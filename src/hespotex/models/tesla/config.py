"""What can be chosen about TESLA: each switch, its published value and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...data.units import check_unit
from ...errors import DataValueError
from .._config import check_choices

__all__ = ["PAPER", "TESLAConfig"]

ColourFormula = Literal["one", "published"]
ColourScale = Literal["pitch", "extent"]
Weighting = Literal["power", "exponential"]
Cut = Literal["radius", "quantile"]
Empty = Literal["nearest", "zero"]

_CHOICES: dict[str, Any] = {
    "colour_formula": ColourFormula,
    "colour_scale": ColourScale,
    "weighting": Weighting,
    "cut": Cut,
    "empty": Empty,
}


@dataclass(frozen=True)
class TESLAConfig:
    """Settings of :class:`TESLA`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of the spots that is interpolated, and of the result.
    colour_weight
        How far apart two places are whose colours differ by one standard deviation, in units of `colour_scale`; 0
        leaves the histology out.
    colour_scale
        ``"pitch"``: the distance of neighbouring spots; ``"extent"``: the larger standard deviation of the superpixels'
        x and y, as published, so that colour counts the more the larger the section.
    colour_formula
        ``"one"``: the colour of a spot is the mean over its superpixels, weighted by the area under the spot, and
        measured on the same axis as theirs; ``"published"``: it is the plain mean of the channels at the spot's centre,
        where superpixels have channels weighted by variance, and each kind is standardised by itself.
    neighbours
        Most spots that a superpixel is the mean of.
    weighting
        ``"power"``: spots count by distance to the power of minus `power`; ``"exponential"``: by exp(−distance /
        smallest distance), which the published program takes whenever its k is not of integer type.
    power
        See `weighting`.
    cut
        Which spots are too far to be neighbours: those beyond `radius` (``"radius"``), or beyond the quantile at
        `neighbours` / number of spots of all distances between superpixels and spots (``"quantile"``, as published).
    radius
        In units of the distance of neighbouring spots, counted in space and colour.
    empty
        A superpixel without a neighbour: the value of the spot that is nearest in space and colour, or zero, as
        published.
    px_um
        Length in µm in units of which distances are counted. It matters only where spot and superpixel coincide: 0.1
        such units are added to every distance before weighting. The published unit is a pixel of the image.
    """

    unit: str = "log1p_cp10k"
    colour_weight: float = 0.5
    colour_scale: ColourScale = "pitch"
    colour_formula: ColourFormula = "one"
    neighbours: int = 10
    weighting: Weighting = "power"
    power: float = 2.0
    cut: Cut = "radius"
    radius: float = 2.0
    empty: Empty = "nearest"
    px_um: float = 1.0

    def __post_init__(self) -> None:
        check_unit(self.unit)
        check_choices(self, _CHOICES)
        if self.neighbours < 1:
            raise DataValueError(f"neighbours={self.neighbours!r} must be at least 1")
        if not self.colour_weight >= 0:
            raise DataValueError(f"colour_weight={self.colour_weight!r} must not be negative")
        for name in ("power", "radius", "px_um"):
            if not getattr(self, name) > 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be positive")


# A pixel of a whole-slide scan at 20x is about half a µm.
PAPER = TESLAConfig(
    unit="log1p_counts",
    colour_weight=1.0,
    colour_scale="extent",
    colour_formula="published",
    cut="quantile",
    empty="zero",
    px_um=0.5,
)
