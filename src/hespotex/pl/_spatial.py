"""Maps of genes, measured above predicted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from ..data.geometry import slide_element, slide_images
from ..data.wsi import has_reader
from ..errors import AmbiguousKeyError, DataValueError, MissingKeyError
from ._common import (
    axes_array,
    column,
    column_count,
    figure_of,
    is_measured,
    predicted_genes,
    save_figure,
    stored_score,
    title_list,
    unit_label,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["spatial"]

ROBUST = (1.0, 99.0)  # percentiles that span the colour scale, so that one outlier does not flatten a map
MARGIN = 0.04  # around the spots, as a share of their extent
CROP_MARGIN = 0.02  # of the image beyond what is seen, so that the border of no coarse pixel shows


def spatial(
    data: SpatialData | AnnData,
    genes: str | Sequence[str],
    key: str | None = None,
    *,
    table_key: str | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    spatial_key: str = Keys.SPATIAL,
    measured: bool | None = None,
    shared_scale: bool = True,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float = 1.0,
    size: float = 0.8,
    ncols: int = 4,
    panel_size: float = 3.2,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw genes as maps, measured above predicted, on the H&E.

    A SpatialData is drawn by spatialdata-plot: image, then spots or tiles, cropped to these. An AnnData is drawn as circles at
    ``obsm["spatial"]``. Measured and predicted of a gene share one colour scale. The score of
    :func:`hespotex.tl.evaluate` and its protocol are shown in the title if stored.

    Parameters
    ----------
    data
        Object with a prediction of :func:`hespotex.tl.predict`.
    genes
        Predicted genes.
    key
        Key of the prediction; may be omitted when there is only one.
    table_key
        Table that holds it; all are searched by default.
    image_key
        Image to draw on; may be omitted when there is at most one.
    coordinate_system
        Coordinate system of the axes; ``"microns"`` where shapes have it, else the only one.
    spatial_key
        ``obsm`` key of the positions of an AnnData.
    measured
        Whether to draw the measurement; by default where one of the genes has one.
    shared_scale
        Whether measured and predicted share the colour scale.
    cmap
        Colour map.
    vmin, vmax
        Ends of the colour scale; the 1st and 99th percentile of what is drawn by default.
    alpha
        Opacity of spots.
    size
        Factor on the radius of spots; below 1 more of the image is seen between them.
    ncols
        Genes per row.
    panel_size
        Width of a panel in inches; its height follows from what is drawn.
    title
        Titles of the genes; their names by default.
    ax
        Axes to draw in: one per panel, all measured panels of a row before the predicted ones below them.
    save
        File to write the figure to.

    Returns
    -------
    The figure.

    Raises
    ------
    MissingKeyError
        If the prediction, a gene or the positions are not there.
    DataValueError
        If ``measured=True`` but none of the genes was measured, or the number of axes is wrong.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800, pitch_um=40, diameter_um=40, n_genes=20, seed=0)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", genes=sdata["table"].var_names))
    >>> figure = hx.pl.spatial(sdata, ["TUMOUR1", "T_CELL1"])
    """
    import matplotlib.pyplot as plt
    from anndata import AnnData

    pred, names = predicted_genes(data, genes, key, table_key)
    rows = _rows(pred, names, show_measured=measured)
    titles = title_list(title, names)
    canvas = (
        _Scatter(pred, spatial_key, size=size, alpha=alpha)
        if isinstance(data, AnnData)
        else _Rendered.of(data, pred, image_key, coordinate_system, size=size, alpha=alpha)
    )

    columns = column_count(ncols, len(names))
    bands = -(-len(names) // columns)
    if ax is None:
        figure, grid = plt.subplots(
            bands * len(rows),
            columns,
            squeeze=False,
            layout="constrained",
            figsize=(columns * (panel_size + 0.6), bands * len(rows) * (panel_size * canvas.limits.shape + 0.7)),
        )
    else:
        grid = np.array(axes_array(ax, bands * len(rows) * columns), dtype=object).reshape(-1, columns)
        figure = figure_of(grid[0, 0])
    for axes in grid.ravel():
        axes.set_axis_off()  # panels that stay empty; drawing turns the others on again
    for index, (gene, label) in enumerate(zip(names, titles, strict=True)):
        band, position = divmod(index, columns)
        panels = [grid[band * len(rows) + row, position] for row in range(len(rows))]
        if len(rows) == 2 and not is_measured(pred, gene):
            panels[0].set_title(f"{label}, not measured", fontsize=9)
            drawn, panels = rows[1:], panels[1:]
        else:
            drawn = rows
        values = [column(pred, gene, layer) for _, layer in drawn]
        norms = _norms(values, shared_scale=shared_scale, vmin=vmin, vmax=vmax)
        for panel, norm, (word, layer) in zip(panels, norms, drawn, strict=True):
            canvas.draw(panel, gene, layer, norm, cmap)
            score = stored_score(pred, gene) if layer is None else ""
            panel.set_title(f"{label}, {word}" + (f"\n{score}" if score else ""), fontsize=9)
        groups = [(panels, values)] if shared_scale else [([p], [v]) for p, v in zip(panels, values, strict=True)]
        for (group, shown), norm in zip(groups, norms, strict=False):  # a shared scale is the first of equal ones
            bar = figure.colorbar(
                plt.cm.ScalarMappable(norm, cmap),
                ax=group,
                shrink=0.7,
                aspect=30 // len(group) + 8,
                extend=_beyond(np.concatenate(shown), norm),
            )
            bar.set_label(unit_label(pred), fontsize=8)
            bar.ax.tick_params(labelsize=7)
    save_figure(figure, save)
    return figure


def _rows(pred: AnnData, names: Sequence[str], *, show_measured: bool | None) -> list[tuple[str, str | None]]:
    """Word and layer of each row of panels."""
    there = any(is_measured(pred, gene) for gene in names)
    if show_measured and not there:
        raise DataValueError(
            f"measured=True, but the object holds no measurement of {', '.join(names)}; leave measured= out"
        )
    show = there if show_measured is None else show_measured
    return [*([("measured", Keys.MEASURED)] if show else []), ("predicted", None)]


def _norms(values: list[np.ndarray], *, shared_scale: bool, vmin: float | None, vmax: float | None) -> list[Normalize]:
    """Colour scales of the panels of one gene."""
    from matplotlib.colors import Normalize

    groups = [np.concatenate(values)] * len(values) if shared_scale else values
    norms = []
    for group in groups:
        low, high = np.nanpercentile(group, ROBUST)
        low, high = low if vmin is None else vmin, high if vmax is None else vmax
        norms.append(Normalize(low, high if high > low else low + 1.0))  # a constant map gets the low end's colour
    return norms


def _beyond(values: np.ndarray, norm: Normalize) -> Literal["neither", "both", "min", "max"]:
    """At which ends of the colour scale values are cut off."""
    below, above = bool(np.nanmin(values) < norm.vmin), bool(np.nanmax(values) > norm.vmax)
    return "both" if below and above else "min" if below else "max" if above else "neither"


def _finish(ax: Axes, unit: str = "") -> None:
    ax.set_axis_on()
    ax.set_aspect("equal")
    ax.set_xlabel(f"x ({unit})" if unit else "x", fontsize=8)
    ax.set_ylabel(f"y ({unit})" if unit else "y", fontsize=8)
    ax.tick_params(labelsize=7)


@dataclass(frozen=True, eq=False)
class _Scatter:
    """Circles at the positions of an AnnData."""

    pred: AnnData
    spatial_key: str
    size: float
    alpha: float

    def __post_init__(self) -> None:
        if self.spatial_key not in self.pred.obsm:
            raise MissingKeyError(
                f"spatial_key={self.spatial_key!r} is not in obsm, which holds {sorted(self.pred.obsm)}"
            )

    @cached_property
    def positions(self) -> np.ndarray:
        """Centres of the spots, (n, 2)."""
        return np.asarray(self.pred.obsm[self.spatial_key], dtype=float)

    @cached_property
    def diameter(self) -> float:
        """Of a spot, in units of the positions."""
        return 0.7 * self.size * _spacing(self.positions)

    @property
    def limits(self) -> _Limits:
        """The spots with a diameter around."""
        (left, top), (right, bottom) = self.positions.min(axis=0), self.positions.max(axis=0)
        room = self.diameter
        return _Limits(left - room, right + room, top - room, bottom + room)

    def draw(self, ax: Axes, gene: str, layer: str | None, norm: Normalize, cmap: str | Colormap) -> None:
        from matplotlib.collections import EllipseCollection

        xy = self.positions
        diameter = np.full(len(xy), self.diameter)
        spots = EllipseCollection(
            diameter, diameter, np.zeros(len(xy)), units="xy", offsets=xy, transOffset=ax.transData,
            array=column(self.pred, gene, layer), norm=norm, cmap=cmap, alpha=self.alpha, linewidths=0,
        )  # fmt: skip
        ax.add_collection(spots)
        ax.set_xlim(self.limits.left, self.limits.right)
        ax.set_ylim(self.limits.bottom, self.limits.top)  # y runs down, as in the image
        _finish(ax)  # nothing says in which unit these positions are


def _spacing(xy: np.ndarray) -> float:
    """Median distance of a spot to its nearest neighbour."""
    from scipy.spatial import KDTree

    if len(xy) < 2:
        return 1.0
    distances, _ = KDTree(xy).query(xy, k=2)
    return float(np.median(distances[:, 1])) or 1.0


@dataclass(frozen=True, eq=False)
class _Rendered:
    """Image and shapes drawn by spatialdata-plot."""

    sdata: SpatialData
    image: str | None
    shapes: str
    system: str
    limits: _Limits
    size: float
    alpha: float

    @classmethod
    def of(
        cls,
        sdata: SpatialData,
        pred: AnnData,
        image_key: str | None,
        coordinate_system: str | None,
        *,
        size: float,
        alpha: float,
    ) -> _Rendered:
        from spatialdata import SpatialData, get_extent
        from spatialdata.transformations import get_transformation

        image_key = _image_key(sdata, image_key)
        regions = np.atleast_1d(pred.uns["spatialdata_attrs"]["region"])
        if len(regions) != 1:
            raise AmbiguousKeyError(
                f"the prediction covers several regions {list(regions)}; draw one at a time, "
                "for instance after sdata.filter_by_coordinate_system"
            )
        shapes_key = str(regions[0])
        systems = set(get_transformation(sdata.shapes[shapes_key], get_all=True))
        if image_key is not None:
            systems &= set(get_transformation(slide_element(sdata, image_key), get_all=True))
        system = _system(systems, coordinate_system)
        extent = get_extent(sdata.shapes[shapes_key], coordinate_system=system)
        limits = _Limits(*extent["x"], *extent["y"]).grown(MARGIN)
        image = None
        if image_key is not None:
            whole = get_extent(slide_element(sdata, image_key), coordinate_system=system)
            image, limits = _cropped(slide_element(sdata, image_key), limits, _Limits(*whole["x"], *whole["y"]), system)
        parts = SpatialData(
            images={} if image is None else {str(image_key): image},
            shapes={shapes_key: sdata.shapes[shapes_key]},
            tables={Keys.TABLE: pred},
        )
        return cls(parts, None if image is None else image_key, shapes_key, system, limits, size, alpha)

    def draw(self, ax: Axes, gene: str, layer: str | None, norm: Normalize, cmap: str | Colormap) -> None:
        import spatialdata_plot  # noqa: F401  registers the accessor

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matplotlib, about how spatialdata-plot calls it
            plot = self.sdata
            if self.image is not None:
                plot = plot.pl.render_images(self.image)
            plot.pl.render_shapes(
                self.shapes,
                color=gene,
                table_name=Keys.TABLE,
                table_layer=layer,
                norm=norm,
                cmap=cmap,
                scale=self.size,
                fill_alpha=self.alpha,
                colorbar=False,
            ).pl.show(coordinate_systems=self.system, ax=ax, title="", colorbar=False, show=False)
        ax.set_xlim(self.limits.left, self.limits.right)
        ax.set_ylim(self.limits.bottom, self.limits.top)  # y runs down, as in the image
        _finish(ax, "µm" if self.system == Keys.MICRONS else "")


@dataclass(frozen=True)
class _Limits:
    """A part of the plane."""

    left: float
    right: float
    top: float
    bottom: float

    @property
    def shape(self) -> float:
        """Height over width, within what makes a panel."""
        return float(np.clip((self.bottom - self.top) / max(self.right - self.left, 1e-9), 0.3, 3.0))

    def grown(self, share: float) -> _Limits:
        """The same with more room on every side, as a share of the longer one."""
        room = share * max(self.right - self.left, self.bottom - self.top)
        return _Limits(self.left - room, self.right + room, self.top - room, self.bottom + room)

    def within(self, other: _Limits) -> _Limits:
        """What both share."""
        return _Limits(
            max(self.left, other.left),
            min(self.right, other.right),
            max(self.top, other.top),
            min(self.bottom, other.bottom),
        )


def _cropped(image: Any, limits: _Limits, whole: _Limits, system: str) -> tuple[Any, _Limits]:
    """The part of the image around the spots, still lazy, and what is to be seen of the plane.

    The map is of the spots, not of the bare glass around them; and spatialdata-plot draws an image in no more pixels than
    the figure has, so that of a whole slide few would be left for a small tissue.
    """
    from spatialdata import bounding_box_query

    shared = limits.within(whole)
    if shared.left >= shared.right or shared.top >= shared.bottom:
        return None, limits
    box = shared.grown(CROP_MARGIN)
    part = bounding_box_query(
        image,
        axes=("x", "y"),
        min_coordinate=[box.left, box.top],
        max_coordinate=[box.right, box.bottom],
        target_coordinate_system=system,
    )
    return part, shared


def _image_key(sdata: SpatialData, image_key: str | None) -> str | None:
    if image_key in (None, Keys.WSI) and has_reader(sdata):
        return Keys.WSI
    images = slide_images(sdata)
    if image_key is None:
        if len(images) > 1:
            raise AmbiguousKeyError(f"the object holds several images {images}; name one with image_key=")
        return images[0] if images else None
    if image_key not in sdata.images:
        raise MissingKeyError(f"image_key={image_key!r} is not among the images {list(sdata.images)}")
    return image_key


def _system(systems: set[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in systems:
            raise MissingKeyError(
                f"coordinate_system={asked!r} is not shared; image and shapes share {sorted(systems)}"
            )
        return asked
    if Keys.MICRONS in systems:
        return Keys.MICRONS
    if len(systems) == 1:
        return next(iter(systems))
    if not systems:
        raise MissingKeyError("image and shapes share no coordinate system")
    raise AmbiguousKeyError(f"image and shapes share {sorted(systems)}; name one with coordinate_system=")
