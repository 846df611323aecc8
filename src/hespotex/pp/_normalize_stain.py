"""The colours of one slide's stain, given to another."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._version import __version__
from ..data.geometry import Slide, find_image_key, resolve_slide, slide_element, slide_images
from ..data.provenance import from_uns
from ..data.tissue import tissue_outline
from ..data.transaction import restored_on_error
from ..data.wsi import has_reader
from ..errors import DataTypeError, DataValueError, MissingKeyError
from ..image.stain import METHODS, StainFit, StainMap, fit_stain_to, stain_map, stained
from ..image.stream import iter_tiles
from ._detect_tissue import detect_tissue
from ._free import check_elements_free

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

__all__ = ["normalize_stain"]

Method = Literal["macenko", "vahadane", "reinhard"]

WINDOWS = 256  # about so many, spread over the tissue: a chunk is decoded for each
WINDOW_PX = 32
SAMPLE_MPP = 1.0  # nuclei are resolved; where pixels mix both dyes, the two cannot be told apart


def normalize_stain(
    sdata: SpatialData,
    method: Method | None = None,
    *,
    reference: SpatialData | Mapping[str, Any] | str,
    image_key: str | None = None,
    reference_image_key: str | None = None,
    shapes_key: str | None = None,
    match_strength: bool = True,
    options: Mapping[str, Any] | None = None,
    key_added: str | None = None,
    copy: bool = False,
    progress_bar: bool | None = None,
) -> DataArray | DataTree | None:
    """Give an image the stain of another: scanners and laboratories differ more than tissues do.

    Both stains are fitted by squidpy on about 256 small windows of tissue, at 1 µm per pixel. The result is lazy: a map
    of colours that each chunk goes through when it is read. It depends on a pixel's colour alone, hence not on chunks or
    their order, and each level of a pyramid goes through it on its own. Nothing but `reference` and the image itself has
    a say in it: fit the reference on a training slide and give it to the others.

    Methods are those of Reinhard :cite:p:`reinhard2001`, Macenko :cite:p:`macenko2009` and Vahadane
    :cite:p:`vahadane2016`.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale.
    method
        ``"macenko"`` (default; directions of the two dyes in absorbance by its extreme angles), ``"vahadane"`` (by sparse
        factorisation), or ``"reinhard"`` (mean and spread of colours; unstained glass keeps its own). That of `reference`
        where it is a record.
    reference
        Where the wanted colours come from: another object, the name of an image in `sdata`, or a record that this function
        wrote, ``other.attrs["hespotex"]["stain"][key]``, which gives the same map without the slide.
    image_key
        Name in ``sdata.images``; may be left out where there is only one that is not the result of this function.
    reference_image_key
        The same in `reference`, where that is an object.
    shapes_key
        Tissue outlines; by default those that :func:`make_tiles` would take. Where there are none, tissue is detected and
        not written.
    match_strength
        Whether the amounts of both dyes are scaled to the reference's, by their 99th percentiles, as Macenko and Vahadane do.
        If not, only the colours change, as in squidpy.
    options
        Fields of squidpy's ``MacenkoParams``, ``VahadaneParams`` or ``ReinhardParams``.
    key_added
        Name of the new image; ``"<image>_normalized"`` by default.
    copy
        Return the image in place of writing it.
    progress_bar
        The setting by default.

    Returns
    -------
    The new image if `copy`, else ``None`` and these are written:

    ``images["<image>_normalized"]``
        (c, y, x) uint8, lazy, with the levels, chunks and transformations of the image. Name it with ``image_key=`` from
        then on.
    ``attrs["hespotex"]["stain"]["<image>_normalized"]``
        Both fits, method, parameters and versions; on disk after ``sdata.write_attrs()``.

    Raises
    ------
    GeometryError
        If no tissue is found.
    DataValueError
        If too few pixels are stained, they do not hold two dyes that resemble haematoxylin and eosin, `method` is not that
        of a record, or `key_added` is taken by something else.
    ScaleError
        If the scale of an image is unknown.

    Examples
    --------
    >>> import hespotex as hx
    >>> hx.pp.normalize_stain(test, reference=train)  # doctest: +SKIP
    >>> hx.pp.embed(test, image_key="image_normalized")  # doctest: +SKIP
    """
    from spatialdata import SpatialData

    key = _image_key(sdata, image_key)
    name = f"{key}{Keys.NORMALIZED_SUFFIX}" if key_added is None else key_added
    if not copy:
        check_elements_free(
            sdata,
            {name: "images"},
            key_added=name,
            maker="normalize_stain",
            is_ours=lambda _: name in _records(sdata),
        )
    if name == key:
        raise DataValueError(f"key_added={name!r} is the image itself; its pixels are never replaced")
    if isinstance(reference, Mapping):
        wanted, source = _from_record(reference, method)
        method = wanted.method  # type: ignore[assignment]
        options = _options_of(reference) if options is None else options
    elif not isinstance(reference, str | SpatialData):
        raise DataTypeError(
            f"reference must be a SpatialData, the name of an image or a stored record, got {type(reference).__name__}"
        )
    method = method or "macenko"
    if method not in METHODS:
        raise DataValueError(f"method={method!r} is unknown; possible: {', '.join(map(repr, METHODS))}")
    own, n_pixels = _fit(sdata, key, shapes_key, method, options, progress_bar=progress_bar)
    if isinstance(reference, str):
        wanted, _ = _fit(sdata, find_image_key(sdata, reference), None, method, options, progress_bar=progress_bar)
        source = reference
    elif isinstance(reference, SpatialData):
        source = _image_key(reference, reference_image_key)
        wanted, _ = _fit(reference, source, None, method, options, progress_bar=progress_bar)
        source = str(reference.attrs.get(Keys.NAMESPACE, {}).get("name") or source)
    image = _mapped(slide_element(sdata, key), stain_map(own, wanted, match_strength=match_strength))
    if copy:
        return image
    record = {
        "created_by": "hespotex.pp.normalize_stain",
        "hespotex_version": __version__,
        "squidpy_version": version("squidpy"),
        "image_key": key,
        "method": method,
        "options": dict(options or {}),
        "match_strength": bool(match_strength),
        "reference_name": source,
        "reference": wanted.to_record(),
        "own": own.to_record(),
        "n_pixels": n_pixels,
    }
    with restored_on_error(sdata):
        sdata[name] = image
        sdata.attrs.setdefault(Keys.NAMESPACE, {}).setdefault(Keys.STAIN, {})[name] = record
    logger.info("normalize_stain: %s of %r by %s; wrote images[%r]", key, source, method, name)
    return None


def _records(sdata: SpatialData) -> Mapping[str, Any]:
    """Records of the images that this function made."""
    records = getattr(sdata, "attrs", {}).get(Keys.NAMESPACE, {}).get(Keys.STAIN, {})
    return records if isinstance(records, Mapping) else {}


def _image_key(sdata: SpatialData, image_key: str | None) -> str:
    """The image that is meant: the one named, or the only one that was not made here."""
    if image_key is None and hasattr(sdata, "images") and not has_reader(sdata):
        originals = [name for name in slide_images(sdata) if name not in _records(sdata)]
        image_key = originals[0] if len(originals) == 1 else None
    return find_image_key(sdata, image_key)


def _from_record(record: Mapping[str, Any], method: str | None) -> tuple[StainFit, str]:
    """The reference of a record, whole or its part ``"reference"``, and the name of the slide that it was fitted on."""
    entry = from_uns(record)
    fit = StainFit.from_record(entry.get("reference", entry))
    if method not in (None, fit.method):
        raise DataValueError(f"method={method!r}, but the record given as reference was fitted by {fit.method!r}")
    return fit, str(entry.get("reference_name", "record"))


def _options_of(record: Mapping[str, Any]) -> dict[str, Any]:
    options = record.get("options", {})
    return dict(options) if isinstance(options, Mapping) else {}


def _fit(
    sdata: SpatialData,
    key: str,
    shapes_key: str | None,
    method: str,
    options: Mapping[str, Any] | None,
    *,
    progress_bar: bool | None,
) -> tuple[StainFit, int]:
    """Stain of an image, and on how many pixels it was fitted."""
    slide = resolve_slide(sdata, image_key=key)
    pixels = stained(_sample(slide, _tissue(sdata, slide, shapes_key, progress_bar=progress_bar)))
    try:
        return fit_stain_to(pixels, method, options), len(pixels)
    except DataValueError as error:
        raise DataValueError(f"image {key!r}: {error}") from error


def _tissue(sdata: SpatialData, slide: Slide, shapes_key: str | None, *, progress_bar: bool | None) -> BaseGeometry:
    try:
        return tissue_outline(sdata, slide, shapes_key)
    except MissingKeyError:
        if shapes_key is not None:
            raise
    found = detect_tissue(sdata, image_key=slide.key, copy=True, progress_bar=progress_bar)
    assert found is not None
    return found.geometry.union_all()


def _sample(slide: Slide, tissue: BaseGeometry) -> np.ndarray:
    """Pixels in the tissue, from windows on a lattice over it, (n, 3) uint8, in the order of the lattice."""
    from shapely import contains_xy, prepare

    from ..data.lattice import lay_lattice

    mpp = max(SAMPLE_MPP, slide.mpp)
    prepare(tissue)
    # Small or thin tissue may slip through a lattice of the spacing that its area asks for.
    pitch = max(float(np.sqrt(tissue.area / WINDOWS)), WINDOW_PX / 4 * mpp / slide.mpp)
    centres, _ = lay_lattice(slide.shape, pitch, "square")
    centres = centres[contains_xy(tissue, centres[:, 0], centres[:, 1])]
    pixels = np.empty((len(centres), WINDOW_PX, WINDOW_PX, 3), dtype=np.uint8)
    for batch in iter_tiles(slide, centres, tile_um=WINDOW_PX * mpp, tile_px=WINDOW_PX, progress_bar=False):
        pixels[batch.rows] = batch.pixels
    offset = (np.arange(WINDOW_PX) + 0.5 - WINDOW_PX / 2) * mpp / slide.mpp
    inside = contains_xy(
        tissue,
        *np.broadcast_arrays(
            *(centres[:, 0, None, None] + offset[None, None, :], centres[:, 1, None, None] + offset[None, :, None])
        ),
    )
    return pixels[inside]


def _mapped(image: DataArray | DataTree, colours: StainMap) -> DataArray | DataTree:
    """`image` with its colours mapped, level by level, when it is read; what else it carries comes along."""
    from xarray import DataArray, DataTree

    if isinstance(image, DataArray):
        return _mapped_level(image, colours)
    levels = {}
    for name, node in image.children.items():
        levels[name] = _mapped_level(next(iter(node.data_vars.values())), colours).to_dataset(name="image")
    return DataTree.from_dict(levels)


def _mapped_level(level: DataArray, colours: StainMap) -> DataArray:
    import dask.array as da

    level = level.transpose("c", "y", "x")
    pixels = da.asarray(level.data).rechunk({0: -1})
    mapped = pixels.map_blocks(colours, dtype=np.uint8, meta=np.empty((0, 0, 0), dtype=np.uint8))
    return level.copy(data=mapped).assign_coords(c=["r", "g", "b"])
