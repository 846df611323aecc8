"""Image features and shape numbers of each nucleus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._tasks import check_client
from ..data.geometry import shape_geometries
from ..data.provenance import record
from ..data.tables import AnnotatedTable, resolve_table, row_positions, table_role
from ..data.transaction import restored_on_error
from ..encoders import Encoder, TileEncoder
from ..errors import AmbiguousKeyError, DataTypeError, DataValueError, MissingKeyError
from ..segmentation._outline import FEATURES
from ..segmentation._polygons import SHAPE_FEATURES, largest_pieces, measure_polygons
from ._embed import check_batch_size, embed_places, resolve_encoder
from ._free import check_slot_free
from ._places import Place, new_table, resolve_places

if TYPE_CHECKING:
    from distributed import Client
    from spatialdata import SpatialData

    from ..data.geometry import Slide

__all__ = ["embed_nuclei"]

MORPHOLOGY_UM = 16.0  # a nucleus and its rim; the context is three times as wide
GREY = 128


def embed_nuclei(
    sdata: SpatialData,
    encoder: str | Encoder = "morphology",
    *,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str = Keys.NUCLEI,
    table_key: str | None = None,
    mpp: float | None = None,
    tile_um: float | None = None,
    morphometrics: bool = True,
    masked: bool = False,
    batch_size: int | Literal["auto"] | None = None,
    device: str | None = None,
    client: Client | None = None,
    key_added: str | None = None,
    copy: bool = False,
    progress_bar: bool | None = None,
    **encoder_options: Any,
) -> np.ndarray | None:
    """Turn the image around each nucleus into a row of features, and keep its shape beside them.

    It is :func:`hespotex.pp.embed` with the sizes of nuclei: features that are there already are not computed again, and
    interrupted work goes on where it stopped.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale, and nuclei: those of :func:`hespotex.pp.segment_nuclei`, or outlines of
        another tool.
    encoder
        Name in the registry (:func:`hespotex.encoders.available`) or an encoder. ``"crops"`` keeps the pixels,
        ``"dense:…"`` takes the tokens of a vision transformer, which costs far less than a tile for each nucleus.
    image_key
        Name in ``sdata.images``; may be left out where the nuclei lie on only one.
    shapes_key
        The nuclei.
    table_key
        Their table; by default ``"nuclei_features"``. Nuclei without a table get one.
    mpp
        Resolution the encoder works at, in µm per pixel, in place of its own.
    tile_um
        Side of the tile around the centroid, in µm. By default 16 for ``morphology``, which adds a context of 48, and
        the encoder's own for others: networks look at 0.5 µm/px, which is more than a nucleus. For smaller tiles the
        image must be fine enough, or a convolutional network be given a smaller input: ``tile_um=32, tile_px=64``.
    morphometrics
        Whether to keep the shape numbers in ``obsm``, too, where models read features.
    masked
        Whether to make grey what lies outside the outline. For encoders that look at one tile at a time.
    batch_size
        Tiles per forward pass; the setting by default, ``"auto"`` as in :func:`hespotex.pp.embed`.
    device
        The setting by default.
    client
        A ``dask.distributed.Client``, as in :func:`hespotex.pp.embed`.
    key_added
        Key in ``obsm``; ``"X_<encoder>"`` by default, ``"X_<encoder>_masked"`` if `masked`.
    copy
        Return the features in place of writing anything.
    progress_bar
        The setting by default.
    encoder_options
        Further options of the encoder, such as ``weights=``.

    Returns
    -------
    The features (n, d) if `copy`, else ``None`` and these are written to the table of the nuclei:

    ``obsm["X_<encoder>"]``, ``obs["<encoder>_padded"]``, ``uns["hespotex"]["X_<encoder>"]``
        As :func:`hespotex.pp.embed` writes them.
    ``obsm["X_morphometrics"]``
        Shape numbers as they are in the table of :func:`hespotex.pp.segment_nuclei`, float32 (n, 9). For other tables
        the seven that follow from the outline alone. Their names are in ``uns["hespotex"]["X_morphometrics"]``.

    Raises
    ------
    MissingKeyError
        If there are no nuclei.
    DataValueError
        If `masked` does not fit the encoder, or a key is taken by something that this function did not make.
    GeometryError, ScaleError, MissingWeightsError
        As :func:`hespotex.pp.embed` does.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=400)
    >>> hx.pp.segment_nuclei(sdata, n_jobs=1)
    >>> hx.pp.embed_nuclei(sdata)
    >>> sorted(sdata["nuclei_features"].obsm)
    ['X_morphology', 'X_morphometrics', 'spatial']
    """
    check_batch_size(batch_size)
    check_client(client)
    _check_nuclei(sdata, shapes_key)
    if isinstance(encoder, str) and encoder.rpartition(":")[2] == "morphology" and tile_um is None:
        tile_um = MORPHOLOGY_UM
    encoder = resolve_encoder(encoder, mpp=mpp, tile_um=tile_um, **encoder_options)
    found = _existing_table(sdata, shapes_key, table_key)
    table = found or new_table(sdata, shapes_key, role="nuclei")
    places = resolve_places(sdata, table, image_key)
    outlines = _outlines(sdata, table, places) if masked or morphometrics or found is None else {}
    if found is None:
        table = new_table(sdata, shapes_key, role="nuclei", columns=_shape_numbers(table, places, outlines))
    depends_on: tuple[Any, ...] = ()
    if masked:
        from shapely import get_coordinates

        encoder = _Masked(encoder, places, outlines)
        depends_on = tuple(get_coordinates(outlines[place.shapes_key]) for place in places)
    if morphometrics and not copy:
        check_slot_free(table.adata, "obsm", Keys.MORPHOMETRICS, maker="embed_nuclei")
    name = Keys.nuclei_table(shapes_key)
    with restored_on_error(sdata):
        features = embed_places(
            sdata,
            table,
            places,
            encoder,
            batch_size=batch_size,
            device=device,
            client=client,
            key_added=key_added,
            copy=copy,
            progress_bar=progress_bar,
            name=name,
            depends_on=depends_on,
        )
        if morphometrics and not copy:
            _keep_morphometrics(table, places, outlines)
    return features


def _check_nuclei(sdata: SpatialData, shapes_key: str) -> None:
    if not hasattr(sdata, "shapes"):
        raise DataTypeError(f"an image is needed to embed: sdata must be a SpatialData, got {type(sdata).__name__}")
    advice = "find nuclei with hx.pp.segment_nuclei(sdata), or name those of another tool with shapes_key="
    if shapes_key not in sdata.shapes:
        raise MissingKeyError(f"shapes_key={shapes_key!r} is not among the shapes {list(sdata.shapes)}; {advice}")
    if len(sdata.shapes[shapes_key]) == 0:
        raise MissingKeyError(f"shapes {shapes_key!r} are empty; {advice}")


def _existing_table(sdata: SpatialData, shapes_key: str, table_key: str | None) -> AnnotatedTable | None:
    """The table of the nuclei, which is not that of a prediction for them."""
    own = Keys.nuclei_table(shapes_key)
    if table_key is None and own in sdata.tables:
        table_key = own
    try:
        table = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    except AmbiguousKeyError:
        raise
    except MissingKeyError:
        if table_key is not None:
            raise
        return None
    is_prediction = table_key is None and table_role(table.key or "", table.adata) == "prediction"
    return None if is_prediction else table


def _outlines(sdata: SpatialData, table: AnnotatedTable, places: list[Place]) -> dict[str, np.ndarray]:
    """Polygons in level-0 pixels of the rows of each region."""
    outlines = {}
    for place in places:
        _, positions = row_positions(sdata, table, place.shapes_key)
        geometries = shape_geometries(sdata, place.shapes_key, place.slide).to_numpy()[positions]
        outlines[place.shapes_key] = largest_pieces(geometries)
    return outlines


def _shape_numbers(
    table: AnnotatedTable, places: list[Place], outlines: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Numbers by name of all rows: those the table holds, or what follows from the outlines."""
    adata = table.adata
    if set(FEATURES) <= set(adata.var_names):
        values = adata[:, list(FEATURES)].to_df().to_numpy(dtype=np.float32)
        return dict(zip(FEATURES, values.T, strict=True))
    numbers = np.zeros((adata.n_obs, len(SHAPE_FEATURES)), np.float32)
    for place in places:
        numbers[place.rows] = measure_polygons(outlines[place.shapes_key], place.slide.mpp)
    return dict(zip(SHAPE_FEATURES, numbers.T, strict=True))


