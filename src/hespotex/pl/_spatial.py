"""Maps of genes, measured above predicted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from ..errors import AmbiguousKeyError, DataValueError, MissingKeyError
from ._common import axes_array, column, gene_list, is_measured, save_figure, stored_score, unit_label

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

__all__ = ["spatial"]

ROBUST = (1.0, 99.0)  # percentiles that span the colour scale, so that one outlier does not flatten a map


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
    size: float = 1.0,
    ncols: int = 4,
    panel_size: float = 3.2,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw genes as maps, measured above predicted, on the H&E.

    A SpatialData is drawn by spatialdata-plot: image, then spots or tiles. An AnnData is drawn as circles at
    ``obsm["spatial"]``. Measured and predicted of a gene share one colour scale. The score of
    :func:`hespotex.tl.evaluate` and its protocol stand in the title where they are stored.

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
        Factor on the radius of spots.
    ncols
        Genes per row.
    panel_size
        Side of a panel in inches.
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
    >>> sdata = hx.datasets.synthetic(n_spots=60, size_px=1200)
    >>> hx.pp.embed(sdata, "morphology", progress_bar=False)
    >>> hx.tl.predict(sdata, hx.tl.train(sdata, "ridge", n_top_genes=20))
    >>> gene = hx.get.prediction(sdata).var_names[0]
    >>> figure = hx.pl.spatial(sdata, gene)
    """
    import matplotlib.pyplot as plt
    from anndata import AnnData

    from ..get import prediction

    pred = prediction(data, key, table_key=table_key)
    names = gene_list(genes, pred)
    rows = _rows(pred, names, show_measured=measured)
    titles = [title] if isinstance(title, str) else list(title) if title is not None else names
    if len(titles) != len(names):
        raise DataValueError(f"title has {len(titles)} entries for {len(names)} genes")
    canvas = (
        _Scatter(pred, spatial_key, size=size, alpha=alpha)
        if isinstance(data, AnnData)
        else _Rendered.of(data, pred, image_key, coordinate_system, size=size, alpha=alpha)
    )

    columns = min(ncols, len(names))
    bands = -(-len(names) // columns)
    if ax is None:
        figure, grid = plt.subplots(
            bands * len(rows),
            columns,
            squeeze=False,
            layout="constrained",
            figsize=(columns * (panel_size + 0.6), bands * len(rows) * panel_size),
        )
    else:
        grid = np.array(axes_array(ax, bands * len(rows) * columns), dtype=object).reshape(-1, columns)
        figure = grid[0, 0].figure
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
        for group, norm in (
            [(panels, norms[0])] if shared_scale else [([p], n) for p, n in zip(panels, norms, strict=True)]
        ):
            bar = figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=group, shrink=0.7, aspect=30 // len(group) + 8)
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


def _finish(ax: Axes, unit: str) -> None:
    ax.set_axis_on()
    ax.set_aspect("equal")
    ax.set_xlabel(f"x ({unit})", fontsize=8)
    ax.set_ylabel(f"y ({unit})", fontsize=8)
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

    def draw(self, ax: Axes, gene: str, layer: str | None, norm: Normalize, cmap: str | Colormap) -> None:
        from matplotlib.collections import EllipseCollection

        xy = np.asarray(self.pred.obsm[self.spatial_key], dtype=float)
        diameter = np.full(len(xy), 0.7 * self.size * _spacing(xy))
        spots = EllipseCollection(
            diameter, diameter, np.zeros(len(xy)), units="xy", offsets=xy, transOffset=ax.transData,
            array=column(self.pred, gene, layer), norm=norm, cmap=cmap, alpha=self.alpha, linewidths=0,
        )  # fmt: skip
        ax.add_collection(spots)
        margin = diameter[0]
        ax.set_xlim(xy[:, 0].min() - margin, xy[:, 0].max() + margin)
        ax.set_ylim(xy[:, 1].max() + margin, xy[:, 1].min() - margin)  # y runs down, as in the image
        _finish(ax, "px")


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
        from spatialdata import SpatialData
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
            systems &= set(get_transformation(sdata.images[image_key], get_all=True))
        system = _system(systems, coordinate_system)
        parts = SpatialData(
            images={} if image_key is None else {image_key: sdata.images[image_key]},
            shapes={shapes_key: sdata.shapes[shapes_key]},
            tables={Keys.TABLE: pred},
        )
        return cls(parts, image_key, shapes_key, system, size, alpha)

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
        _finish(ax, "µm" if self.system == Keys.MICRONS else "px")


def _image_key(sdata: SpatialData, image_key: str | None) -> str | None:
    images = list(sdata.images)
    if image_key is None:
        if len(images) > 1:
            raise AmbiguousKeyError(f"the object holds several images {images}; name one with image_key=")
        return images[0] if images else None
    if image_key not in images:
        raise MissingKeyError(f"image_key={image_key!r} is not among the images {images}")
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
