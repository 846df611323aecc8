"""Image embeddings of spots and tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys, check_key, sanitize
from .._logging import logger
from .._tasks import check_client
from ..data.partial import PartialRows
from ..data.provenance import digest, read_record, record
from ..data.tables import AnnotatedTable, resolve_shapes_key, resolve_table, table_role
from ..data.transaction import restored_on_error
from ..encoders import Encoder, as_encoder, check_resolution, identifying
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError
from ..image.fingerprint import fingerprint
from ._embed_rows import compute_features
from ._free import check_elements_free, check_slot_free
from ._places import Place, new_table, resolve_places, spot_radius

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client
    from spatialdata import SpatialData

__all__ = ["check_batch_size", "embed", "embed_places", "resolve_encoder"]

# Side of a tile on superpixels, in cells: what is measured of a cell needs a few nuclei, its colour only itself.
_CELLS_PER_TILE = {"morphology": 2.0, "rgb": 1.0}


def embed(
    sdata: SpatialData,
    encoder: str | Encoder | torch.nn.Module | Callable[[np.ndarray], np.ndarray] = "morphology",
    *,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    mpp: float | None = None,
    tile_um: float | None = None,
    batch_size: int | Literal["auto"] | None = None,
    compile: bool = False,
    device: str | None = None,
    client: Client | None = None,
    key_added: str | None = None,
    copy: bool = False,
    progress_bar: bool | None = None,
    **encoder_options: Any,
) -> np.ndarray | None:
    """Turn the image around each spot or tile into a row of features.

    The slide is streamed: each chunk of it is read about once, and memory does not grow with its size. Features that
    are there already, of the same encoder on the same image and places, are not computed again. Whether the image is
    the same is told by an overview and samples of its finest pixels.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale, and spots or tiles.
    encoder
        Name in the registry (:func:`hespotex.encoders.available`), an encoder, or a torch module or function of your own
        with the options of :func:`hespotex.encoders.from_module`.
    image_key
        Name in ``sdata.images``; may be left out where shapes lie on only one. Where a table annotates several
        regions, each with its own image: ``{shapes: image}``.
    shapes_key
        Shapes whose table is meant; by default the one table there is, else that of ``"tiles"``. All regions of the
        table are embedded, as a row of features cannot be left out.
    table_key
        Their table; may be left out where there is only one. Shapes without a table get one.
    mpp
        Resolution the encoder works at, in µm per pixel, in place of its own. The image's scale is another matter:
        :func:`hespotex.pp.set_scale`.
    tile_um
        Side of a tile in µm, in place of the encoder's own. On superpixels ``"rgb"`` sees one cell and ``"morphology"``
        two by default.
    batch_size
        Tiles per forward pass; the setting by default. ``"auto"`` tries which is fastest on the device. A batch that does
        not fit into its memory is taken in halves, with a warning.
    compile
        Have torch compile the network first: worth it for many thousand tiles.
    device
        The setting by default.
    client
        A ``dask.distributed.Client``: its workers embed parts of the slide, which they read themselves, so that they need
        the slide (and a weights file) under the same path. Features are the same, those of networks to rounding.
    key_added
        Key in ``obsm``; ``"X_<encoder>"`` by default.
    copy
        Return the features in place of writing them.
    progress_bar
        The setting by default.
    encoder_options
        Further options of the encoder, such as ``weights=``.

    Returns
    -------
    The features (n, d) if `copy`, else ``None`` and these are written to the table:

    ``obsm["X_<encoder>"]``
        Features, float32 (n, d).
    ``obs["<encoder>_padded"]``
        Whether a tile reaches beyond the image. Networks see white there; ``morphology`` takes the mean over the
        part that lies on the image.
    ``uns["hespotex"]["X_<encoder>"]``
        Encoder, parameters, resolution, versions.

    Raises
    ------
    GeometryError
        If shapes lie outside the image or are not connected with it, or table and shapes do not match.
    ScaleError
        If the image's scale is unknown, or it would have to be enlarged more than twofold.
    MissingWeightsError
        If the encoder's weights are missing.
    DataValueError
        If `key_added` is taken by features that this function did not make, or is no legal key.

    Warns
    -----
    HespotexWarning
        If the work is interrupted: what is done is kept in ``settings.cache_dir``, where the same call goes on, also
        after a kill.

    Examples
    --------
    >>> import hespotex as hx
    >>> hx.pp.embed(sdata)  # doctest: +SKIP
    >>> hx.pp.embed(sdata, "timm:resnet50", weights="resnet50.safetensors", tile_um=112)  # doctest: +SKIP
    """
    check_batch_size(batch_size)
    check_client(client)
    table = _resolve_table(sdata, shapes_key, table_key)
    if tile_um is None and isinstance(encoder, str):
        tile_um = _tile_of_cells(sdata, table, encoder)
    encoder = resolve_encoder(encoder, mpp=mpp, tile_um=tile_um, **encoder_options)
    if compile:
        encoder.compile()
    return embed_places(
        sdata,
        table,
        resolve_places(sdata, table, image_key),
        encoder,
        batch_size=batch_size,
        device=device,
        client=client,
        key_added=key_added,
        copy=copy,
        progress_bar=progress_bar,
    )


def check_batch_size(batch_size: Any) -> None:
    """Raise unless it is a number of tiles, ``"auto"`` or ``None``."""
    if batch_size not in (None, "auto") and not (isinstance(batch_size, Integral) and int(batch_size) >= 1):
        raise DataValueError(f"batch_size={batch_size!r} must be a whole number of at least 1, or 'auto'")


def _tile_of_cells(sdata: SpatialData, table: AnnotatedTable, encoder: str) -> float | None:
    """Tile of an encoder that describes the cells of a grid themselves; ``None`` for other shapes and encoders."""
    shapes = sdata.shapes[table.regions[0]]
    if encoder not in _CELLS_PER_TILE or Keys.SIZE_UM not in shapes or len(shapes) == 0:
        return None
    return _CELLS_PER_TILE[encoder] * float(shapes[Keys.SIZE_UM].iloc[0])


def embed_places(
    sdata: SpatialData,
    table: AnnotatedTable,
    places: list[Place],
    encoder: Encoder,
    *,
    batch_size: int | Literal["auto"] | None,
    device: str | None,
    key_added: str | None,
    copy: bool,
    progress_bar: bool | None,
    client: Client | None = None,
    name: str | None = None,
    depends_on: tuple[Any, ...] = (),
) -> np.ndarray | None:
    """Embed the rows of a table, as :func:`embed` does.

    Parameters
    ----------
    sdata, encoder, batch_size, device, client, key_added, copy, progress_bar
        As in :func:`embed`.
    table
        The table to write to.
    places
        All its rows, by region.
    name
        Name of the table if it is new; by default that of encoder and shapes.
    depends_on
        What else determines the features, besides encoder, pixels and places.
    """
    key = Keys.embedding(encoder.name) if key_added is None else key_added
    check_key(key)
    for slide in {
        place.slide.key: place.slide for place in places
    }.values():  # that of several regions is looked at once
        check_resolution(encoder, slide)
    identity = _identity(encoder, places, depends_on)

    features = _stored(table.adata, key, identity)
    if features is not None:
        logger.info("embed: obsm[%r] is there already, made with the same parameters", key)
        return np.array(features) if copy else None
    name = table.key or name or Keys.embedding_table(encoder.name, table.regions[0])
    if not copy:
        _check_free(sdata, table, key, name)
    partial = PartialRows(identity, (table.adata.n_obs, encoder.n_features))
    features = compute_features(encoder, places, partial, batch_size, device, client, progress_bar=progress_bar)
    if copy:
        return features
    padded = _padded(encoder, places, table.adata.n_obs)
    _write(sdata, table, name, key, features, padded, encoder, places, identity)
    return None


def resolve_encoder(encoder: Any, *, mpp: float | None, tile_um: float | None, **options: Any) -> Encoder:
    """The encoder that is meant, made if only its name, a module or a function is given."""
    sizes = {"mpp": mpp, "tile_um": tile_um}
    return as_encoder(encoder, **options, **{name: value for name, value in sizes.items() if value is not None})


def _resolve_table(sdata: SpatialData, shapes_key: str | None, table_key: str | None) -> AnnotatedTable:
    """The table to write to; for shapes that have none, a new one that is not in the object yet."""
    if not hasattr(sdata, "tables"):
        raise DataTypeError(f"an image is needed to embed: sdata must be a SpatialData, got {type(sdata).__name__}")
    if table_key is not None:
        return resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    if shapes_key is None:
        try:
            return resolve_table(sdata)
        except AmbiguousKeyError:
            raise
        except MissingKeyError:
            shapes_key = resolve_shapes_key(sdata)
    elif shapes_key not in sdata.shapes:
        resolve_shapes_key(sdata, shapes_key)
    try:
        table = resolve_table(sdata, shapes_key=shapes_key)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        return new_table(sdata, shapes_key)
    # A prediction for tiles is a result, not the place where its own input is kept.
    return new_table(sdata, shapes_key) if table_role(table.key or "", table.adata) == "prediction" else table


def _identity(encoder: Encoder, places: list[Place], depends_on: tuple[Any, ...]) -> str:
    """Equal if and only if the same features would come out."""
    return digest(
        identifying(encoder.params()),
        encoder.code_hash(),
        *(
            value
            for place in places
            for value in (fingerprint(place.slide, place.centres), place.slide.mpp, place.rows)
        ),
        *(place.centres for place in places),
        *depends_on,
    )


def _stored(adata: AnnData, key: str, identity: str) -> np.ndarray | None:
    features = adata.obsm.get(key)
    if features is None or read_record(adata, key).get("identity") != identity:
        return None
    return np.asarray(features)


def _padded(encoder: Encoder, places: list[Place], n_obs: int) -> np.ndarray:
    padded = np.zeros(n_obs, dtype=bool)
    for place in places:
        half = encoder.tile_um / 2 / place.slide.mpp
        height, width = place.slide.shape
        beyond = (place.centres - half < -1e-6) | (place.centres + half > np.array([width, height]) + 1e-6)
        padded[place.rows] = beyond.any(axis=1)
    return padded


def _padded_key(key: str) -> str:
    """The flag follows the key of the features, so that two embeddings by one encoder keep theirs."""
    return Keys.padded(key.removeprefix("X_"))


def _check_free(sdata: SpatialData, table: AnnotatedTable, key: str, name: str) -> None:
    check_slot_free(table.adata, "obsm", key, maker="embed")
    check_slot_free(table.adata, "obs", _padded_key(key), maker="embed", note=key)
    if table.key is None:
        check_elements_free(sdata, {name: "tables"}, key_added=name, maker="embed", is_ours=lambda _: False)


def _write(
    sdata: SpatialData,
    table: AnnotatedTable,
    name: str,
    key: str,
    features: np.ndarray,
    padded: np.ndarray,
    encoder: Encoder,
    places: list[Place],
    identity: str,
) -> None:
    adata = table.adata
    with restored_on_error(sdata):
        adata.obsm[key] = features
        adata.obs[_padded_key(key)] = padded
        record(
            adata,
            key,
            created_by="hespotex.pp.embed",
            encoder=encoder.params(),
            mpp=encoder.mpp,
            tile_um=encoder.tile_um,
            images={sanitize(place.shapes_key): place.slide.key for place in places},
            slide_mpp=float(np.median([place.slide.mpp for place in places])),
            spot_radius_um=spot_radius(sdata, places),
            identity=identity,
        )
        if table.key is None:
            sdata[name] = adata
    logger.info(
        "embed: %d × %d features; wrote obsm[%r] of table %r%s",
        *(*features.shape, key, name, f", {int(padded.sum())} tiles padded" if padded.any() else ""),
    )
