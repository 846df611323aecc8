"""Which result in the folder belongs to which slide, and names for those that have none yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from ..._keys import sanitize
from ...errors import DataValueError
from ...io._open import store_beside
from .manifest import Manifest, Row
from .slides import leads_to, printable
from .written import Written, written

__all__ = ["check_outside", "name_outputs"]


def check_outside(out: Path, slides: Iterable[Path]) -> None:
    """Raise if `out` is in a store that is read, as nothing is written there.

    Raises
    ------
    DataValueError
        Naming the store.
    """
    above = {leads_to(out), *leads_to(out).parents}
    if within := next((place for place in _read_from(slides) if leads_to(place) in above), None):
        raise DataValueError(
            f"out={str(out)!r} lies in {within}, which is read and must not change; name another folder"
        )


def name_outputs(
    manifest: Manifest, out: Path, suffix: str, slides: Sequence[Path], results: Mapping[Path, Written]
) -> None:
    """Give each slide a row: that which it has, one for a result that the manifest has lost, or one with a free name.

    Parameters
    ----------
    manifest
        Rows are added to it.
    out, suffix
        Folder and suffix of the results.
    slides
        All slides.
    results
        What the result of each will say of itself, but for those that cannot be looked at.
    """
    reserved = _inputs_in(out, slides)
    for slide in slides:
        row = manifest.rows.get(printable(slide))
        if row and (not row.output.endswith(suffix) or row.output.casefold() in reserved):
            del manifest.rows[row.slide]
    taken = reserved | {row.output.casefold() for row in manifest.rows.values()}
    new = [slide for slide in slides if printable(slide) not in manifest.rows]
    given = _lost(out, suffix, taken, {slide: results[slide] for slide in new if slide in results}) if new else {}
    taken |= {output.casefold() for output in given.values()}
    for slide in new:
        output = given.get(slide) or _free(sanitize(slide.name.removesuffix(slide.suffix)), suffix, taken)
        taken.add(output.casefold())
        manifest.rows[printable(slide)] = Row(printable(slide), output)


def _lost(out: Path, suffix: str, taken: set[str], slides: Mapping[Path, Written]) -> dict[Path, str]:
    """Names of results of `slides` that no row knows of: the manifest may be lost, and a result says what it is."""
    paths = sorted(path for path in out.glob(f"*{suffix}") if path.name.casefold() not in taken)
    results = {path.name: said for path in paths if (said := written(path))}
    found: dict[Path, str] = {}
    # Those that are just what is wanted first, as slides of one name may be copies.
    for key in (Written.exactly, Written.but_for_time):
        by_key = {key(said): name for name, said in results.items() if name not in found.values()}
        for slide, wanted in slides.items():
            if slide not in found and (name := by_key.pop(key(wanted), None)):
                found[slide] = name
    return found


def _free(stem: str, suffix: str, taken: set[str]) -> str:
    names = (f"{stem}{number}{suffix}" for number in chain([""], (f"-{n}" for n in count(2))))
    return next(name for name in names if name.casefold() not in taken)


def _read_from(slides: Iterable[Path]) -> list[Path]:
    """`slides`, and the stores that LazySlide keeps beside them."""
    return [place for slide in slides for place in (slide, store_beside(slide)) if place is not None]


def _inputs_in(out: Path, slides: Iterable[Path]) -> set[str]:
    """Names in `out` of what is read, which no result may have."""
    places = [place for path in _read_from(slides) for place in (leads_to(path.parent) / path.name, leads_to(path))]
    return {place.name.casefold() for place in places if place.parent == leads_to(out)}
