"""Outlines from GeoJSON files, as QuPath and others export them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataValueError, MissingKeyError

__all__ = ["GivenOutlines", "is_geojson", "read_geojson"]

_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
_BAD = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError, EOFError)
_READ_CHARS = 1 << 22  # many features at a time; memory holds no more of the text
_BATCH = 1000
_NUCLEAR = {"cell", "detection"}  # QuPath's kinds of objects that are found, not drawn
# The ids of QuPath before 0.3 are not ids but kinds.
_OLD_KINDS = {
    "PathCellObject": "cell",
    "PathDetectionObject": "detection",
    "PathAnnotationObject": "annotation",
    "PathTileObject": "tile",
    "PathRootObject": "root",
}


@dataclass(frozen=True, eq=False)
class GivenOutlines:
    """Outlines that somebody else made.

    Attributes
    ----------
    geometries
        (n,) shapely geometries.
    ids
        Id of each, (n,) str or int64.
    classification
        Class of each, (n,) object, ``None`` where it has none; ``None`` if none has.
    """

    geometries: np.ndarray
    ids: np.ndarray
    classification: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> GivenOutlines:
        """Some of them, in the order of `rows`."""
        known = self.classification
        return GivenOutlines(self.geometries[rows], self.ids[rows], None if known is None else known[rows])


def is_geojson(path: str | os.PathLike[str]) -> bool:
    """Whether a path is named like a GeoJSON file, ``.json`` and gzipped ones included."""
    return Path(path).name.lower().endswith(_SUFFIXES)


def read_geojson(path: str | os.PathLike[str]) -> GivenOutlines:
    """Outlines of a GeoJSON file: a FeatureCollection, or a list of features.

    Of QuPath's cells the nucleus is taken where it was outlined. Regions that somebody drew (``"annotation"``) are left
    out where there are detections or cells, too. The file is read feature by feature, and no other text of it is kept.

    Parameters
    ----------
    path
        File ``.geojson``, ``.json``, or one of them gzipped (``.gz``).

    Raises
    ------
    MissingKeyError
        If there is no such file.
    DataValueError
        If it is not GeoJSON, or holds no outlines.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> ring = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]
    >>> cell = {"type": "Feature", "id": "a", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "cells.geojson"
    >>> _ = path.write_text(json.dumps({"type": "FeatureCollection", "features": [cell]}))
    >>> found = read_geojson(path)
    >>> found.ids.tolist(), float(found.geometries[0].area)
    (['a'], 16.0)
    """
    from shapely.errors import ShapelyError

    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingKeyError(f"there is no GeoJSON file {str(path)!r}")
    ids: list[Any] = []
    kinds: list[str | None] = []
    classes: list[str | None] = []
    geometries: list[np.ndarray] = []
    batch: list[Any] = []
    try:
        with _open(path) as file:
            for feature in _features(file):
                kind, name, known, geometry = _parts(feature)
                ids.append(name)
                kinds.append(kind)
                classes.append(known)
                batch.append(geometry)
                if len(batch) == _BATCH:
                    geometries.append(_outlines(batch))
                    batch.clear()
        geometries.append(_outlines(batch))
    except (*_BAD, ShapelyError) as error:
        raise DataValueError(
            f"{path.name!r} is no GeoJSON of outlines ({type(error).__name__}: {error}); a FeatureCollection of polygons in "
            f"pixels of the full-resolution image is needed, as QuPath exports with File > Export objects as GeoJSON"
        ) from error
    if not ids:
        raise DataValueError(f"{path.name!r} holds no features; export the cells or detections, too")
    found = GivenOutlines(
        np.concatenate(geometries),
        _ids(ids),
        np.array(classes, dtype=object) if any(known is not None for known in classes) else None,
    )
    nuclear = np.array([kind in _NUCLEAR for kind in kinds])
    drawn = np.array([kind is not None and kind not in _NUCLEAR for kind in kinds])
    return found.take(np.flatnonzero(~drawn)) if nuclear.any() and drawn.any() else found


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _features(file: IO[str]) -> Iterator[dict[str, Any]]:
    """Features of a FeatureCollection, of a list of them, or the one that the file is."""
    text = _Text(file)
    opening = text.peek()
    if opening == "[":
        yield from text.items()
        return
    text.expect("{")
    other: dict[str, Any] = {}
    while text.peek() != "}":
        name = text.value()
        text.expect(":")
        if name == "features":
            yield from text.items()
        else:
            other[name] = text.value()
        if text.peek() == ",":
            text.expect(",")
    if other.get("type") == "Feature":
        yield other


class _Text:
    """JSON text that is decoded value by value while it is read."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._buffer = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                raise EOFError("the file ends in the middle")

    def expect(self, mark: str) -> None:
        """Go past `mark`."""
        found = self.peek()
        if found != mark:
            raise ValueError(f"{mark!r} expected, {found!r} found")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, stop = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if stop == len(self._buffer) and self._more():
                continue  # a number may go on
            self._at = stop
            return value

    def items(self) -> Iterator[Any]:
        """The values of a list, one by one."""
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")

    def _more(self) -> bool:
        part = self._file.read(_READ_CHARS)
        self._buffer = self._buffer[self._at :] + part
        self._at = 0
        return bool(part)


def _parts(feature: dict[str, Any]) -> tuple[str | None, Any, str | None, Any]:
    """Kind, id, class and geometry of a feature."""
    about = feature.get("properties") or {}
    name = feature.get("id")
    kind = about.get("objectType") or about.get("object_type")
    if name in _OLD_KINDS:
        kind, name = kind or _OLD_KINDS[name], None
    known = about.get("classification")
    if isinstance(known, dict):
        known = known.get("name") or ": ".join(map(str, known.get("names") or [])) or None
    geometry = feature.get("nucleusGeometry") or about.get("nucleusGeometry") or feature["geometry"]
    return kind, name, None if known is None else str(known), geometry


def _ids(ids: list[Any]) -> np.ndarray:
    """The ids, if every feature has one; else numbers from 1."""
    if any(name is None for name in ids):
        return np.arange(1, len(ids) + 1)
    if all(isinstance(name, int) and abs(name) < 1 << 63 for name in ids):
        return np.array(ids, dtype=np.int64)
    return np.array([str(name) for name in ids], dtype=object)


def _outlines(geometries: list[Any]) -> np.ndarray:
    """Shapely geometries of decoded ones; polygons without holes, which nearly all are, in one call for all."""
    from shapely import linearrings, polygons
    from shapely.errors import ShapelyError
    from shapely.geometry import shape

    found = np.empty(len(geometries), dtype=object)
    simple, points, sizes = [], [], []
    for position, geometry in enumerate(geometries):
        if geometry is None:
            continue
        coordinates = geometry.get("coordinates")
        if geometry["type"] == "Polygon" and len(coordinates) == 1 and len(coordinates[0]) >= 4:
            simple.append(position)
            points.extend(coordinates[0])
            sizes.append(len(coordinates[0]))
        elif geometry["type"] != "Polygon" or all(len(ring) >= 4 for ring in coordinates):
            with suppress(ValueError, ShapelyError):  # a ring of too few points, or of none: it encloses nothing
                found[position] = shape(geometry)
    if simple:
        try:
            xy = np.array(points, dtype=np.float64)[:, :2]
        except ValueError:  # some with a height, some without
            xy = np.array([point[:2] for point in points], dtype=np.float64)
        owner = np.repeat(np.arange(len(simple)), sizes)
        broken = np.zeros(len(simple), dtype=bool)
        broken[owner[~np.isfinite(xy).all(axis=1)]] = True
        whole = ~broken[owner]
        kept = np.flatnonzero(~broken)
        renumbered = np.cumsum(~broken) - 1
        if len(kept):
            found[np.array(simple)[kept]] = polygons(linearrings(xy[whole], indices=renumbered[owner[whole]]))
    return found
