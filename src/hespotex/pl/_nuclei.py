"""Nuclei on the H&E, coloured by expression, type or region."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..data.geometry import (
    Slide,
    find_image_key,
    resolve_slide,
    shape_centres,
    shape_geometries,
)
from ..data.stored import find_prediction, read_prediction
from ..data.tables import resolve_table, row_positions
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError
from ._common import PALETTE, UNIT_LABELS, axes_array, figure_of, save_figure
from ._window import CROP_UM, Window, colour_bar, picture_of, robust_norm, show_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["nuclei"]

_ON_TISSUE = (*(colour for colour in PALETTE if colour != "#CC79A7"), "#000000")  # pink is lost on eosin
_MAX_OUTLINES = 50_000  # more nuclei in a window are drawn as points


def nuclei(
    sdata: SpatialData,
    color: str,
    key: str | None = None,
    *,
    table_key: str | None = None,
    image_key: str | None = None,
    centre_um: tuple[float, float] | None = None,
    crop_um: float | None = CROP_UM,
    cmap: str | Colormap = "viridis",
    alpha: float = 0.7,
    panel_size: float = 4.5,
    ax: Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw nuclei over the H&E, coloured by a predicted gene, a feature, or a column of ``obs``.

    Parameters
    ----------
    sdata
        Object with a prediction at nuclei (:func:`hespotex.tl.predict`), or any table that annotates them.
    color
        Predicted gene, a feature of the table, or a column of ``obs`` such as a cell type.
    key
        Key of the prediction; may be left out where there is only one in the table.
    table_key
        Table of the nuclei; may be left out where one table holds a prediction at nuclei.
    image_key
        Image that they lie on; may be left out where there is only one.
    centre_um
        Centre (x, y) of the window in µm of the image; by default where nuclei are densest.
    crop_um
        Side of the window in µm; ``None`` for the whole slide.
    cmap
        Colour map of numbers.
    alpha
        Opacity of the nuclei.
    panel_size
        Width of a panel in inches.
    ax
        Two axes to draw in: the H&E alone, and with nuclei.
    save
        File to write the figure to.

    Returns
    -------
    The figure.

    Raises
    ------
    MissingKeyError
        If there is no such table, gene or column.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=20)
    >>> hx.pp.segment_nuclei(sdata, progress_bar=False)
    >>> figure = hx.pl.nuclei(sdata, "area_um2", table_key="nuclei_features", crop_um=200)
    """
    import matplotlib.pyplot as plt
    import shapely
    from matplotlib.collections import PolyCollection

    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the nuclei")
    name = table_key or _nuclei_table(sdata, key)
    table = resolve_table(sdata, table_key=name)
    values, label = _colour_of(sdata, name, key, color)
    shapes_key = table.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=shapes_key))
    rows, positions = row_positions(sdata, table, shapes_key)
    outlines = shape_geometries(sdata, shapes_key, slide).to_numpy()[positions]
    centres = shape_centres(sdata, shapes_key, slide)[positions] * slide.mpp
    values = values[rows]
    window = _nuclei_window(slide, centres, centre_um, crop_um)
    inside = (
        (centres[:, 0] >= window.left)
        & (centres[:, 0] < window.left + window.width)
        & (centres[:, 1] >= window.top)
        & (centres[:, 1] < window.top + window.height)
    )
    if not inside.any():
        raise DataValueError(
            f"no nucleus lies in the window around {centre_um} of {crop_um} µm; move it with centre_um="
        )
    if ax is None:
        figure, grid = plt.subplots(
            1, 2, squeeze=False, layout="constrained", figsize=(2 * panel_size + 0.8, panel_size)
        )
        axes = list(grid.ravel())
    else:
        axes = axes_array(ax, 2)
        figure = figure_of(axes[0])
    picture = picture_of(slide, window)
    for panel in axes:
        panel.imshow(picture, extent=window.extent)
    colours, legend, norm = _colours(values[inside], cmap)
    if int(inside.sum()) <= _MAX_OUTLINES:
        rings = [shapely.get_coordinates(_exterior(each)) * slide.mpp for each in outlines[inside]]
        axes[1].add_collection(PolyCollection(rings, facecolors=colours, edgecolors="none", alpha=alpha))
    else:
        axes[1].scatter(*centres[inside].T, c=colours, s=1, alpha=alpha, linewidths=0)
    for panel in axes:
        show_window(panel, window)
        panel.set_aspect("equal")
        panel.set_xlabel("x (µm)", fontsize=8)
        panel.set_ylabel("y (µm)", fontsize=8)
        panel.tick_params(labelsize=7)
    axes[0].set_title("H&E", fontsize=9)
    axes[1].set_title(f"{color}, {int(inside.sum())} nuclei", fontsize=9)
    if norm is not None:
        colour_bar(figure, axes[1], norm, cmap, label)
    else:
        handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in legend.items()]
        axes[1].legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, save)
    return figure


