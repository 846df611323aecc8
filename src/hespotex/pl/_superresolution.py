"""Spots, the fine map and the H&E side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..data.counts import check_counts, counts_of, library_size
from ..data.geometry import (
    Slide,
    find_image_key,
    resolve_slide,
    shape_centres,
    shape_geometries,
)
from ..data.stored import find_prediction, read_prediction
from ..data.tables import resolve_table, row_positions
from ..data.units import normalize
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError
from ._common import UNIT_LABELS, axes_array, figure_of, save_figure
from ._window import CROP_UM, Window, colour_bar, frame, picture_of, robust_norm, show_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["superresolution"]


def superresolution(
    sdata: SpatialData,
    genes: str | Sequence[str],
    key: str | None = None,
    *,
    table_key: str | None = None,
    spots_table_key: str | None = None,
    image_key: str | None = None,
    counts_layer: str | None = None,
    centre_um: tuple[float, float] | None = None,
    crop_um: float = CROP_UM,
    cmap: str | Colormap = "viridis",
    panel_size: float = 3.2,
    ax: Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw genes at the spots that were measured, as fine maps, and close up beside the H&E.

    Each row shows one gene: the measured spots, the prediction at superpixels, the H&E of a small window, and the
    prediction there. A frame marks the window on the maps. Spots and superpixels share a colour scale, but for counts,
    of which a spot holds those of many superpixels.

    Parameters
    ----------
    sdata
        Object with a prediction at superpixels (:func:`hespotex.tl.predict`).
    genes
        Predicted genes.
    key
        Key of the prediction; may be left out where there is only one at superpixels.
    table_key
        Table that holds it; all are searched by default.
    spots_table_key
        Table of the spots; may be left out where there is one. Without a measurement the first panel is left out.
    image_key
        Image that they lie on; may be left out where there is only one.
    counts_layer
        Raw counts of the spots; ``X`` by default.
    centre_um
        Centre (x, y) of the window in µm of the image; by default where the first gene varies most.
    crop_um
        Side of the window in µm.
    cmap
        Colour map.
    panel_size
        Width of a panel in inches.
    ax
        Axes to draw in, row by row.
    save
        File to write the figure to.

    Returns
    -------
    The figure.

    Raises
    ------
    MissingKeyError
        If the prediction or a gene is not there.
    DataValueError
        If the prediction is not one of superpixels.
    CountsError
        If the table of the spots holds no raw counts.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, n_genes=20)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.tl.predict(sdata, "tesla")
    >>> figure = hx.pl.superresolution(sdata, "TUMOUR1", crop_um=150)
    """
    import matplotlib.pyplot as plt

    from ..get import raster

    names = [genes] if isinstance(genes, str) else list(genes)
    adata, name, key = _fine_prediction(sdata, key, table_key)
    stored = read_prediction(adata, key)
    _check_genes(names, stored.genes, key)
    table = resolve_table(sdata, table_key=name)
    shapes_key = table.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=shapes_key))
    image = raster(sdata, key, genes=names, table_key=name)
    grid = sdata.shapes[shapes_key]
    size = float(grid[Keys.SIZE_UM].iloc[0])
    whole = Window(
        float(grid[Keys.GRID_COL].min()) * size,
        float(grid[Keys.GRID_ROW].min()) * size,
        image.shape[2] * size,
        image.shape[1] * size,
    )
    spots = _spots(sdata, slide, names, stored.unit, spots_table_key, counts_layer)
    values = np.asarray(image.values)
    window = _window(values[0], whole, size, centre_um, crop_um)
    overview = whole if spots is None else _around(whole, spots)
    columns = 4 if spots is not None else 3
    if ax is None:
        height = panel_size * float(np.clip(overview.height / overview.width, 0.4, 2.5))
        figure, grid_axes = plt.subplots(
            len(names),
            columns,
            squeeze=False,
            layout="constrained",
            figsize=(columns * (panel_size + 0.5), len(names) * (height + 0.5)),
        )
        axes = grid_axes.reshape(len(names), columns)
    else:
        axes = np.array(axes_array(ax, len(names) * columns), dtype=object).reshape(len(names), columns)
        figure = figure_of(axes[0, 0])
    label = UNIT_LABELS.get(stored.unit, stored.unit)
    picture = picture_of(slide, window)
    for index, (gene, row) in enumerate(zip(names, axes, strict=True)):
        panels = list(row)
        norm = robust_norm(values[index])
        if spots is not None:
            panel = panels.pop(0)
            shown = spots.values[:, index]
            if stored.unit == "counts":
                spots_norm = robust_norm(shown)
            else:
                norm = spots_norm = _joint(norm, robust_norm(shown)) if np.isfinite(shown).any() else norm
            _draw_spots(panel, spots, shown, spots_norm, cmap)
            show_window(panel, overview)
            frame(panel, window)
            panel.set_title(f"{gene}, measured at {len(shown)} spots", fontsize=9)
            colour_bar(figure, panel, spots_norm, cmap, label)
        panels[0].imshow(values[index], extent=whole.extent, norm=norm, cmap=cmap, interpolation="nearest")
        show_window(panels[0], overview)
        frame(panels[0], window)
        panels[0].set_title(f"{gene}, {key} at {size:g} µm", fontsize=9)
        colour_bar(figure, panels[0], norm, cmap, f"{label} per superpixel" if stored.unit == "counts" else label)
        panels[1].imshow(picture, extent=window.extent)
        panels[1].set_title(f"H&E, {window.width:g} µm", fontsize=9)
        panels[2].imshow(values[index], extent=whole.extent, norm=norm, cmap=cmap, interpolation="nearest")
        show_window(panels[2], window)
        panels[2].set_title(f"{gene}, close up", fontsize=9)
        for panel in row:
            panel.set_aspect("equal")
            panel.set_xlabel("x (µm)", fontsize=8)
            panel.set_ylabel("y (µm)", fontsize=8)
            panel.tick_params(labelsize=7)
    save_figure(figure, save)
    return figure


