"""The parts of a section, from SpatialData: their features, their places, and what each spot covers of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .._keys import Keys
from ..errors import AmbiguousKeyError, DataTypeError, GeometryError, MissingKeyError
from .geometry import Slide, shape_centres, shape_geometries, shape_radii
from .section import Level, Parts
from .shares import disc_shares, inside_shares, polygon_shares, within_shares
from .tables import AnnotatedTable, resolve_table, row_positions

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["Observed", "PartsView", "default_parts", "parts_view", "share_matrix"]

_DEFAULT = {"superpixel": Keys.SUPERPIXELS, "nucleus": Keys.NUCLEI, "spot": Keys.DENSE_SPOTS}
_MADE_BY = {
    "superpixel": "hx.pp.superpixels(sdata)",
    "nucleus": "hx.pp.segment_nuclei(sdata)",
    "spot": "hx.pp.densify(sdata)",
}
_NO_FEATURES = ("X_rgb", "X_morphometrics")  # beside an embedding they are companions, not the embedding


@dataclass(frozen=True, eq=False)
class Observed:
    """Shapes that were measured: which, and in what order."""

    shapes_key: str
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class PartsView:
    """Parts, the shapes they are and the table that holds their features.

    Attributes
    ----------
    parts
        As a model sees them.
    shapes_key
        Name of their shapes.
    positions
        Which of the shapes they are, in order, (m,).
    table
        Table of their features; ``None`` where none are read.
    embedding_key
        ``obsm`` key of the features.
    pixels
        Centres in level-0 pixels, (m, 2).
    """

    parts: Parts
    shapes_key: str
    positions: np.ndarray
    table: AnnotatedTable | None
    embedding_key: str | None
    pixels: np.ndarray


def default_parts(level: Level) -> str:
    """Shapes that parts of a level are by default."""
    return _DEFAULT[level]


def parts_view(
    sdata: SpatialData,
    slide: Slide,
    observed: Observed | None,
    *,
    level: Level,
    needs: Sequence[str],
    parts_key: str | None = None,
    embedding_key: str | None = None,
) -> PartsView:
    """The parts of a section.

    Parameters
    ----------
    sdata
        Object that holds them.
    slide
        Image they lie on.
    observed
        The spots; ``None`` for a slide that has only an image.
    level
        What the model predicts for.
    needs
        What of the parts the model reads: ``"parts"`` (features), ``"colour"``.
    parts_key
        Name of their shapes; by default that of the level.
    embedding_key
        ``obsm`` key of the features; may be left out where there is one embedding.

    Raises
    ------
    MissingKeyError
        If shapes, features or colours are missing; the call that makes them is named.
    """
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(
            f"a SpatialData is needed for a method that predicts below the spot, got {type(sdata).__name__}: it holds the "
            "nuclei or superpixels"
        )
    key = _parts_key(sdata, parts_key, level)
    shapes = sdata.shapes[key]
    if len(shapes) == 0:
        raise GeometryError(f"shapes {key!r} are empty; make them anew with {_MADE_BY[level]}")
    table: AnnotatedTable | None = None
    positions = np.arange(len(shapes))
    rows = positions
    features = colour = None
    if {"parts", "colour"} & set(needs):
        table = _features_table(sdata, key, level)
        rows, positions = row_positions(sdata, table, key)
        order = np.argsort(positions, kind="stable")  # parts come in the order of their shapes: rows of a grid
        rows, positions = rows[order], positions[order]
        if "parts" in needs:
            embedding_key = _embedding(table.adata, embedding_key, key, level)
            features = _rows(table.adata, embedding_key, rows)
        if "colour" in needs:
            if Keys.COLOUR not in table.adata.obsm:
                raise MissingKeyError(
                    f"the method reads the colour of shapes {key!r}; make it with hx.pp.embed(sdata, 'rgb', shapes_key={key!r})"
                )
            colour = _rows(table.adata, Keys.COLOUR, rows)
    if "parts" not in needs:
        embedding_key = None
    chosen = shapes.iloc[positions]
    pixels = shape_centres(sdata, key, slide)[positions]
    grid, size_um = None, None
    if {Keys.GRID_ROW, Keys.GRID_COL, Keys.SIZE_UM} <= set(shapes.columns):
        grid = chosen[[Keys.GRID_ROW, Keys.GRID_COL]].to_numpy(dtype=np.int64)
        size_um = float(chosen[Keys.SIZE_UM].iloc[0])
    own_level: Level = "superpixel" if grid is not None else "nucleus" if level == "superpixel" else level
    share = sparse.csr_array((0, len(positions)), dtype=np.float64)
    if observed is not None:
        share = share_matrix(sdata, slide, observed, key, positions, pixels, size_um)
    parts = Parts(
        ids=chosen.index.to_numpy(),
        coordinates=slide.microns(pixels),
        share=share,
        features=features,
        colour=colour,
        grid=grid,
        size_um=size_um,
        level=own_level,
    )
    return PartsView(parts, key, positions, table, embedding_key, pixels)


def share_matrix(
    sdata: SpatialData,
    slide: Slide,
    observed: Observed,
    parts_key: str,
    positions: np.ndarray,
    pixels: np.ndarray,
    size_um: float | None,
) -> sparse.csr_array:
    """Observations × parts: areas in units of a whole cell for a grid, centroids within for all else.

    Parameters
    ----------
    sdata, slide
        Object and image.
    observed
        Spots, regions or whatever the parts are gathered into.
    parts_key, positions, pixels
        Shapes of the parts, which of them, and their centres in level-0 pixels.
    size_um
        Side of a cell; ``None`` if the parts are no grid.
    """
    centres = shape_centres(sdata, observed.shapes_key, slide)[observed.positions]
    radii = shape_radii(sdata, observed.shapes_key, slide)
    if radii is None:
        outlines = shape_geometries(sdata, observed.shapes_key, slide).iloc[observed.positions].to_numpy()
        if size_um is None:
            return inside_shares(outlines, pixels)
    elif size_um is None:
        return within_shares(centres, radii[observed.positions], pixels)
    cells = shape_geometries(sdata, parts_key, slide).iloc[positions].to_numpy()
    unit = (size_um / slide.mpp) ** 2
    if radii is None:
        return polygon_shares(outlines, cells, unit)
    return disc_shares(centres, radii[observed.positions], cells, unit)


def _parts_key(sdata: SpatialData, parts_key: str | None, level: Level) -> str:
    key = default_parts(level) if parts_key is None else parts_key
    if key in sdata.shapes:
        return key
    if parts_key is not None:
        raise MissingKeyError(f"parts_key={parts_key!r} is not among the shapes {list(sdata.shapes)}")
    raise MissingKeyError(
        f"the method predicts at shapes[{key!r}], which are not there (shapes: {list(sdata.shapes)}); make them with "
        f"{_MADE_BY[level]}, or name others with parts_key="
    )


def _features_table(sdata: SpatialData, key: str, level: Level) -> AnnotatedTable:
    try:
        return resolve_table(sdata, shapes_key=key)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        raise MissingKeyError(f"shapes {key!r} have no features; make them with {_embed_call(key, level)}") from None


def _embed_call(key: str, level: Level) -> str:
    return "hx.pp.embed_nuclei(sdata)" if level == "nucleus" else f"hx.pp.embed(sdata, encoder, shapes_key={key!r})"


def _embedding(adata: AnnData, embedding_key: str | None, key: str, level: Level) -> str:
    """``obsm`` key of the features that are meant."""
    if embedding_key is not None:
        if embedding_key not in adata.obsm:
            raise MissingKeyError(
                f"embedding_key={embedding_key!r} is not in obsm of the table of {key!r}, which holds {sorted(adata.obsm)}"
            )
        return embedding_key
    notes = adata.uns.get(Keys.NAMESPACE, {})
    made = [name for name in adata.obsm if name.startswith("X_") and "encoder" in notes.get(name, {})]
    found = [name for name in made if name not in _NO_FEATURES] or made
    if len(found) > 1:
        raise AmbiguousKeyError(f"shapes {key!r} hold several embeddings {sorted(found)}; name one with embedding_key=")
    if not found:
        raise MissingKeyError(
            f"shapes {key!r} have no features (obsm of their table: {sorted(adata.obsm)}); make them with {_embed_call(key, level)}"
        )
    return found[0]


def _rows(adata: AnnData, key: str, rows: np.ndarray) -> Any:
    """Rows of an array of the table, without a copy where they are all in order."""
    values = adata.obsm[key]
    return values if len(rows) == adata.n_obs and np.array_equal(rows, np.arange(len(rows))) else values[rows]
