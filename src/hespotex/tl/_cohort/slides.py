"""The slides of a cohort: where they lie, and whether one is the same as before."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ..._logging import logger
from ...errors import DataTypeError, DataValueError
from ...io._open import SUFFIXES, is_store, slides_beside, store_beside
from .written import written

__all__ = ["SUFFIXES", "SlideState", "find_slides", "leads_to", "printable", "state_of"]

_SAMPLES = 16
_SAMPLE_BYTES = 65_536


@dataclass(frozen=True)
class SlideState:
    """By what a slide is known again: bytes, time of its last change, and a hash of samples of its content.

    `store` is a digest of names, sizes and times of the files in LazySlide's store beside it, where there is one.
    """

    size: int
    mtime_ns: int
    fingerprint: str
    store: str = ""


def find_slides(paths: str | Path | Sequence[str | Path], *, but: Path) -> list[Path]:
    """Absolute paths of all slides named, folders searched with all below them except for `but`, in order of their names.

    A slide that a search meets again, by a link or because it is named as well, is one.

    Raises
    ------
    DataTypeError
        If `paths` are none.
    DataValueError
        If there is no slide, or one is named twice.
    """
    places: list[_Place] = []
    for path in map(Path.expanduser, _listed(paths)):
        if not path.is_dir() or is_store(path) or path.suffix == ".zarr":
            places.append(_Place(path.absolute(), is_named=True))
            continue
        if leads_to(path) == leads_to(but):
            raise DataValueError(f"out={str(but)!r} is the folder of the slides; name another, or one inside it")
        inside = sorted(_inside(path, {leads_to(but)}))
        if not inside:
            raise DataValueError(
                f"paths: folder {str(path)!r} holds no slide; looked for {', '.join(SUFFIXES)} there and below, but for "
                "results of cohorts. Name other files one by one"
            )
        places += [_Place(found.absolute(), is_named=False) for found in inside]
    if not places:
        raise DataValueError("paths is empty: name slides, or a folder of slides")
    return _once(_without_stores(places))


class _Place(NamedTuple):
    """Of a slide, named or found in a folder; links stay in its path, as it goes by the name it was given."""

    path: Path
    is_named: bool


def _listed(paths: Any) -> list[Path]:
    try:
        return [Path(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]
    except TypeError:
        raise DataTypeError(f"paths must be a path or a list of paths, got {paths!r}") from None


def leads_to(path: Path) -> Path:
    """Where a path leads to through all links; unlike ``Path.resolve``, one in a circle is no error."""
    return Path(os.path.realpath(path))


def _without_stores(places: Sequence[_Place]) -> list[_Place]:
    """`places`, with each LazySlide store replaced by its slide, which is opened with it, and once."""
    kept, given = [], {place.path for place in places}
    for place in places:
        slides = slides_beside(place.path)
        if given.isdisjoint(slides):
            kept.append(place._replace(path=slides[0]) if len(slides) == 1 else place)
    return kept


def _once(places: Sequence[_Place]) -> list[Path]:
    """Paths, without those found that lead to one that was named, or found before."""
    named: dict[Path, Path] = {}
    for path in (place.path for place in places if place.is_named):
        if before := named.get(leads_to(path)):
            raise DataValueError(f"paths: the same slide is named more than once, as {before} and {path}; name it once")
        named[leads_to(path)] = path
    kept: list[Path] = []
    seen = set(named)
    for place in places:
        where = leads_to(place.path)
        if place.is_named or where not in seen:
            kept.append(place.path)
        else:
            logger.info("%s leads to %s, which is there already, and is left out", place.path, where)
        seen.add(where)
    return kept


def _inside(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Slides in `folder` and below; a folder that is `seen` is not entered again, as links may lead in circles."""
    seen.add(leads_to(folder))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            if _is_special(path):
                logger.info("%s is no file, and left out", path)
            elif path.suffix == ".zarr" and written(path):
                logger.info("%s is the result of a cohort, and left out", path)
            else:
                yield path
        elif path.is_dir() and leads_to(path) not in seen:
            yield from _inside(path, seen)


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, socket or device, which may be waited for without end."""
    try:
        mode = path.stat().st_mode
    except OSError:  # what is wrong is said when the slide is looked at
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def printable(text: str | Path) -> str:
    """`text` with bytes of a file name that are no UTF-8 written out: tables and JSON cannot hold them."""
    return str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")


def state_of(path: Path) -> SlideState:
    """What is at `path` now: a file, a store, or a file with a folder of its data beside it (MIRAX).

    Raises
    ------
    OSError, DataValueError
        If it cannot be read, or is not there.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which leads nowhere; mend or remove it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the name")
    if _is_special(path):
        raise DataValueError(f"{path} is a pipe, socket or device; give a file or a store")
    folder = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    files = [] if path.is_dir() else [path]
    files += sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{path} is an empty folder")
    state = hashlib.sha256()
    size = changed = 0
    for file in files:
        about = file.stat()
        size, changed = size + about.st_size, max(changed, about.st_mtime_ns)
        if len(files) > 1:
            state.update(f"{file.relative_to(path.parent)}\0{about.st_size}\0".encode())
    _sample(path if path.is_file() else _largest(files), state)
    return SlideState(size, changed, state.hexdigest(), _listing(store_beside(path)))


def _listing(store: Path | None) -> str:
    if store is None:
        return ""
    listing = hashlib.sha256()
    for file in sorted(file for file in store.rglob("*") if file.is_file()):
        about = file.stat()
        listing.update(
            f"{file.relative_to(store)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return listing.hexdigest()


def _largest(files: Sequence[Path]) -> Path:
    return max(files, key=lambda file: (file.stat().st_size, str(file)))


def _sample(path: Path, state: hashlib._Hash) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BYTES))