def _keep_morphometrics(table: AnnotatedTable, places: list[Place], outlines: Mapping[str, np.ndarray]) -> None:
    numbers = _shape_numbers(table, places, outlines)
    table.adata.obsm[Keys.MORPHOMETRICS] = np.column_stack(list(numbers.values()))
    record(table.adata, Keys.MORPHOMETRICS, created_by="hespotex.pp.embed_nuclei", features=list(numbers))
    logger.info("embed_nuclei: %d shape numbers; wrote obsm[%r]", len(numbers), Keys.MORPHOMETRICS)


class _Masked(TileEncoder):
    """An encoder that sees of each tile only what lies inside the outline of the nucleus."""

    def __init__(self, encoder: Encoder, places: list[Place], outlines: Mapping[str, np.ndarray]) -> None:
        if not isinstance(encoder, TileEncoder):
            raise DataValueError(
                f"masked=True is for encoders that look at one tile at a time; {encoder.name!r} describes the whole slide "
                f"at once. Take 'crops' or a network such as 'timm:resnet50', or leave it out"
            )
        self._encoder = encoder
        self.info = encoder.info  # type: ignore[misc]  # of this encoder, not of a class of them
        self.name, self.n_features = f"{encoder.name}_masked", encoder.n_features
        self.tile_px, self.tile_um, self.mpp = encoder.tile_px, encoder.tile_um, encoder.mpp
        self._nuclei = {
            key: (
                np.concatenate([place.centres for place in places if place.slide.key == key]),
                np.concatenate([outlines[place.shapes_key] for place in places if place.slide.key == key]),
            )
            for key in {place.slide.key for place in places}
        }

    @property
    def trained_mpp(self) -> tuple[float, ...]:
        """Those of the encoder."""
        return self._encoder.trained_mpp

    def params(self) -> dict[str, Any]:
        """Those of the encoder, and that tiles were masked."""
        return {**self._encoder.params(), "masked": True}

    def code_hash(self) -> str:
        """That of the encoder."""
        return self._encoder.code_hash()

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        return self._encoder.encode(tiles, device)

    def _tiles(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from scipy.spatial import KDTree
        from shapely import get_coordinates
        from skimage.draw import polygon

        known, outlines = self._nuclei[slide.key]
        own = outlines[KDTree(known).query(centres)[1]]  # `centres` are some of those known, in any order
        for rows, tiles in self._encoder._tiles(slide, centres, batch_size=batch_size, progress_bar=progress_bar):
            seen = np.full_like(tiles, GREY)
            for position, row in enumerate(rows):
                ring = get_coordinates(own[row]) - centres[row]
                # The middle of pixel i lies at i + 0.5.
                x, y = (ring * slide.mpp / self.mpp + self.tile_px / 2 - 0.5).T
                inside = polygon(y, x, shape=(self.tile_px, self.tile_px))
                seen[position][inside] = tiles[position][inside]
            yield rows, seen
