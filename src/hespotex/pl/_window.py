"""A part of the slide in µm, and how panels show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..data.geometry import (
    Slide,
)
from ._spatial import ROBUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

__all__ = ["CROP_UM", "Window", "colour_bar", "frame", "picture_of", "robust_norm", "show_window"]

CROP_UM = 400.0
_PANEL_PX = 800  # finest pixels of the H&E that a panel shows


@dataclass(frozen=True)
class Window:
    """A part of the slide in µm."""

    left: float
    top: float
    width: float
    height: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return self.left, self.left + self.width, self.top + self.height, self.top


def show_window(ax: Axes, window: Window) -> None:
    """Show a part of the slide, y downwards."""
    ax.set_xlim(window.left, window.left + window.width)
    ax.set_ylim(window.top + window.height, window.top)


def picture_of(slide: Slide, window: Window) -> np.ndarray:
    """The H&E of a window, (h, w, 3) uint8, white beyond the image; no finer than a panel shows."""
    level = slide.level_for(max(max(window.width, window.height) / _PANEL_PX, slide.mpp))
    scale = slide.mpp * level.downsample
    height, width = level.array.shape[-2:]
    left, top = int(np.floor(window.left / scale)), int(np.floor(window.top / scale))
    right, bottom = (
        int(np.ceil((window.left + window.width) / scale)),
        int(np.ceil((window.top + window.height) / scale)),
    )
    canvas = np.full((bottom - top, right - left, 3), 255, dtype=np.uint8)
    y0, y1, x0, x1 = max(top, 0), min(bottom, height), max(left, 0), min(right, width)
    if y1 > y0 and x1 > x0:
        pixels = np.asarray(level.array[:, y0:y1, x0:x1]).transpose(1, 2, 0)
        canvas[y0 - top : y1 - top, x0 - left : x1 - left] = pixels
    return canvas


def frame(ax: Axes, window: Window) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(
        Rectangle(
            (window.left, window.top), window.width, window.height, fill=False, edgecolor="#D55E00", linewidth=1.2
        )
    )


def robust_norm(values: np.ndarray) -> Normalize:
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    low, high = np.percentile(known, ROBUST) if len(known) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1.0)


def colour_bar(figure: Figure, ax: Axes, norm: Normalize, cmap: str | Colormap, label: str) -> None:
    import matplotlib.pyplot as plt

    bar = figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, shrink=0.7, aspect=25)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
