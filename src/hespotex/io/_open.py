"""A slide from whatever lies at a path: a SpatialData store, an image file, or one with LazySlide's store beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._optional import optional_import
from ..errors import DataValueError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["SUFFIXES", "has_elements", "is_store", "open_slide", "slides_beside", "store_beside"]

# What is taken for a slide in a folder. Not JPEG and PNG: beside slides these are thumbnails.
SUFFIXES = (
    ".bif",
    ".btf",
    ".czi",
    ".mrxs",
    ".ndpi",
    ".scn",
    ".svs",
    ".svslide",
    ".tif",
    ".tiff",
    ".vms",
    ".vmu",
    ".zarr",
)
_PROPERTIES = "slide_properties"  # in the attributes of what a WSIData wrote
_SLIDE_GONE = (
    "{store} is LazySlide's store, which holds no pixels, and its slide is not beside it: no file {stem} with a suffix of "
    "slides (.svs, .tif, .ndpi, ...). Put the slide there"
)
_MARKS = ("zarr.json", ".zgroup")  # of any zarr store


def is_store(path: Path) -> bool:
    """Whether a zarr store lies at `path`."""
    return any((path / mark).is_file() for mark in _MARKS)


def store_beside(slide: Path) -> Path | None:
    """The store in which LazySlide keeps what it found on the slide file `slide`, if it lies there."""
    suffix = slide.suffix.lower()
    store = slide.with_suffix(".zarr")
    return store if suffix in SUFFIXES and suffix != ".zarr" and slide.is_file() and _is_lazyslide(store) else None


def slides_beside(store: Path) -> list[Path]:
    """Slide files that the LazySlide store `store` may belong to; none if it is no such store."""
    if not _is_lazyslide(store):
        return []
    beside = (path for path in store.parent.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in beside if path.with_suffix("").name == store.with_suffix("").name)


def has_elements(path: Path) -> bool:
    """Whether `path` may hold tables and shapes: a store, or a slide with one beside it."""
    return path.is_dir() or store_beside(path) is not None


def open_slide(path: str | Path, mpp: float | None = None) -> SpatialData:
    """The slide at `path`; `mpp` is for image files, which may not state theirs.

    Raises
    ------
    DataValueError
        If nothing is there, or nothing that is a slide.
    """
    path = Path(path)
    if not path.exists():
        raise DataValueError(f"{path} does not exist")
    if store := store_beside(path):
        return _open_both(path, store)
    slides = slides_beside(path)
    if len(slides) == 1:
        return _open_both(slides[0], path)
    if len(slides) > 1:
        raise DataValueError(
            f"{path} is LazySlide's store of one of {', '.join(slide.name for slide in slides)}; name the slide instead"
        )
    if path.is_file():
        from ._wsi import read_wsi

        return read_wsi(path, mpp=mpp)
    remedy = "a store that SpatialData.write made"
    if not is_store(path):
        raise DataValueError(
            f"{path} cannot be read as a SpatialData store: it is a plain folder; give the slide's file in it, or {remedy}"
        )
    import spatialdata

    try:
        sdata = spatialdata.read_zarr(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataValueError(f"{path} cannot be read as a SpatialData store ({error}); give {remedy}") from error
    if not list(sdata.gen_elements()):
        raise DataValueError(f"{path} holds no image, shapes or table of SpatialData; give {remedy}")
    if _is_lazyslide(path) and not sdata.images:
        raise DataValueError(_SLIDE_GONE.format(store=path, stem=path.stem))
    return sdata


def _is_lazyslide(path: Path) -> bool:
    """Whether a store was written by wsidata: it notes there of what slide it is."""
    return _PROPERTIES in _attributes(path)


def _attributes(store: Path) -> dict[str, Any]:
    for mark, key in (("zarr.json", "attributes"), (".zattrs", None)):
        try:
            found = json.loads((store / mark).read_text())
            found = found if key is None else found[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _open_both(slide: Path, store: Path) -> SpatialData:
    """Slide and store as LazySlide's object; nothing is written to the store."""
    wsidata = optional_import("wsidata", feature=f"{store}, which LazySlide wrote beside its slide", extra="wsi")
    try:
        return wsidata.open_wsi(slide, store=str(store))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataValueError(
            f"{slide} and LazySlide's store {store} cannot be opened together ({error}); if the store is of another slide, "
            "move it elsewhere"
        ) from error
