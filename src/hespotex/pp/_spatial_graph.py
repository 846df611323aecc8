"""Which observations are neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pandas.api.types import is_numeric_dtype
from scipy import sparse

from .._keys import Keys, check_key
from .._logging import logger
from ..data.geometry import is_microns, shape_positions
from ..data.lattice import Lattice, array_lattice, detect_lattice
from ..data.provenance import record
from ..data.tables import AnnotatedTable, resolve_table, row_positions
from ..data.transaction import restored_on_error
from ..errors import DataValueError, MissingKeyError
from ._free import check_slot_free

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["spatial_graph"]

# Neighbours up to how many pitches count: halfway to the next distance on the lattice, roughly, as measured positions
# of legacy arrays scatter. On a square lattice those are 1, 1.41, 2; on a hexagonal one 1, 1.73, 2.
_REACH = {("square", 4): 1.25, ("square", 8): 1.7, ("hex", 6): 1.35}
_DEFAULT_NEIGHBOURS = {"square": 4, "hex": 6, "knn": 6}
_HANDFUL = 20  # so few observations far apart may look like a lattice of their own
_DIRECT_SHARE = 0.1  # of observations that have a neighbour at the pitch, even where most of a lattice is missing


class SpatialGraph(NamedTuple):
    """Sparse (n, n) matrices of one graph."""

    connectivities: sparse.csr_matrix
    distances: sparse.csr_matrix


def spatial_graph(
    data: SpatialData | AnnData,
    *,
    kind: Literal["square", "hex", "knn"] | None = None,
    n_neighs: int | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    spatial_key: str = Keys.SPATIAL,
    library_key: str | None = None,
    key_added: str = Keys.SPATIAL,
    copy: bool = False,
) -> SpatialGraph | None:
    """Connect neighbouring observations, by squidpy's builders, with defaults that follow the lattice.

    The graph is symmetric, without self loops, and joins no two regions.

    Parameters
    ----------
    data
        A SpatialData whose table annotates shapes, or an AnnData with coordinates in ``obsm``.
    kind
        ``"square"``: 4 neighbours at the pitch (or 8 with the diagonal ones); ``"hex"``: 6; ``"knn"``: the nearest
        `n_neighs`, made symmetric. ``None``: the lattice that the coordinates lie on, or, where many observations are
        missing, that of ``obs["array_row"]`` and ``obs["array_col"]``; else ``"knn"``.
    n_neighs
        Number of neighbours: 4 or 8, 6, or any for ``"knn"`` (by default 6, or all where there are fewer).
    table_key, shapes_key
        The table, by name or by the shapes it annotates; may be left out where there is only one.
    spatial_key
        Coordinates in ``obsm`` of an AnnData.
    library_key
        Column of ``obs`` that tells regions apart; by default the table's own.
    key_added
        Prefix of what is written.
    copy
        Return the graph in place of writing it.

    Returns
    -------
    Connectivities and distances if `copy`, else ``None`` and these are written to the table:

    ``obsp["spatial_connectivities"]``
        1 for each pair of neighbours, sparse float32 (n, n).
    ``obsp["spatial_distances"]``
        Their distance, in µm where the shapes have a scale, sparse float64 (n, n).
    ``uns["spatial_neighbors"]``
        Where these are and how they were made, as squidpy writes it; more of it in ``uns["hespotex"]``.

    Raises
    ------
    MissingKeyError
        If there are no coordinates.
    DataValueError
        If there are fewer than two observations, or fewer than neighbours asked for; if `key_added` is taken by a
        graph that this function did not make, or is no legal key.

    See Also
    --------
    squidpy.gr.spatial_neighbors_radius, squidpy.gr.spatial_neighbors_knn

    Examples
    --------
    >>> import numpy as np, anndata as ad, hespotex as hx
    >>> x, y = np.meshgrid(np.arange(3.0), np.arange(3.0))
    >>> adata = ad.AnnData(np.ones((9, 2), "float32"), obsm={"spatial": np.column_stack([x.ravel(), y.ravel()])})
    >>> hx.pp.spatial_graph(adata)
    >>> int(adata.obsp["spatial_connectivities"][4].sum())
    4
    """
    table = resolve_table(data, table_key=table_key, shapes_key=shapes_key)
    adata = table.adata
    connectivities_key, distances_key = f"{key_added}_connectivities", f"{key_added}_distances"
    if not copy:
        check_key(key_added)
        for slot, key in (
            ("obsp", connectivities_key),
            ("obsp", distances_key),
            ("uns", f"{key_added}_neighbors"),
        ):
            check_slot_free(adata, slot, key, maker="spatial_graph", note=connectivities_key)
    coordinates, unit = _coordinates(data, table, spatial_key)
    region = _regions(table, library_key)
    places = _places(table)
    lattice = _lattice(coordinates, region, places)
    resolved, number = _resolve_kind(kind, n_neighs, len(coordinates), lattice)
    graph = _build(coordinates, region, places, lattice, resolved, number, fewer=n_neighs is None)
    if copy:
        return graph
    coord_type = "generic" if resolved == "knn" else "grid"
    with restored_on_error(adata):
        adata.obsp[connectivities_key] = graph.connectivities
        adata.obsp[distances_key] = graph.distances
        adata.uns[f"{key_added}_neighbors"] = {
            "connectivities_key": connectivities_key,
            "distances_key": distances_key,
            "params": {"coord_type": coord_type, "n_neighbors": number, "kind": resolved},
        }
        record(
            adata,
            connectivities_key,
            created_by="hespotex.pp.spatial_graph",
            params={"kind": resolved, "n_neighs": number},
            distance_unit=unit,
        )
    logger.info(
        "spatial_graph: %d edges of kind %r among %d observations; wrote obsp[%r] and obsp[%r]",
        *(graph.connectivities.nnz // 2, resolved, adata.n_obs, connectivities_key, distances_key),
    )
    return None


def _coordinates(data: Any, table: AnnotatedTable, spatial_key: str) -> tuple[np.ndarray, str]:
    """Coordinates of the rows and their unit: of the shapes, or stored in an AnnData."""
    if table.key is None:
        if spatial_key not in table.adata.obsm:
            raise MissingKeyError(
                f"spatial_key={spatial_key!r} is not in obsm, which has {sorted(table.adata.obsm)}; a graph needs coordinates"
            )
        coordinates = np.asarray(table.adata.obsm[spatial_key], dtype=np.float64)[:, :2]
        unit = "stored"
    else:
        coordinates = np.full((table.adata.n_obs, 2), np.nan)
        systems = set()
        for name in table.regions:
            rows, positions = row_positions(data, table, name)
            xy, system = shape_positions(data, name)
            coordinates[rows] = xy[positions]
            systems.add(system)
        unit = "um" if all(map(is_microns, systems)) else "stored"
    if not np.isfinite(coordinates).all():
        raise DataValueError(f"{int((~np.isfinite(coordinates)).any(axis=1).sum())} observations have no coordinates")
    return coordinates, unit


def _regions(table: AnnotatedTable, library_key: str | None) -> np.ndarray:
    if library_key is None:
        return table.region
    if library_key not in table.adata.obs:
        raise MissingKeyError(f"library_key={library_key!r} is not a column of obs, which has {list(table.adata.obs)}")
    return np.unique(table.adata.obs[library_key].astype(str), return_inverse=True)[1]


def _places(table: AnnotatedTable) -> np.ndarray | None:
    """Row and column of each observation on its array, (n, 2), where the table states them."""
    columns = [Keys.ARRAY_ROW, Keys.ARRAY_COL]
    obs = table.adata.obs
    if not set(columns) <= set(obs) or not all(is_numeric_dtype(obs[column]) for column in columns):
        return None
    return obs[columns].to_numpy(dtype=np.float64, na_value=np.nan)


def _lattice(coordinates: np.ndarray, region: np.ndarray, places: np.ndarray | None) -> Lattice | None:
    """The lattice of all regions: by their coordinates or, where too much is missing, by the array of the largest."""
    lattice = detect_lattice(coordinates, region)
    if lattice is None and places is not None:
        names, sizes = np.unique(region, return_counts=True)
        rows = region == names[sizes.argmax()]
        lattice = array_lattice(coordinates[rows], *places[rows].T)
    return lattice


def _resolve_kind(kind: str | None, n_neighs: int | None, n_obs: int, lattice: Lattice | None) -> tuple[str, int]:
    if n_obs < 2:
        raise DataValueError("a graph needs at least 2 observations, there is 1")
    if kind is None:
        kind = lattice.kind if lattice and (n_neighs is None or (lattice.kind, n_neighs) in _REACH) else "knn"
    if kind not in _DEFAULT_NEIGHBOURS:
        raise DataValueError(f"kind={kind!r} is unknown; possible: {', '.join(map(repr, _DEFAULT_NEIGHBOURS))} or None")
    if n_neighs is None:
        n_neighs = _DEFAULT_NEIGHBOURS[kind]
    if kind != "knn" and (kind, n_neighs) not in _REACH:
        possible = [number for known, number in _REACH if known == kind]
        raise DataValueError(f"n_neighs={n_neighs!r} does not exist on a {kind!r} lattice; possible: {possible}")
    if n_neighs < 1:
        raise DataValueError(f"n_neighs={n_neighs!r} must be at least 1")
    return kind, int(n_neighs)


def _build(
    coordinates: np.ndarray,
    region: np.ndarray,
    places: np.ndarray | None,
    lattice: Lattice | None,
    kind: str,
    n_neighs: int,
    *,
    fewer: bool,
) -> SpatialGraph:
    connectivities, distances, order = [], [], []
    for name in np.unique(region):
        rows = np.flatnonzero(region == name)
        points, array = coordinates[rows], None if places is None else places[rows]
        if len(rows) == 1:
            adjacency = distance = sparse.csr_matrix((1, 1))
        elif kind == "knn":
            adjacency, distance = _nearest(points, n_neighs, fewer=fewer)
        else:
            adjacency, distance = _within(points, _REACH[kind, n_neighs] * _pitch(points, array, lattice))
        connectivities.append(adjacency)
        distances.append(distance)
        order.append(rows)
    back = np.argsort(np.concatenate(order))
    joined = (sparse.block_diag(matrices, format="csr")[back][:, back] for matrices in (connectivities, distances))
    first, second = (sparse.csr_matrix(matrix) for matrix in joined)
    return SpatialGraph(first.astype(np.float32), second)


def _nearest(coordinates: np.ndarray, n_neighs: int, *, fewer: bool) -> tuple[Any, Any]:
    """Graph of the nearest neighbours; `fewer` are taken where there are no more."""
    from squidpy.gr.neighbors import KNNBuilder

    n_obs = len(coordinates)
    if n_obs <= n_neighs and not fewer:
        raise DataValueError(f"n_neighs={n_neighs} neighbours were asked for among {n_obs} observations; lower it")
    return _symmetric(*KNNBuilder(n_neighs=min(n_neighs, n_obs - 1)).build(coordinates))


def _within(coordinates: np.ndarray, radius: float) -> tuple[Any, Any]:
    """Graph of all within a distance of each other."""
    from squidpy.gr.neighbors import RadiusBuilder

    return _symmetric(*RadiusBuilder(radius=radius).build(coordinates))


def _symmetric(adjacency: Any, distance: Any) -> tuple[Any, Any]:
    adjacency, distance = adjacency.maximum(adjacency.T), distance.maximum(distance.T)
    adjacency.eliminate_zeros()
    return adjacency, distance


def _pitch(coordinates: np.ndarray, places: np.ndarray | None, common: Lattice | None) -> float:
    """Distance of neighbours in a region: by its array or its coordinates, else that of all regions.

    Where nothing shows a lattice it is the distance of those that lie close, as most neighbours may be missing.
    """
    from scipy.spatial import cKDTree

    lattice = None if places is None else array_lattice(coordinates, *places.T)
    if lattice is None and (common is None or len(coordinates) >= _HANDFUL):
        lattice = detect_lattice(coordinates)
    if lattice is not None or common is not None:
        return (lattice or common).pitch  # type: ignore[union-attr]
    nearest = cKDTree(coordinates).query(coordinates, k=2)[0][:, 1]
    if np.median(nearest) <= 0:
        raise DataValueError("most observations coincide with another: a graph needs distinct coordinates")
    return float(np.quantile(nearest[nearest > 0], _DIRECT_SHARE))