@dataclass(frozen=True, eq=False)
class _Spots:
    """Measured spots: centres and radii in µm of the image, values (n, G)."""

    centres: np.ndarray
    diameter: float
    values: np.ndarray


def _fine_prediction(sdata: SpatialData, key: str | None, table_key: str | None) -> tuple:
    """The one prediction at superpixels that is meant."""
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}: it holds the superpixels")
    if table_key is None:
        grids = {name for name, shapes in sdata.shapes.items() if Keys.GRID_ROW in shapes and Keys.SIZE_UM in shapes}
        fine = [
            name
            for name, adata in sdata.tables.items()
            if "spatialdata_attrs" in adata.uns
            and str(np.atleast_1d(adata.uns["spatialdata_attrs"]["region"])[0]) in grids
            and any(
                isinstance(entry, dict) and entry.get("kind") == "prediction" and key in (None, own)
                for own, entry in adata.uns.get(Keys.NAMESPACE, {}).items()
            )
        ]
        if not fine:
            raise MissingKeyError(
                f"key={key!r}: no prediction at superpixels (tables: {list(sdata.tables)}); make one with "
                "hx.tl.predict(sdata, model) and a model of level 'superpixel'"
            )
        if len(fine) > 1:
            raise AmbiguousKeyError(f"several tables hold predictions at superpixels {fine}; name one with table_key=")
        table_key = fine[0]
    return find_prediction(sdata, key, table_key)


def _check_genes(names: Sequence[str], known: np.ndarray, key: str) -> None:
    if not len(names):
        raise DataValueError("genes is empty: name at least one predicted gene")
    if missing := [name for name in names if name not in set(known)]:
        raise MissingKeyError(
            f"genes={missing} are not predicted by {key!r}; it has {', '.join(map(str, known[:8]))}, …"
        )


