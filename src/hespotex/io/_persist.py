"""Write elements of an object into the store it was read from, so that a kill at any moment loses nothing.

SpatialData does not overwrite an element of the store an object lives in, and deleting it first leaves a moment in
which it is nowhere. Here the new version is written beside the store and takes the old one's place by one exchange of
names; the old one is deleted last.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import check_writable, exchange, replacing
from .._logging import logger
from ..data.elements import shapes_kept
from ..errors import DataTypeError, DataValueError, MissingKeyError
from ._lazy import places_of, read_again

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["persist"]

_LAZY = ("images", "labels", "points")  # their old files are gone afterwards: they are read anew


def persist(sdata: SpatialData, names: str | Sequence[str] | None = None) -> None:
    """Write elements to the zarr store that `sdata` was read from or written to, new ones and changed ones.

    A new version is written beside the store and then takes the place of the old one, which is deleted last. A kill, a
    full disk or an error at any moment leaves the store as it was or as it is to be, element by element. On systems that
    cannot exchange two names at once (other than Linux), a kill in the instant between two renamings leaves the element
    beside the store, and the next call puts it back. Of several calls at once, from threads or processes of this machine,
    each waits for the one before (not on Windows, nor on network drives that lock no folders).

    Parameters
    ----------
    sdata
        Object whose ``path`` names a store on this machine.
    names
        Elements to write, in any order: what is computed from the old version of another one is written before it. By
        default all tables, and the elements that the store lacks: whether another element has changed since it was read
        cannot be told.

    Returns
    -------
    ``None``. What `sdata` holds lazily of these elements is read anew from the store.

    Raises
    ------
    DataValueError
        If the object has no store, or it lies elsewhere; or if an element that is not written reads the old version of
        one that is.
    MissingKeyError
        If the object has no such element.
    OutputError
        If the store or the folder it lies in is read-only.
    OSError
        If the disk is full; the store is then as it was.

    Examples
    --------
    >>> import hespotex as hx
    >>> import tempfile, spatialdata
    >>> section = hx.datasets.synthetic(size_px=800, n_genes=20)
    >>> folder = tempfile.TemporaryDirectory()
    >>> section.write(f"{folder.name}/section.zarr")
    >>> hx.pp.embed(section, "rgb", progress_bar=False)
    >>> hx.io.persist(section, "table")
    >>> "X_rgb" in spatialdata.read_zarr(f"{folder.name}/section.zarr")["table"].obsm
    True
    """
    store = _store(sdata)
    kinds = {name: kind for kind, name, _ in sdata.gen_elements()}
    if names is None:
        stored = set(_stored(store))
        chosen = [name for name, kind in kinds.items() if kind == "tables" or name not in stored]
    else:
        chosen = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in chosen if name not in kinds]:
        raise MissingKeyError(f"names={unknown} are no elements of the object; there are {sorted(kinds)}")
    chosen = _readers_first(sdata, store, kinds, list(dict.fromkeys(chosen)))
    for place in (
        store,
        store / "zarr.json",
    ):  # the new version is written beside it, the exchange changes what is in it
        check_writable(place, f"sdata.path={str(store)!r}")

    beside = store.with_name(f".{store.name}.hespotex")
    with _alone(store):
        _put_back(store, beside)
        try:
            for name in chosen:
                _replace(sdata, store, beside, kinds[name], name)
            sdata.write_attrs()
        except Exception:
            _put_back(store, beside)
            raise
        finally:
            if beside.is_dir() and not _waiting(beside):
                shutil.rmtree(beside, ignore_errors=True)
    if chosen:
        logger.info("persist: wrote %s to %s", ", ".join(chosen), store)


def _store(sdata: Any) -> Path:
    if not hasattr(sdata, "gen_elements"):
        raise DataTypeError(f"sdata must be a SpatialData, got {type(sdata).__name__}")
    if sdata.path is None:
        raise DataValueError("sdata lives in memory only; write it first: sdata.write('<folder>.zarr')")
    store = Path(str(sdata.path)).resolve()  # where a link leads, on whose disk names can be exchanged
    if not (store / "zarr.json").is_file():
        raise DataValueError(f"sdata.path={str(sdata.path)!r} is no zarr store (format 3) on this machine")
    return store


def _stored(store: Path) -> list[str]:
    kinds = ("images", "labels", "shapes", "points", "tables")
    return [place.name for kind in kinds for place in (store / kind).glob("*") if (place / "zarr.json").is_file()]


def _readers_first(sdata: SpatialData, store: Path, kinds: dict[str, str], chosen: list[str]) -> list[str]:
    """`chosen` in an order in which none is replaced while another one is lazily computed from it.

    That other one would be computed anew, from the new version. One that was written reads its own files.
    """
    files = {name: _files_of(sdata[name]) for name in kinds}
    places = {name: (store / kinds[name] / name).resolve() for name in chosen}
    order: list[str] = []
    while left := [name for name in chosen if name not in order]:
        readers = {
            name: [
                other
                for other in kinds
                if other not in {name, *order} and any(file.is_relative_to(places[name]) for file in files[other])
            ]
            for name in left
        }
        free = next((name for name in left if not readers[name]), None)
        if free is None:
            name, other = left[0], readers[left[0]][0]
            remedy = (
                "each reads the other: load them into memory first"
                if other in chosen
                else f"persist both: hx.io.persist(sdata, [{other!r}, {name!r}])"
            )
            raise DataValueError(f"names: {name!r} cannot be replaced while {other!r} is computed from it; {remedy}")
        order.append(free)
    return order


def _files_of(element: Any) -> set[Path]:
    """Files and folders that a lazy element is computed from."""
    from anndata import AnnData
    from spatialdata import get_dask_backing_files

    if isinstance(element, AnnData):
        return places_of(element)
    try:
        return {Path(file).resolve() for file in get_dask_backing_files(element)}
    except AttributeError:  # spatialdata knows no zarr arrays in memory
        return set()


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Keep other calls off the store, by a lock on its folder, which ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(store, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(sdata: SpatialData, store: Path, beside: Path, kind: str, name: str) -> None:
    """Write one element beside the store and let it take its place."""
    from spatialdata import SpatialData, read_zarr

    staging = beside / uuid.uuid4().hex
    try:
        staging.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The table is annotating")  # shapes that stay where they are
            alone = SpatialData.init_from_elements({name: sdata[name]})
            with shapes_kept(alone):
                alone.write(staging / "store", consolidate_metadata=False)
        new, place = staging / "store" / kind / name, store / kind / name
        _sync(new)
        consolidated = _drop_consolidated(store)
        if not place.parent.is_dir():
            new.parent.rename(place.parent)  # the first of its kind: the whole group is new
        elif not place.is_dir():
            new.rename(place)
        elif not exchange(new, place):
            aside = beside / f"{kind}.{name}"  # where `_put_back` looks for it
            place.rename(aside)
            new.rename(place)
            shutil.rmtree(aside)
        if consolidated:
            sdata.write_consolidated_metadata()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if kind in _LAZY:
        sdata[name] = getattr(read_zarr(store, selection=(kind,)), kind)[name]
    elif kind == "tables":
        read_again(sdata[name], place)


def _waiting(beside: Path) -> list[Path]:
    """Old versions that a kill left outside the store."""
    return [place for place in beside.glob("*.*") if (place / "zarr.json").is_file()]


def _put_back(store: Path, beside: Path) -> None:
    """Undo what a kill between two renamings left."""
    for aside in _waiting(beside):
        kind, _, name = aside.name.partition(".")
        place = store / kind / name
        if place.is_dir():  # the new version is in
            shutil.rmtree(aside)
        else:
            aside.rename(place)
            logger.warning("persist: put %r back, whose replacement was interrupted", name)
    shutil.rmtree(beside, ignore_errors=True)


def _drop_consolidated(store: Path) -> bool:
    """Take the copy of all metadata out of the root: while an element changes, it would describe the old one."""
    root = store / "zarr.json"
    metadata = json.loads(root.read_text())
    if not metadata.pop("consolidated_metadata", None):
        return False
    with replacing(root) as part:
        part.write_text(json.dumps(metadata))
    return True


def _sync(folder: Path) -> None:
    """Have the files on the disk before the old version goes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
