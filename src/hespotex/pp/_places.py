"""Where the rows of a table lie on which slide, and new tables for shapes that have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._keys import Keys
from ..data.geometry import Slide, check_on_image, shape_centres, shape_radius
from ..data.tables import AnnotatedTable, mark_table, resolve_slides, row_positions
from ..errors import DataValueError, GeometryError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["Place", "new_table", "resolve_places", "spot_radius"]


@dataclass(frozen=True, eq=False)
class Place:
    """Rows of a table, where they lie, and on which slide."""

    shapes_key: str
    slide: Slide
    rows: np.ndarray
    centres: np.ndarray


def resolve_places(sdata: SpatialData, table: AnnotatedTable, image_key: str | Mapping[str, str] | None) -> list[Place]:
    """Where the rows of the table lie, region by region."""
    places = []
    for name, slide in resolve_slides(sdata, table, image_key).items():
        rows, positions = row_positions(sdata, table, name)
        centres = shape_centres(sdata, name, slide)[positions]
        check_on_image(slide, centres, f"shapes of {name!r}")
        places.append(Place(name, slide, rows, centres))
    return places


def spot_radius(sdata: SpatialData, places: list[Place]) -> float | None:
    """Median over the regions, for laying tiles of the same size on other slides; points have none."""
    try:
        return float(np.median([shape_radius(sdata, place.shapes_key, place.slide) for place in places]))
    except GeometryError:
        return None


def new_table(
    sdata: SpatialData,
    shapes_key: str,
    *,
    role: Literal["embedding", "nuclei"] = "embedding",
    columns: Mapping[str, np.ndarray] | None = None,
) -> AnnotatedTable:
    """A table of the shapes that is not in the object yet; `columns` are values by name of the variable."""
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel

    ids = sdata.shapes[shapes_key].index
    if len(ids) == 0:
        raise DataValueError(f"shapes {shapes_key!r} are empty")
    instance_key = Keys.NUCLEUS_ID if role == "nuclei" else Keys.TILE_ID if shapes_key == Keys.TILES else Keys.INSTANCE
    obs = pd.DataFrame(
        {Keys.REGION: pd.Categorical([shapes_key] * len(ids)), instance_key: ids.to_numpy()}, index=ids.astype(str)
    )
    values = np.zeros((len(ids), 0)) if columns is None else np.column_stack(list(columns.values()))
    adata = TableModel.parse(
        AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(list(columns or ()), dtype=str))),
        region=shapes_key,
        region_key=Keys.REGION,
        instance_key=instance_key,
    )
    mark_table(adata, role)
    return AnnotatedTable(
        adata=adata,
        key=None,
        regions=(shapes_key,),
        region=np.zeros(len(ids), dtype=np.int64),
        instances=ids.to_numpy(),
    )