def _spots(
    sdata: SpatialData,
    slide: Slide,
    genes: Sequence[str],
    unit: str,
    table_key: str | None,
    counts_layer: str | None,
) -> _Spots | None:
    """The measured spots in the unit of the prediction; ``None`` where nothing was measured."""
    try:
        table = resolve_table(sdata, table_key=table_key)
    except MissingKeyError:
        if table_key is not None:
            raise
        return None
    columns = table.adata.var_names.get_indexer(list(genes))
    if table.adata.X is None or (columns < 0).all():
        return None
    regions = list(table.regions)
    if len(regions) > 1:  # of several slides
        regions = [own for own in regions if find_image_key(sdata, None, shapes_key=own) == slide.key]
    if not regions:
        return None
    shapes_key = regions[0]
    rows, positions = row_positions(sdata, table, shapes_key)
    counts = counts_of(table.adata, counts_layer, f"table {table.key!r}")
    check_counts(counts, f"table {table.key!r}")
    values = np.full((len(rows), len(genes)), np.nan, dtype=np.float32)
    values[:, columns >= 0] = normalize(counts[:, columns[columns >= 0]], library_size(counts), unit)[rows]
    outlines = shape_geometries(sdata, shapes_key, slide).iloc[positions]
    diameter = float(np.median(np.sqrt(outlines.area / np.pi)) * 2 * slide.mpp)
    return _Spots(shape_centres(sdata, shapes_key, slide)[positions] * slide.mpp, diameter, values)


def _around(whole: Window, spots: _Spots) -> Window:
    """The part of the slide that holds all superpixels and all spots."""
    radius = spots.diameter / 2
    left, top = np.minimum(spots.centres.min(axis=0) - radius, (whole.left, whole.top)).tolist()
    far = (whole.left + whole.width, whole.top + whole.height)
    right, bottom = np.maximum(spots.centres.max(axis=0) + radius, far).tolist()
    return Window(left, top, right - left, bottom - top)


def _draw_spots(ax: Axes, spots: _Spots, values: np.ndarray, norm: Normalize, cmap: str | Colormap) -> None:
    from matplotlib.collections import EllipseCollection

    size = np.full(len(values), spots.diameter)
    ax.add_collection(
        EllipseCollection(
            size,
            size,
            np.zeros(len(values)),
            units="xy",
            offsets=spots.centres,
            transOffset=ax.transData,
            array=values,
            norm=norm,
            cmap=cmap,
            linewidths=0,
        )
    )


def _window(
    values: np.ndarray, whole: Window, size: float, centre_um: tuple[float, float] | None, crop_um: float
) -> Window:
    """The window asked for, or the one in which the map varies most."""
    if not crop_um > 0:
        raise DataValueError(f"crop_um={crop_um!r} must be positive")
    side = min(crop_um, max(whole.width, whole.height))
    if centre_um is None:
        from scipy.ndimage import uniform_filter

        known = np.isfinite(values)
        filled = np.where(known, values, 0.0).astype(np.float64)
        cells = max(int(side / size), 1)
        share = uniform_filter(known.astype(np.float64), cells, mode="constant")
        mean, square = (uniform_filter(filled**power, cells, mode="constant") for power in (1, 2))
        spread = np.where(share > 0.5, square / np.maximum(share, 1e-9) - (mean / np.maximum(share, 1e-9)) ** 2, -1.0)
        row, column = np.unravel_index(int(np.argmax(spread)), spread.shape)
        centre_um = whole.left + (column + 0.5) * size, whole.top + (row + 0.5) * size
    left = float(np.clip(centre_um[0] - side / 2, whole.left, max(whole.left + whole.width - side, whole.left)))
    top = float(np.clip(centre_um[1] - side / 2, whole.top, max(whole.top + whole.height - side, whole.top)))
    return Window(left, top, side, side)


def _joint(one: Normalize, other: Normalize) -> Normalize:
    """A scale that spans two."""
    return type(one)(min(one.vmin, other.vmin), max(one.vmax, other.vmax))  # type: ignore[type-var]
