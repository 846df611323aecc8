"""Maps below the spot: superpixels beside spots and the H&E, and nuclei on the H&E."""

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
from ._common import PALETTE, UNIT_LABELS, axes_array, figure_of, save_figure
from ._spatial import ROBUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["nuclei", "superresolution"]

_CROP_UM = 400.0
_PANEL_PX = 800  # finest pixels of the H&E that a panel shows
_ON_TISSUE = (*(colour for colour in PALETTE if colour != "#CC79A7"), "#000000")  # pink is lost on eosin
_MAX_OUTLINES = 50_000  # more nuclei in a window are drawn as points


@dataclass(frozen=True)
class _Window:
    """A part of the slide in µm."""

    left: float
    top: float
    width: float
    height: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return self.left, self.left + self.width, self.top + self.height, self.top


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
    crop_um: float = _CROP_UM,
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
    whole = _Window(
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
    picture = _picture(slide, window)
    for index, (gene, row) in enumerate(zip(names, axes, strict=True)):
        panels = list(row)
        norm = _norm(values[index])
        if spots is not None:
            panel = panels.pop(0)
            shown = spots.values[:, index]
            if stored.unit == "counts":
                spots_norm = _norm(shown)
            else:
                norm = spots_norm = _joint(norm, _norm(shown)) if np.isfinite(shown).any() else norm
            _draw_spots(panel, spots, shown, spots_norm, cmap)
            _show(panel, overview)
            _frame(panel, window)
            panel.set_title(f"{gene}, measured at {len(shown)} spots", fontsize=9)
            _bar(figure, panel, spots_norm, cmap, label)
        panels[0].imshow(values[index], extent=whole.extent, norm=norm, cmap=cmap, interpolation="nearest")
        _show(panels[0], overview)
        _frame(panels[0], window)
        panels[0].set_title(f"{gene}, {key} at {size:g} µm", fontsize=9)
        _bar(figure, panels[0], norm, cmap, f"{label} per superpixel" if stored.unit == "counts" else label)
        panels[1].imshow(picture, extent=window.extent)
        panels[1].set_title(f"H&E, {window.width:g} µm", fontsize=9)
        panels[2].imshow(values[index], extent=whole.extent, norm=norm, cmap=cmap, interpolation="nearest")
        _show(panels[2], window)
        panels[2].set_title(f"{gene}, close up", fontsize=9)
        for panel in row:
            panel.set_aspect("equal")
            panel.set_xlabel("x (µm)", fontsize=8)
            panel.set_ylabel("y (µm)", fontsize=8)
            panel.tick_params(labelsize=7)
    save_figure(figure, save)
    return figure


def nuclei(
    sdata: SpatialData,
    color: str,
    key: str | None = None,
    *,
    table_key: str | None = None,
    image_key: str | None = None,
    centre_um: tuple[float, float] | None = None,
    crop_um: float | None = _CROP_UM,
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
    picture = _picture(slide, window)
    for panel in axes:
        panel.imshow(picture, extent=window.extent)
    colours, legend, norm = _colours(values[inside], cmap)
    if int(inside.sum()) <= _MAX_OUTLINES:
        rings = [shapely.get_coordinates(_exterior(each)) * slide.mpp for each in outlines[inside]]
        axes[1].add_collection(PolyCollection(rings, facecolors=colours, edgecolors="none", alpha=alpha))
    else:
        axes[1].scatter(*centres[inside].T, c=colours, s=1, alpha=alpha, linewidths=0)
    for panel in axes:
        _show(panel, window)
        panel.set_aspect("equal")
        panel.set_xlabel("x (µm)", fontsize=8)
        panel.set_ylabel("y (µm)", fontsize=8)
        panel.tick_params(labelsize=7)
    axes[0].set_title("H&E", fontsize=9)
    axes[1].set_title(f"{color}, {int(inside.sum())} nuclei", fontsize=9)
    if norm is not None:
        _bar(figure, axes[1], norm, cmap, label)
    else:
        handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in legend.items()]
        axes[1].legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
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


def _around(whole: _Window, spots: _Spots) -> _Window:
    """The part of the slide that holds all superpixels and all spots."""
    radius = spots.diameter / 2
    left, top = np.minimum(spots.centres.min(axis=0) - radius, (whole.left, whole.top)).tolist()
    far = (whole.left + whole.width, whole.top + whole.height)
    right, bottom = np.maximum(spots.centres.max(axis=0) + radius, far).tolist()
    return _Window(left, top, right - left, bottom - top)


def _show(ax: Axes, window: _Window) -> None:
    """Show a part of the slide, y downwards."""
    ax.set_xlim(window.left, window.left + window.width)
    ax.set_ylim(window.top + window.height, window.top)


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
    values: np.ndarray, whole: _Window, size: float, centre_um: tuple[float, float] | None, crop_um: float
) -> _Window:
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
    return _Window(left, top, side, side)


def _nuclei_window(
    slide: Slide, centres: np.ndarray, centre_um: tuple[float, float] | None, crop_um: float | None
) -> _Window:
    height, width = (size * slide.mpp for size in slide.shape)
    if crop_um is None:
        return _Window(0.0, 0.0, width, height)
    if not crop_um > 0:
        raise DataValueError(f"crop_um={crop_um!r} must be positive, or None for the whole slide")
    if centre_um is None:
        bins = np.floor(centres / crop_um).astype(np.int64)
        cells, counts = np.unique(bins, axis=0, return_counts=True)
        centre_um = tuple(((cells[int(np.argmax(counts))] + 0.5) * crop_um).tolist())
    return _Window(centre_um[0] - crop_um / 2, centre_um[1] - crop_um / 2, crop_um, crop_um)


def _picture(slide: Slide, window: _Window) -> np.ndarray:
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


def _frame(ax: Axes, window: _Window) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(
        Rectangle(
            (window.left, window.top), window.width, window.height, fill=False, edgecolor="#D55E00", linewidth=1.2
        )
    )


def _norm(values: np.ndarray) -> Normalize:
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    low, high = np.percentile(known, ROBUST) if len(known) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1.0)


def _joint(one: Normalize, other: Normalize) -> Normalize:
    """A scale that spans two."""
    return type(one)(min(one.vmin, other.vmin), max(one.vmax, other.vmax))  # type: ignore[type-var]


def _bar(figure: Figure, ax: Axes, norm: Normalize, cmap: str | Colormap, label: str) -> None:
    import matplotlib.pyplot as plt

    bar = figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, shrink=0.7, aspect=25)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


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
    norm = _norm(numbers)
    return plt.get_cmap(cmap)(norm(numbers)), {}, norm


def _exterior(geometry: object) -> object:
    """Outer ring of a polygon, or of the largest one of several."""
    import shapely

    parts = shapely.get_parts(geometry)
    return shapely.get_exterior_ring(parts[int(np.argmax(shapely.area(parts)))])
