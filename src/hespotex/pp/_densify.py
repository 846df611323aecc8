"""Positions between the measured spots: what coordinate-based methods predict at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._settings import settings
from ..data.dense import LAYOUTS, lattice_offsets, random_points, shifted_points
from ..data.geometry import Slide, image_transformations, resolve_slide, shape_centres, shape_radius
from ..data.lattice import DISTANCE_TOLERANCE, detect_lattice, lattice_angle, spot_pitch
from ..data.tables import resolve_shapes_key, resolve_table, row_positions
from ..data.tissue import tissue_outline
from ..errors import DataValueError, GeometryError, MissingKeyError
from ._free import check_elements_free, check_not_annotated

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData

__all__ = ["densify"]

_COLUMNS = {Keys.POSITION_ID, "measured", "parent", "distance_um", "radius", "geometry"}


def densify(
    sdata: SpatialData,
    layout: Literal["midpoints", "triangles", "square", "random"] | None = None,
    *,
    expand: float = 5.0,
    max_distance_um: float | None = None,
    seed: int | None = None,
    image_key: str | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    tissue_key: str | None = None,
    key_added: str = Keys.DENSE_SPOTS,
    copy: bool = False,
) -> GeoDataFrame | None:
    """Lay unmeasured positions between the measured spots.

    New positions are kept where they lie in tissue. Where no tissue was detected, a lattice's are kept whose neighbouring
    spots were all measured, so that none lies beyond the outermost spots or in a gap.

    Parameters
    ----------
    sdata
        Object with spots that a table annotates, and an image of known scale.
    layout
        ``"midpoints"`` of neighbours on a hexagonal lattice such as Visium's, 4 times as many positions in all;
        ``"triangles"``, the centres between three neighbours, 3 times; ``"square"``, the midpoints of neighbours and
        of squares on a square lattice such as Spatial Transcriptomics', 4 times; ``"random"`` positions near spots on any
        lattice or none. By default ``"midpoints"`` or ``"square"``, whichever the lattice allows.
    expand
        Only of ``"random"``: how many times as many positions, where the spots fill a disc.
    max_distance_um
        Only of ``"random"``: largest distance to the nearest spot in µm; by default that of neighbouring spots.
    seed
        Only of ``"random"``; ``hx.settings.seed`` by default.
    image_key, shapes_key, table_key
        Image, spots and their table; each may be left out where there is one candidate.
    tissue_key
        Tissue outlines; by default ``"tissue"``, LazySlide's ``"tissues"`` or squidpy's mask ``"<image>_tissue"``,
        whichever is there.
    key_added
        Name of the positions.
    copy
        Return the positions in place of writing them.

    Returns
    -------
    The positions if `copy`, else ``None`` and they are written:

    ``shapes["dense_spots"]``
        Circles as large as the spots in level-0 pixels, the measured ones first, with ``position_id`` (equal to the
        index), ``measured``, ``parent`` (id of the nearest spot) and ``distance_um`` (to it). They carry the image's
        transformations.

    Raises
    ------
    GeometryError
        If the spots do not lie on the lattice that the layout is for, no new position is left, or a table annotates
        positions that would change.
    MissingKeyError
        If there are no measured spots.
    DataValueError
        If `key_added` is taken by something that this function did not make, or is no legal key.

    See Also
    --------
    hespotex.pp.superpixels : a grid on the whole tissue, whatever was measured.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=800)
    >>> hx.pp.densify(sdata, "triangles")
    >>> bool(sdata["dense_spots"]["measured"].sum() == len(sdata["spots"]))
    True
    """
    if layout is not None and layout not in (*LAYOUTS, "random"):
        raise DataValueError(f"layout={layout!r} is unknown; possible: {', '.join(map(repr, (*LAYOUTS, 'random')))}")
    shapes_key = resolve_shapes_key(sdata, shapes_key, table_key)
    table = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    slide = resolve_slide(sdata, image_key=image_key)
    if not copy:
        check_elements_free(
            sdata,
            {key_added: "shapes"},
            key_added=key_added,
            maker="densify",
            is_ours=lambda shapes: set(shapes.columns) == _COLUMNS,
        )
    rows = np.sort(row_positions(sdata, table, shapes_key)[1])
    measured = shape_centres(sdata, shapes_key, slide)[rows]
    tissue = _tissue(sdata, slide, tissue_key)
    if layout == "random":
        positions = _random(measured, slide, expand, max_distance_um, seed)
    else:
        positions = _on_lattice(measured, slide, layout, between=tissue is None)
    if tissue is not None:
        positions = positions[_kept(tissue, positions, len(measured))]
    if len(positions) == len(measured):
        raise GeometryError(
            f"no new position between the {len(measured)} spots {shapes_key!r} lies in tissue; check the tissue"
            + (", or raise max_distance_um or expand" if layout == "random" else "")
        )
    radius = shape_radius(sdata, shapes_key, slide) / slide.mpp
    shapes = _shapes(sdata, slide, positions, measured, sdata.shapes[shapes_key].index.to_numpy()[rows], radius)
    if copy:
        return shapes
    check_not_annotated(sdata, key_added, shapes)
    sdata[key_added] = shapes
    logger.info(
        "densify: %d positions between %d spots; wrote shapes[%r]",
        len(positions) - len(measured),
        len(measured),
        key_added,
    )
    return None


def _on_lattice(measured: np.ndarray, slide: Slide, layout: str | None, *, between: bool) -> np.ndarray:
    """Measured positions and those of the denser lattice, in level-0 pixels."""
    lattice = detect_lattice(measured)
    if lattice is None:
        raise GeometryError(
            f"the {len(measured)} spots lie on no hexagonal or square lattice; use layout='random', or hx.pp.superpixels"
        )
    chosen = layout or {"hex": "midpoints", "square": "square"}[lattice.kind]
    kind = LAYOUTS[chosen][0]  # type: ignore[index]
    if kind != lattice.kind:
        fitting = [name for name, (wanted, _) in LAYOUTS.items() if wanted == lattice.kind]
        raise GeometryError(
            f"layout={chosen!r} is for a {kind} lattice, and the spots lie on a {lattice.kind} one of "
            f"{lattice.pitch * slide.mpp:.0f} µm; use {' or '.join(map(repr, fitting))}"
        )
    offsets = lattice_offsets(chosen, lattice.pitch, lattice_angle(measured, lattice))  # type: ignore[arg-type]
    positions, amid = shifted_points(measured, offsets, DISTANCE_TOLERANCE * lattice.pitch)
    return positions[amid] if between else positions


def _random(
    measured: np.ndarray, slide: Slide, expand: float, max_distance_um: float | None, seed: int | None
) -> np.ndarray:
    """Measured positions and random ones near them, in level-0 pixels."""
    radius = spot_pitch(measured) if max_distance_um is None else max_distance_um / slide.mpp
    if not radius > 0:
        raise DataValueError(f"max_distance_um={max_distance_um!r} must be a positive number of µm")
    return random_points(measured, expand, radius, np.random.default_rng(settings.seed if seed is None else seed))


def _tissue(sdata: SpatialData, slide: Slide, tissue_key: str | None) -> BaseGeometry | None:
    """The tissue; ``None`` if none was detected and none is named."""
    try:
        return tissue_outline(sdata, slide, tissue_key)
    except MissingKeyError:
        if tissue_key is None:
            return None
        raise MissingKeyError(f"tissue_key={tissue_key!r} is not among the shapes {list(sdata.shapes)}") from None


def _kept(tissue: BaseGeometry, positions: np.ndarray, n_measured: int) -> np.ndarray:
    """Whether each position was measured or lies in tissue."""
    from shapely import contains_xy, prepare

    prepare(tissue)
    kept = contains_xy(tissue, positions[:, 0], positions[:, 1])
    kept[:n_measured] = True
    return kept


def _shapes(
    sdata: SpatialData, slide: Slide, positions: np.ndarray, measured: np.ndarray, ids: np.ndarray, radius_px: float
) -> GeoDataFrame:
    from scipy.spatial import cKDTree
    from spatialdata.models import ShapesModel

    distance, nearest = cKDTree(measured).query(positions)
    nearest[: len(measured)] = np.arange(len(measured))
    index = np.arange(len(positions))
    shapes = ShapesModel.parse(
        positions,
        geometry=0,
        radius=np.full(len(positions), radius_px),
        index=index,
        transformations=image_transformations(sdata, slide.key),
    )
    shapes[Keys.POSITION_ID] = index
    shapes["measured"] = index < len(measured)
    shapes["parent"] = ids[nearest]
    shapes["distance_um"] = distance * slide.mpp
    return shapes
