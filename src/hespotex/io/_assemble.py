"""From arrays to the storage contract: the one place where readers build a SpatialData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..data.elements import image_element, transformations
from ..data.geometry import on_image
from ..errors import DataValueError, GeometryError

if TYPE_CHECKING:
    import dask.array as da
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from pandas import DataFrame
    from spatialdata import SpatialData

__all__ = ["build_section", "build_slide", "circles", "image_element", "transformations"]


def circles(xy: np.ndarray, radius_px: float, ids: Sequence[Any], mpp: float) -> GeoDataFrame:
    """Spots as circles in level-0 pixels."""
    from spatialdata.models import ShapesModel

    return ShapesModel.parse(
        np.asarray(xy, dtype=np.float64),
        geometry=0,
        radius=float(radius_px),
        index=ids,
        transformations=transformations(mpp),
    )


def build_slide(levels: Sequence[da.Array], mpp: float, attrs: Mapping[str, Any]) -> SpatialData:
    """A slide without expression."""
    from spatialdata import SpatialData

    return SpatialData(images={Keys.IMAGE: image_element(levels, mpp)}, attrs={Keys.NAMESPACE: dict(attrs)})


def build_section(
    levels: Sequence[da.Array],
    adata: AnnData,
    xy: np.ndarray,
    *,
    mpp: float,
    radius_px: float,
    attrs: Mapping[str, Any],
    advice: str = "",
) -> SpatialData:
    """A section: image, spots as circles, and the table that annotates them.

    Parameters
    ----------
    levels
        Image, finest level first.
    adata
        Table, one row per spot; its ``obs_names`` become the spots' ids. Taken over, not copied. Where its ``obs``
        has a column ``region`` or ``spot_id`` of other content, that is kept and ours get another name.
    xy
        Centres of the spots in level-0 pixels, (n, 2).
    mpp
        µm per pixel of level 0.
    radius_px
        Radius of the spots in level-0 pixels.
    attrs
        JSON values kept under ``sdata.attrs["hespotex"]``.
    advice
        Ends the message about spots outside the image.

    Raises
    ------
    GeometryError
        If a centre lies outside the image.
    DataValueError
        If the table has names that SpatialData does not take.
    """
    import pandas as pd
    from spatialdata import SpatialData
    from spatialdata.models import TableModel

    check_inside(xy, adata.obs_names, levels[0].shape[-1], levels[0].shape[-2], advice)
    ids = adata.obs_names.astype(str)
    region_key = _free_column(adata.obs, Keys.REGION, [Keys.SPOTS] * adata.n_obs)
    adata.obs[region_key] = pd.Categorical([Keys.SPOTS] * adata.n_obs)
    instance_key = _free_column(adata.obs, Keys.INSTANCE, ids)
    adata.obs[instance_key] = ids.to_numpy(dtype=object)
    adata.obsm[Keys.SPATIAL] = np.asarray(xy, dtype=np.float64)
    adata.uns.pop("spatialdata_attrs", None)  # of the object that the table was taken from
    try:
        table = TableModel.parse(adata, region=Keys.SPOTS, region_key=region_key, instance_key=instance_key)
    except ValueError as error:
        raise DataValueError(
            f"adata: SpatialData does not take this table; rename or remove the keys it names: {error}"
        ) from error
    return SpatialData(
        images={Keys.IMAGE: image_element(levels, mpp)},
        shapes={Keys.SPOTS: circles(xy, radius_px, ids, mpp)},
        tables={Keys.TABLE: table},
        attrs={Keys.NAMESPACE: dict(attrs)},
    )


def _free_column(obs: DataFrame, name: str, values: Sequence[str]) -> str:
    """`name`, or a longer one where `obs` has a column of that name (in any case) that holds something else."""
    taken = {str(column).lower() for column in obs}  # SpatialData tells no two names apart by case alone
    while name in taken and not (name in obs and list(obs[name].astype(str)) == list(values)):
        name = f"{Keys.NAMESPACE}_{name}"
    return name


def check_inside(xy: np.ndarray, names: Sequence[str], width: int, height: int, advice: str) -> None:
    """Raise if a centre is not finite or lies outside the image."""
    inside = on_image(xy, (height, width))
    if inside.all():
        return
    outside = np.flatnonzero(~inside)
    shown = ", ".join(f"{names[row]!r} at ({xy[row, 0]:.0f}, {xy[row, 1]:.0f})" for row in outside[:3])
    raise GeometryError(
        f"{len(outside)} of {len(xy)} spots lie outside the image of {width} x {height} px: {shown}"
        f"{', …' if len(outside) > 3 else ''}. {advice}".rstrip()
    )