def _nuclei_window(
    slide: Slide, centres: np.ndarray, centre_um: tuple[float, float] | None, crop_um: float | None
) -> Window:
    height, width = (size * slide.mpp for size in slide.shape)
    if crop_um is None:
        return Window(0.0, 0.0, width, height)
    if not crop_um > 0:
        raise DataValueError(f"crop_um={crop_um!r} must be positive, or None for the whole slide")
    if centre_um is None:
        bins = np.floor(centres / crop_um).astype(np.int64)
        cells, counts = np.unique(bins, axis=0, return_counts=True)
        centre_um = tuple(((cells[int(np.argmax(counts))] + 0.5) * crop_um).tolist())
    return Window(centre_um[0] - crop_um / 2, centre_um[1] - crop_um / 2, crop_um, crop_um)


def _nuclei_table(sdata: SpatialData, key: str | None) -> str:
    """The table with a prediction at nuclei."""
    found = [
        name
        for name, adata in sdata.tables.items()
        for own, entry in adata.uns.get(Keys.NAMESPACE, {}).items()
        if isinstance(entry, dict) and entry.get("parts") == Keys.NUCLEI and key in (None, own)
    ]
    if not found:
        raise MissingKeyError(
            f"no table holds a prediction at nuclei (tables: {list(sdata.tables)}); make one with a model of level 'nucleus', "
            "or name a table with table_key="
        )
    if len(found) > 1:
        raise AmbiguousKeyError(f"several tables hold predictions at nuclei {found}; name one with table_key=")
    return found[0]


def _colour_of(sdata: SpatialData, table_key: str, key: str | None, color: str) -> tuple[np.ndarray, str]:
    """Values of the rows of a table by name of a gene, feature or column, and what to write beside the scale."""
    adata = sdata.tables[table_key]
    if color in adata.obs:
        column = adata.obs[color]
        return (column.astype(str).to_numpy() if column.dtype == "category" else column.to_numpy()), color
    try:
        _, _, key = find_prediction(sdata, key, table_key)
        stored = read_prediction(adata, key)
    except MissingKeyError:
        stored = None
    if stored is None and color in adata.var_names:
        values = adata[:, color].X
        return np.asarray(values.todense() if hasattr(values, "todense") else values).ravel(), color
    if stored is None or color not in set(stored.genes):
        raise MissingKeyError(
            f"color={color!r} is neither a column of obs of table {table_key!r} ({list(adata.obs)}) nor a predicted gene"
        )
    return stored.values[:, list(stored.genes).index(color)], UNIT_LABELS.get(stored.unit, stored.unit)


def _colours(values: np.ndarray, cmap: str | Colormap) -> tuple[np.ndarray, dict[str, tuple], Normalize | None]:
    """A colour for each nucleus, and a legend (of categories) or a scale (of numbers)."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba

    if values.dtype.kind in "OUSb":
        names = sorted(set(map(str, values)), key=lambda name: (not name.isdigit(), len(name) * name.isdigit(), name))
        many = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
        palette = _ON_TISSUE if len(names) <= len(_ON_TISSUE) else many
        legend = {name: to_rgba(palette[index % len(palette)]) for index, name in enumerate(names)}
        return np.array([legend[str(value)] for value in values]), legend, None
    numbers = values.astype(np.float64)
    norm = robust_norm(numbers)
    return plt.get_cmap(cmap)(norm(numbers)), {}, norm


def _exterior(geometry: object) -> object:
    """Outer ring of a polygon, or of the largest one of several."""
    import shapely

    parts = shapely.get_parts(geometry)
    return shapely.get_exterior_ring(parts[int(np.argmax(shapely.area(parts)))])
