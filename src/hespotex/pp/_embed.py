"""Image embeddings of spots and tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys, check_key, sanitize
from .._logging import logger
from .._settings import settings
from .._tasks import check_client, iter_tasks
from ..data.geometry import Slide, check_on_image, shape_centres, shape_radius
from ..data.partial import PartialRows
from ..data.provenance import digest, read_record, record
from ..data.tables import (
    AnnotatedTable,
    mark_table,
    resolve_shapes_key,
    resolve_slides,
    resolve_table,
    row_positions,
    table_role,
)
from ..data.transaction import restored_on_error
from ..encoders import Encoder, as_encoder, check_resolution, create, identifying
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    MissingKeyError,
    MissingWeightsError,
)
from ..image.fingerprint import fingerprint
from ._free import check_elements_free, check_slot_free

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client
    from spatialdata import SpatialData

__all__ = [
    "Place",
    "check_batch_size",
    "embed",
    "embed_places",
    "new_table",
    "resolve_encoder",
    "resolve_places",
    "spot_radius",
]

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
    for place in places:
        check_resolution(encoder, place.slide)
    identity = _identity(encoder, places, depends_on)

    features = _stored(table.adata, key, identity)
    if features is not None:
        logger.info("embed: obsm[%r] is there already, made with the same parameters", key)
        return np.array(features) if copy else None
    name = table.key or name or Keys.embedding_table(encoder.name, table.regions[0])
    if not copy:
        _check_free(sdata, table, key, name)
    partial = PartialRows(identity, (table.adata.n_obs, encoder.n_features))
    features = _compute(encoder, places, partial, batch_size, device, client, progress_bar=progress_bar)
    if copy:
        return features
    padded = _padded(encoder, places, table.adata.n_obs)
    _write(sdata, table, name, key, features, padded, encoder, places, identity)
    return None


@dataclass(frozen=True, eq=False)
class Place:
    """Rows of a table, where they lie, and on which slide."""

    shapes_key: str
    slide: Slide
    rows: np.ndarray
    centres: np.ndarray


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


def resolve_places(sdata: SpatialData, table: AnnotatedTable, image_key: str | Mapping[str, str] | None) -> list[Place]:
    """Where the rows of the table lie, region by region."""
    places = []
    for name, slide in resolve_slides(sdata, table, image_key).items():
        rows, positions = row_positions(sdata, table, name)
        centres = shape_centres(sdata, name, slide)[positions]
        check_on_image(slide, centres, f"shapes of {name!r}")
        places.append(Place(name, slide, rows, centres))
    return places


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


def _compute(
    encoder: Encoder,
    places: list[Place],
    partial: PartialRows,
    batch_size: int | Literal["auto"] | None,
    device: str | None,
    client: Client | None,
    *,
    progress_bar: bool | None,
) -> np.ndarray:
    """Features of all rows; what is finished is kept if the work is interrupted."""
    device = device or settings.device
    if batch_size == "auto":
        batch_size = encoder.fitting_batch_size(device)
        logger.info("embed: batches of %d tiles", batch_size or settings.batch_size)
    how: dict[str, Any] = {"batch_size": batch_size or settings.batch_size, "device": device}
    shown = settings.progress_bar if progress_bar is None else progress_bar
    with partial:
        for place in places:
            runs = encoder.runs(place.slide, place.centres, batch_size=how["batch_size"])
            todo = [run for run in runs if not partial.done[place.rows[run]].all()]
            if client is None:
                found = encoder.embed_runs(place.slide, place.centres, todo, **how, progress_bar=shown)
            else:
                found = _on_cluster(encoder, place, todo, how, client, progress_bar=shown)
            for number, values in found:
                _check_finite(encoder, values)  # before it is kept: the same call would find it again
                partial.write(place.rows[todo[number]], values)
        if not partial.done.all():
            raise DataValueError(f"encoder {encoder.name!r} left out {int((~partial.done).sum())} tiles")
    partial.discard()
    return partial.values()


def _check_finite(encoder: Encoder, values: np.ndarray) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        narrow = encoder.params().get("dtype") == "float16"
        raise DataValueError(
            f"encoder {encoder.name!r} gave NaN or infinite features for {int(bad.sum())} of {len(values)} tiles"
            + ("; float16 may be too narrow for it, take dtype='bfloat16'" if narrow else "")
        )


def _on_cluster(
    encoder: Encoder,
    place: Place,
    runs: list[np.ndarray],
    how: dict[str, Any],
    client: Client,
    *,
    progress_bar: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """What ``encoder.embed_runs`` yields, a run a task."""
    from tqdm.auto import tqdm

    shared = {"travelling": _Travelling(encoder), "slide": place.slide, "how": how}
    tasks = (place.centres[run] for run in runs)
    results = iter_tasks(_embed_run, tasks, shared=shared, client=client)
    bar = tqdm(results, total=len(runs), unit="run", desc="tiles", disable=not progress_bar or len(runs) < 2)
    yield from enumerate(bar)


class _Travelling:
    """An encoder on its way to a worker, where one with a weights file is made anew: gigabytes need not travel."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __reduce__(self) -> tuple[Any, ...]:
        file = self.encoder.weights_file()
        if file is None:
            return _Travelling, (self.encoder,)
        return _made_there, (self.encoder.params(), str(file.absolute()), self.encoder.is_compiled)


def _made_there(params: dict[str, Any], weights: str, is_compiled: bool) -> _Travelling:  # noqa: FBT001  pickle calls it so
    try:
        encoder = create(**params, weights=weights)
    except MissingWeightsError as error:
        raise MissingWeightsError(
            f"a worker of client= lacks the weights of encoder {params['name']!r}, which must lie under the same path there: "
            f"{error}"
        ) from error
    if is_compiled:
        encoder.compile()
    return _Travelling(encoder)


def _embed_run(centres: np.ndarray, travelling: _Travelling, slide: Slide, how: dict[str, Any]) -> np.ndarray:
    ((_, values),) = travelling.encoder.embed_runs(slide, centres, [np.arange(len(centres))], **how, progress_bar=False)
    return values


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


def spot_radius(sdata: SpatialData, places: list[Place]) -> float | None:
    """Median over the regions, for laying tiles of the same size on other slides; points have none."""
    try:
        return float(np.median([shape_radius(sdata, place.shapes_key, place.slide) for place in places]))
    except GeometryError:
        return None


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
