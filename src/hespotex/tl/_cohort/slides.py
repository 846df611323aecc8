"""The slides of a cohort: where they lie, and whether one is the same as before."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataValueError
from ...io._open import SUFFIXES, is_store, slides_beside, store_beside

__all__ = ["SUFFIXES", "SlideState", "find_slides", "printable", "state_of"]

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

    Raises
    ------
    DataValueError
        If there is no slide, or one is named twice.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    found: list[Path] = []
    for path in map(Path, named):
        if path.is_dir() and not is_store(path) and path.suffix != ".zarr":
            if path.resolve() == but.resolve():
                raise DataValueError(f"out={str(but)!r} is the folder of the slides; name another, or one inside it")
            inside = sorted(_inside(path, {but.resolve()}))
            if not inside:
                raise DataValueError(
                    f"paths: folder {str(path)!r} holds no slide; looked for {', '.join(SUFFIXES)} there and below. Name "
                    "other files one by one"
                )
            found += inside
        else:
            found.append(path)
    places = _without_stores([path.absolute() for path in found])  # links stay: a slide goes by the name it was given
    if twice := sorted(str(place) for place, times in Counter(map(Path.resolve, places)).items() if times > 1):
        raise DataValueError(f"paths: the same slide is named more than once: {', '.join(twice[:5])}")
    if not places:
        raise DataValueError("paths is empty: name slides, or a folder of slides")
    return places


def _without_stores(places: Sequence[Path]) -> list[Path]:
    """`places`, with each LazySlide store replaced by its slide, which is opened with it, and once."""
    kept, given = [], set(places)
    for place in places:
        slides = slides_beside(place)
        if given.intersection(slides):
            continue
        kept.append(slides[0] if len(slides) == 1 else place)
    return kept


def _inside(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Slides in `folder` and below; a folder that is `seen` is not entered again, as links may lead in circles."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            yield path
        elif path.is_dir() and path.resolve() not in seen:
            yield from _inside(path, seen)


def printable(text: str | Path) -> str:
    """`text` with bytes of a file name that are no UTF-8 written out: tables and JSON cannot hold them."""
    return str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")


def state_of(path: Path) -> SlideState:
    """What is at `path` now: a file, a store, or a file with a folder of its data beside it (MIRAX).

    Raises
    ------
    OSError
        If it cannot be read.
    """
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
