"""Whether an encoder sees a slide at a resolution it knows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..errors import HespotexWarning

if TYPE_CHECKING:
    from ..data.geometry import Slide
    from ._base import Encoder

__all__ = ["check_resolution"]

FAR = 1.5  # a magnification of 20x instead of 40x is a factor 2; scanners of one magnification differ by 10 %


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
        of 1.5 or has the slide enlarged by more than that.
    """
    slide.level_for(encoder.mpp)
    trained = encoder.trained_mpp
    if trained and not min(trained) / FAR <= encoder.mpp <= max(trained) * FAR:
        warnings.warn(
            f"encoder {encoder.name!r} works at {encoder.mpp:.3g} µm/px (a tile of {encoder.tile_um:.4g} µm), but was "
            f"trained at {_text(trained)} µm/px: its features may mean little. Give mpp= or tile_um= nearer to that",
            HespotexWarning,
            stacklevel=2,
        )
    if trained and slide.mpp > encoder.mpp * FAR:
        warnings.warn(
            f"image {slide.key!r} has {slide.mpp:.3g} µm/px and is enlarged {slide.mpp / encoder.mpp:.1f}-fold for encoder "
            f"{encoder.name!r}, which works at {encoder.mpp:.3g} µm/px: detail that it knows is missing",
            HespotexWarning,
            stacklevel=2,
        )


def _text(trained: tuple[float, ...]) -> str:
    return f"{trained[0]:g}" if len(trained) == 1 else f"{min(trained):g} to {max(trained):g}"
