"""Whether an encoder sees a slide at a resolution it knows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import HespotexWarning

if TYPE_CHECKING:
    from ..data.geometry import Slide
    from ._base import Encoder

__all__ = ["check_resolution"]

FAR = 1.5  # a magnification of 20x instead of 40x is a factor 2; scanners of one magnification differ by 10 %
ENLARGED = 1.3  # interpolated pixels hold no detail: less is borne than of another magnification


def check_resolution(encoder: Encoder, slide: Slide) -> None:
    """Refuse to enlarge the slide more than twofold; warn where the encoder sees what it was not trained on.

    Raises
    ------
    ScaleError
        If the slide would have to be enlarged more than twofold.

    Warns
    -----
    HespotexWarning
        If the encoder is trained at known resolutions, and works at one that differs from them by more than a factor
        of 1.5; if it is a network, and has the slide enlarged by more than a factor of 1.3.
    """
    slide.level_for(encoder.mpp)
    trained = encoder.trained_mpp
    if trained and not min(trained) / FAR <= encoder.mpp <= max(trained) * FAR:
        warnings.warn(
            f"encoder {encoder.name!r} works at {encoder.mpp:.3g} µm/px (a tile of {encoder.tile_um:.4g} µm), but was "
            f"trained at {_text(trained)} µm/px: its features may mean little. Take a resolution nearer to that: "
            f"hx.pp.embed(sdata, {encoder.name!r}, mpp={trained[0]:g})",
            HespotexWarning,
            stacklevel=2,
        )
    factor = slide.mpp / encoder.mpp
    if (trained or encoder.is_network) and factor > ENLARGED:
        warnings.warn(
            f"image {slide.key!r} has {slide.mpp:.3g} µm/px and is enlarged {factor:.1f}-fold for encoder {encoder.name!r}, "
            f"which works at {encoder.mpp:.3g} µm/px (a tile of {encoder.tile_um:.4g} µm): detail that it knows is missing. "
            f"Use the full-resolution image, or hx.pp.embed(sdata, {encoder.name!r}, mpp={_rounded_up(slide.mpp)}), with a tile "
            f"of {factor * encoder.tile_um:.4g} µm",
            HespotexWarning,
            stacklevel=2,
        )


def _rounded_up(mpp: float) -> str:
    """With three digits, and no finer than it is."""
    step = 10.0 ** (np.floor(np.log10(mpp)) - 2)
    return f"{np.ceil(mpp / step - 1e-6) * step:.3g}"


def _text(trained: tuple[float, ...]) -> str:
    return f"{trained[0]:g}" if len(trained) == 1 else f"{min(trained):g} to {max(trained):g}"
