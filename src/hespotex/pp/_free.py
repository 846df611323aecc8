"""Whether a result may be written under a name: an earlier result of the same function may be replaced, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys, check_key
from .._logging import logger
from ..data.provenance import read_record
from ..errors import DataValueError, GeometryError

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["check_elements_free", "check_not_annotated", "check_slot_free"]


def check_elements_free(
    sdata: SpatialData, kinds: Mapping[str, str], *, key_added: str, maker: str, is_ours: Callable[[Any], bool]
) -> None:
    """Raise if `key_added` is no legal name, or elements could be written over those of somebody else.

    Parameters
    ----------
    sdata
        Object to write to.
    kinds
        Kind of each element by its name. Names are unique across kinds and whatever their case, as SpatialData wants.
    key_added
        The argument they are named by.
    maker
        Name of the function in ``pp``.
    is_ours
        Whether an element of that name and kind is an earlier result of it.

    Raises
    ------
    DataValueError
        Naming what is in the way.
    """
    check_key(key_added)
    wanted = {name.lower(): (name, kind) for name, kind in kinds.items()}
    for kind, name, element in sdata.gen_elements():
        if name.lower() not in wanted:
            continue
        if wanted[name.lower()] == (name, kind) and is_ours(element):
            logger.info("%s: %s[%r] is made anew", maker, kind, name)
            continue
        raise DataValueError(
            f"key_added={key_added!r} would replace {kind}[{name!r}], which {maker} did not make; choose another name, "
            f"such as key_added='{key_added}_2', or remove it first: del sdata[{name!r}]"
        )


def check_slot_free(
    adata: AnnData,
    slot: str,
    key: str,
    *,
    maker: str,
    note: str | None = None,
    advice: str = "Choose another key_added=, or rename or delete what is there",
) -> None:
    """Raise if writing ``<slot>[key]`` of a table would replace what `maker` did not make.

    Parameters
    ----------
    adata
        The table.
    slot
        ``"obs"``, ``"var"``, ``"obsm"``, ``"obsp"``, ``"layers"`` or ``"uns"``.
    key
        Key to write.
    maker
        Name of the function in ``pp``.
    note
        Key of its record in ``uns["hespotex"]``; `key` by default.
    advice
        What to do about it.

    Raises
    ------
    DataValueError
        Naming what is in the way.
    """
    note = note or key
    held = [str(name) for name in getattr(adata, slot) if name is not None and str(name).lower() == key.lower()]
    noted = note in adata.uns.get(Keys.NAMESPACE, {})
    ours = read_record(adata, note).get("created_by") == f"hespotex.pp.{maker}"
    if held in ([], [key]) and (ours or not (held or noted)):
        if held:
            logger.info("%s: %s[%r] is made anew", maker, slot, key)
        return
    there = f"{slot}[{held[0]!r}]" if held else f"uns[{Keys.NAMESPACE!r}][{note!r}]"
    raise DataValueError(
        f"{slot}[{key!r}] cannot be written: {there} is there already and {maker} did not make it. {advice}"
    )


def check_not_annotated(sdata: SpatialData, key: str, shapes: GeoDataFrame) -> None:
    """Raise if `shapes` would be put under a table that annotates other ones of that name."""
    from spatialdata.models import get_table_keys

    old = sdata.shapes.get(key)
    if old is None or (old.index.equals(shapes.index) and old.geometry.geom_equals_exact(shapes.geometry, 1e-6).all()):
        return
    for name, table in sdata.tables.items():
        if "spatialdata_attrs" in table.uns and key in np.atleast_1d(get_table_keys(table)[0]):
            raise GeometryError(
                f"table {name!r} annotates the shapes {key!r} that are there and would fit the new ones no more; delete it "
                f"(del sdata[{name!r}]) or name the new shapes otherwise with key_added="
            )
