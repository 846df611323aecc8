"""Nuclei of a slide: outlines, label image, shapes and how many lie in each spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.geometry import (
    Slide,
    check_on_image,
    image_transformations,
    pixel_maps,
    resolve_slide,
    shape_centres,
    shape_geometries,
    shape_radius,
)
from ..data.provenance import read_record, record
from ..data.tables import AnnotatedTable, mark_table, resolve_shapes_key, resolve_table, row_positions
from ..data.transaction import restored_on_error
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    MissingKeyError,
    ScaleError,
)
from ..segmentation._appearance import estimate_appearance
from ..segmentation._outline import FEATURES
from ..segmentation._sample import sample_tissue
from ..segmentation._tiled import Backend, Nuclei, rasterise, segment_slide
from ..segmentation.cellpose import CellposeSegmenter
from ..segmentation.counts import count_in_circles, count_in_polygons, count_in_window
from ..segmentation.labels import check_labels, load_labels
from ..segmentation.watershed import DIAMETER_UM, Watershed
from ._free import check_elements_free, check_slot_free

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["segment_nuclei"]

WORKING_MPP = 0.5  # finer pixels cost time and find no more nuclei
MIN_DIAMETER_PX = 5.0  # fewer pixels across, and neighbours blur into one
CALLABLE_HALO_DIAMETERS = 8.0
LABELS_HALO_DIAMETERS = 8.0
METHODS = ("watershed", "cellpose")

Method = Literal["watershed", "cellpose"] | Callable[[np.ndarray], np.ndarray] | np.ndarray | str | os.PathLike[str]


def segment_nuclei(
    sdata: SpatialData,
    method: Method = "watershed",
    *,
    image_key: str | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    diameter_um: float = DIAMETER_UM,
    mpp: float | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    n_jobs: int | None = None,
    raster: bool = True,
    key_added: str = Keys.NUCLEI,
    copy: bool = False,
    progress_bar: bool | None = None,
) -> GeoDataFrame | None:
    """Outline all nuclei of a slide, describe them, and count them per spot.

    The slide is worked on in overlapping blocks; no nucleus is cut or found twice at a seam, and the result does not
    depend on the blocks.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale.
    method
        ``"watershed"`` needs no weights: the best regions of a component tree of the nuclear stain, grown by watershed.
        ``"cellpose"`` is Cellpose 4. A function of an RGB image (h, w, 3) uint8 that returns its label image. Or nuclei
        that are outlined already: the name of a label image in ``sdata.labels``, an array, or the path of a ``.npy``
        file, of the size of the image or of one of its levels.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    shapes_key
        Spots to count nuclei in; by default those that the one table annotates. Without a table nothing is counted.
    table_key
        Their table; may be left out where there is only one.
    diameter_um
        Diameter of a typical nucleus in µm.
    mpp
        Working resolution in µm per pixel; by default 0.5, or the image's own if that is coarser. Label images keep
        theirs.
    model
        Path of Cellpose's weights; by default where Cellpose keeps them. Nothing is downloaded.
    device
        Of Cellpose; the setting by default.
    n_jobs
        Threads; the setting by default. One for Cellpose and for functions.
    raster
        Whether to write the label image, too. Without it, nuclei in the patch window are not counted.
    key_added
        Name of the outlines; those of the label image and of the table are derived from it.
    copy
        Return the outlines in place of writing anything.
    progress_bar
        The setting by default.

    Returns
    -------
    The outlines if `copy`, else ``None`` and these are written:

    ``shapes["nuclei"]``
        Polygons in level-0 pixels with their ``nucleus_id``. They carry the image's transformations.
    ``labels["nuclei_labels"]``
        Label image of the ids at the working resolution, compressed in memory.
    ``tables["nuclei_features"]``
        A row per nucleus: area, perimeter and axes in µm, eccentricity, circularity, solidity, mean and standard
        deviation of haematoxylin. ``obsm["spatial"]`` holds centroids in level-0 pixels.
    ``obs["n_nuclei"]`` of the spots' table
        Nuclei whose centroid lies in the spot.
    ``obs["n_nuclei_window"]``
        Distinct labels in the square patch of the spot, the background included, as HESpotEx counts.
    ``uns["hespotex"]["n_nuclei"]``
        Parameters and versions.

    Raises
    ------
    ScaleError
        If the image's scale is unknown, or too coarse for nuclei of this size.
    MissingKeyError
        If `method` names neither a method nor labels nor a file.
    MissingWeightsError
        If Cellpose's weights are not there.
    DataTypeError, DataValueError
        If labels are not whole numbers, or negative, or have another size than the image; if no nucleus is found; if
        `key_added` or a column of counts is taken by something that this function did not make.

    Warns
    -----
    HespotexWarning
        If nuclei are so large that a block's surroundings cut them.

    Examples
    --------
    >>> import hespotex as hx
    >>> hx.pp.segment_nuclei(sdata)  # doctest: +SKIP
    >>> hx.pp.segment_nuclei(sdata, "nuclei.npy")  # doctest: +SKIP
    """
    if not np.isfinite(diameter_um) or diameter_um <= 0:
        raise DataValueError(f"diameter_um={diameter_um!r} must be a positive number of µm")
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise DataValueError(f"mpp={mpp!r} must be a positive number of µm per pixel")
    if n_jobs is not None and n_jobs < 1:
        raise DataValueError(f"n_jobs={n_jobs!r} must be at least 1")
    slide = resolve_slide(sdata, image_key=image_key)
    names = _Names(key_added)
    spots = _spots(sdata, slide, shapes_key, table_key)
    if not copy:
        names.check_free(sdata)
        if spots is not None:
            for column in (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW):
                check_slot_free(
                    spots.table.adata,
                    "obs",
                    column,
                    maker="segment_nuclei",
                    note=Keys.N_NUCLEI,
                    advice="Rename or delete what is there",
                )
    source = _source(sdata, slide, method, diameter_um=diameter_um, mpp=mpp, model=model, device=device)
    nuclei = segment_slide(
        slide,
        source.backend,
        mpp=source.mpp,
        halo_px=source.halo_px,
        n_jobs=1 if source.one_thread else n_jobs,
        keep_names=source.keep_names,
        progress_bar=progress_bar,
    )
    if len(nuclei.ids) == 0:
        raise DataValueError(
            f"segment_nuclei found no nuclei on image {slide.key!r} with method {source.name!r}: the image may be blank or "
            f"out of focus, or diameter_um={diameter_um:g} does not fit. Look at it, or go on without nuclei"
        )
    outlines = _outlines(sdata, slide, nuclei)
    if copy:
        return outlines
    labels = rasterise(nuclei) if raster else None
    elements = {names.shapes: outlines, names.table: _features(names, nuclei)}
    if labels is not None:
        elements[names.labels] = _label_element(sdata, slide, nuclei, labels)
    counts = {} if spots is None else _count(sdata, slide, spots, nuclei, labels)
    note = {
        "created_by": "hespotex.pp.segment_nuclei",
        "params": {**source.params, "diameter_um": diameter_um} if source.params else {},
        "method": source.name,
        "image": slide.key,
        "mpp": nuclei.grid.mpp,
    }
    _write(sdata, names, elements, spots, counts, note)
    return None


@dataclass(frozen=True)
class _Names:
    """Names of the three elements; unique across kinds, as SpatialData wants them."""

    shapes: str

    @property
    def labels(self) -> str:
        return Keys.NUCLEI_LABELS if self.shapes == Keys.NUCLEI else Keys.derived(self.shapes, "labels")

    @property
    def table(self) -> str:
        return Keys.nuclei_table(self.shapes)

    def check_free(self, sdata: SpatialData) -> None:
        """Raise if writing would replace anything that an earlier call has not made."""
        kinds = {self.shapes: "shapes", self.labels: "labels", self.table: "tables"}
        ours = self.table in sdata.tables and bool(read_record(sdata.tables[self.table], self.shapes))
        check_elements_free(sdata, kinds, key_added=self.shapes, maker="segment_nuclei", is_ours=lambda _: ours)


@dataclass(frozen=True, eq=False)
class _Source:
    """Where labels come from, and how blocks must be read for it."""

    name: str
    backend: Backend
    mpp: float
    halo_px: int
    one_thread: bool = False
    keep_names: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """Arguments that do the same on another slide; none for labels and functions, which belong to this one."""
        return {"method": self.name} if self.name in METHODS else {}


@dataclass(frozen=True, eq=False)
class _Spots:
    """Spots in which nuclei are counted, and the rows of the table that stand for them."""

    table: AnnotatedTable
    shapes_key: str
    rows: np.ndarray
    positions: np.ndarray
    centres: np.ndarray


def _spots(sdata: SpatialData, slide: Slide, shapes_key: str | None, table_key: str | None) -> _Spots | None:
    try:
        table = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        if table_key is not None or (shapes_key is not None and shapes_key not in sdata.shapes):
            raise
        return None
    shapes_key = shapes_key or resolve_shapes_key(sdata, table_key=table.key)
    rows, positions = row_positions(sdata, table, shapes_key)
    centres = shape_centres(sdata, shapes_key, slide)[positions]
    check_on_image(slide, centres, f"shapes of {shapes_key!r}")
    return _Spots(table, shapes_key, rows, positions, centres)


def _source(
    sdata: SpatialData,
    slide: Slide,
    method: Method,
    *,
    diameter_um: float,
    mpp: float | None,
    model: str | os.PathLike[str] | None,
    device: str | None,
) -> _Source:
    if model is not None and method != "cellpose":
        raise DataValueError("model= names Cellpose's weights; use it with method='cellpose'")
    labels = _given_labels(sdata, slide, method)
    if labels is not None:
        return _from_labels(slide, labels, diameter_um, mpp)
    working = max(WORKING_MPP, slide.mpp) if mpp is None else mpp
    diameter_px = diameter_um / working
    if diameter_px < MIN_DIAMETER_PX:
        raise ScaleError(
            f"at {working:.3g} µm/px a nucleus of {diameter_um:g} µm has {diameter_px:.1f} px across, and "
            f"{MIN_DIAMETER_PX:g} are needed to tell neighbours apart; use the full-resolution image"
            + (" or a smaller mpp=" if mpp else "")
        )
    if callable(method):
        return _Source(
            getattr(method, "__name__", type(method).__name__),
            lambda block: method(block.pixels),
            working,
            int(np.ceil(CALLABLE_HALO_DIAMETERS * diameter_px)),
            one_thread=True,
        )
    if method == "cellpose":
        cellpose = CellposeSegmenter(model, diameter_px=diameter_px, device=device)
        return _Source("cellpose", lambda block: cellpose(block.pixels), working, cellpose.halo_px, one_thread=True)
    watershed = Watershed(diameter_px, estimate_appearance(sample_tissue(slide, working)))
    return _Source("watershed", lambda block: watershed(block.pixels), working, watershed.halo_px)


def _given_labels(sdata: SpatialData, slide: Slide, method: Method) -> Any:
    """The label image that `method` is or names; ``None`` if it is a way to make one."""
    if isinstance(method, np.ndarray):
        return check_labels(method, "method")
    if isinstance(method, os.PathLike):
        return load_labels(method)
    if callable(method) or method in METHODS:
        return None
    if not isinstance(method, str):
        raise DataTypeError(
            f"method must be one of {METHODS}, a function, a label image, or the name or path of one; got "
            f"{type(method).__name__}"
        )
    if method in sdata.labels:
        return _label_image(sdata, slide, method)
    if method.endswith(".npy"):
        return load_labels(method)
    raise MissingKeyError(
        f"method={method!r} is neither one of {METHODS}, nor among the labels {list(sdata.labels)}, nor the path of a "
        f".npy file"
    )


def _label_image(sdata: SpatialData, slide: Slide, key: str) -> Any:
    """The lazy array of ``labels[key]``, which has to lie on the image."""
    from spatialdata import get_pyramid_levels
    from xarray import DataArray

    element = sdata.labels[key]
    finest = element if isinstance(element, DataArray) else next(iter(get_pyramid_levels(element)))
    labels = check_labels(finest.transpose("y", "x").data, f"labels {key!r}")
    matrix = pixel_maps(sdata, slide.key).get(("labels", key))
    if matrix is None:
        raise GeometryError(f"labels {key!r} share no coordinate system with image {slide.key!r}")
    corners = np.array([[0, 0], labels.shape[::-1]]) @ matrix[:2, :2].T + matrix[:2, 2]
    if np.abs(corners - [[0, 0], slide.shape[::-1]]).max() > 0.01 * max(slide.shape):
        raise GeometryError(
            f"labels {key!r} do not cover image {slide.key!r}: their corners lie at {corners.round().tolist()} px of it; "
            f"rasterise them on the image first"
        )
    return labels


def _from_labels(slide: Slide, labels: Any, diameter_um: float, mpp: float | None) -> _Source:
    if mpp is not None:
        raise DataValueError("mpp= chooses the resolution at which nuclei are found; labels have one already")
    shapes = [tuple(int(size) for size in level.array.shape[1:]) for level in slide.levels]
    if tuple(labels.shape) not in shapes:
        raise DataValueError(
            f"the label image has {labels.shape[1]} × {labels.shape[0]} px, image {slide.key!r} has "
            f"{slide.shape[1]} × {slide.shape[0]} (levels: {shapes}, height first); they must be equal"
        )
    level = slide.levels[shapes.index(tuple(labels.shape))]
    mpp = slide.mpp * level.downsample
    return _Source(
        "labels",
        lambda block: _window(labels, block.y - block.halo_px, block.x - block.halo_px, block.pixels.shape[:2]),
        mpp,
        int(np.ceil(LABELS_HALO_DIAMETERS * diameter_um / mpp)),
        keep_names=True,
    )


def _window(labels: Any, top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """Part of `labels` that may reach beyond them; 0 there."""
    height, width = labels.shape
    y0, x0 = max(top, 0), max(left, 0)
    part = np.asarray(labels[y0 : min(top + shape[0], height), x0 : min(left + shape[1], width)])
    window = np.zeros(shape, dtype=part.dtype)
    window[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return window


def _count(sdata: SpatialData, slide: Slide, spots: _Spots, nuclei: Nuclei, labels: Any) -> dict[str, np.ndarray]:
    shapes = sdata.shapes[spots.shapes_key]
    size_um = shape_radius(sdata, spots.shapes_key, slide)
    if (shapes.geometry.geom_type == "Point").all():
        stored = shapes["radius"].to_numpy(dtype=np.float64)
        radius = stored[spots.positions] * (size_um / slide.mpp / np.median(stored))
        inside = count_in_circles(nuclei.centroids(), spots.centres, radius)
    else:
        polygons = shape_geometries(sdata, spots.shapes_key, slide).to_numpy()[spots.positions]
        inside = count_in_polygons(nuclei.centroids(), polygons)
    counts = {Keys.N_NUCLEI: inside}
    if labels is not None:
        # Rounded, because a diameter of 145.0000001 px, off by the arithmetic alone, must not become 146.
        diameter_px = round(2 * size_um / nuclei.grid.mpp, 6)
        centres = nuclei.grid.from_pixels(spots.centres).round(6)
        counts[Keys.N_NUCLEI_WINDOW] = count_in_window(labels, centres, diameter_px)
    return counts


def _outlines(sdata: SpatialData, slide: Slide, nuclei: Nuclei) -> GeoDataFrame:
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    frame = GeoDataFrame({Keys.NUCLEUS_ID: nuclei.ids}, geometry=nuclei.outlines(), index=nuclei.ids)
    return ShapesModel.parse(frame, transformations=image_transformations(sdata, slide.key))


def _label_element(sdata: SpatialData, slide: Slide, nuclei: Nuclei, raster: Any) -> Any:
    import dask.array as da
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import Scale, Sequence

    scale = Scale(list(nuclei.grid.factor), axes=("x", "y"))
    unscaled = nuclei.grid.factor == (1.0, 1.0)
    transformations = {
        name: transformation if unscaled else Sequence([scale, transformation])
        for name, transformation in image_transformations(sdata, slide.key).items()
    }
    return Labels2DModel.parse(da.from_zarr(raster), dims=("y", "x"), transformations=transformations)


def _features(names: _Names, nuclei: Nuclei) -> AnnData:
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel

    obs = pd.DataFrame(
        {Keys.REGION: pd.Categorical([names.shapes] * len(nuclei.ids)), Keys.NUCLEUS_ID: nuclei.ids},
        index=pd.Index(nuclei.ids.astype(str)),
    )
    adata = AnnData(
        nuclei.regions.features,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(list(FEATURES))),
        obsm={Keys.SPATIAL: nuclei.centroids()},
    )
    table = TableModel.parse(adata, region=names.shapes, region_key=Keys.REGION, instance_key=Keys.NUCLEUS_ID)
    mark_table(table, "nuclei")
    return table


def _write(
    sdata: SpatialData,
    names: _Names,
    elements: dict[str, Any],
    spots: _Spots | None,
    counts: dict[str, np.ndarray],
    note: dict[str, Any],
) -> None:
    record(elements[names.table], names.shapes, **note)
    with restored_on_error(sdata):
        for name in (names.table, names.labels, names.shapes):
            if name in sdata:
                del sdata[name]
        for name in (names.shapes, names.labels, names.table):
            if name in elements:
                sdata[name] = elements[name]
        if spots is not None:
            for name, values in counts.items():
                spots.table.adata.obs[name] = _column(spots, name, values)
            if Keys.N_NUCLEI_WINDOW not in counts and Keys.N_NUCLEI_WINDOW in spots.table.adata.obs:
                del spots.table.adata.obs[Keys.N_NUCLEI_WINDOW]  # of other nuclei than those now stored
            record(spots.table.adata, Keys.N_NUCLEI, **note)
    logger.info(
        "segment_nuclei: %d nuclei; wrote shapes[%r], tables[%r]%s%s",
        len(elements[names.table]),
        names.shapes,
        names.table,
        f", labels[{names.labels!r}]" if names.labels in elements else "",
        f" and obs{list(counts)} of table {spots.table.key!r}"
        if spots is not None
        else "; there is no table to count for",
    )


def _column(spots: _Spots, name: str, values: np.ndarray) -> np.ndarray:
    """`values` in their rows; those of other regions stay as they are, or are missing."""
    obs = spots.table.adata.obs
    if len(spots.rows) == len(obs):
        column = np.empty(len(obs), dtype=np.int64)
    else:
        column = obs[name].to_numpy(dtype=np.float64).copy() if name in obs else np.full(len(obs), np.nan)
    column[spots.rows] = values
    return column.astype(np.int64) if np.isfinite(column).all() else column
