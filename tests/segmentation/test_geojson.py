from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from shapely import Point, area, box
from shapely.geometry import MultiPolygon, mapping

from hespotex.errors import DataValueError, MissingKeyError
from hespotex.segmentation import geojson, read_geojson


def feature(shape, **more) -> dict:
    return {"type": "Feature", "geometry": None if shape is None else mapping(shape), **more}


def write(path, features, *, first: dict | None = None, last: dict | None = None):
    path.write_text(json.dumps({**(first or {}), "features": features, **(last or {})}))
    return path


COLLECTION = {"type": "FeatureCollection"}


def test_ids_classes_and_coordinates_come_back_exactly(tmp_path) -> None:
    shapes = [box(0.25, 1, 5.125, 9), Point(20, 20).buffer(5), MultiPolygon([box(30, 30, 33, 33), box(34, 30, 36, 33)])]
    shapes.append(Point(60, 60).buffer(9).difference(Point(60, 60).buffer(3)))
    features = [
        feature(
            shape, id=f"id-{number}", properties={"classification": {"name": name, "color": [1, 2, 3]}} if name else {}
        )
        for number, (shape, name) in enumerate(zip(shapes, ["Tumor", None, "Stroma", "Tumor"], strict=True))
    ]
    for path in (
        write(tmp_path / "a.geojson", features, first=COLLECTION),
        write(tmp_path / "b.json", features, last={"type": "FeatureCollection", "bbox": [0, 1, 2, 3]}),
    ):
        found = read_geojson(path)
        assert found.ids.tolist() == ["id-0", "id-1", "id-2", "id-3"]
        assert found.classification.tolist() == ["Tumor", None, "Stroma", "Tumor"]
        assert all(one.equals_exact(other, 0) for one, other in zip(found.geometries, shapes, strict=True))
    (tmp_path / "list.json").write_text(json.dumps(features))
    (tmp_path / "one.json").write_text(json.dumps(features[1]))
    assert read_geojson(tmp_path / "list.json").ids.tolist() == found.ids.tolist()
    assert read_geojson(tmp_path / "one.json").ids.tolist() == ["id-1"]
    with gzip.open(tmp_path / "a.geojson.gz", "wt") as file:
        json.dump({"type": "FeatureCollection", "features": features}, file)
    assert read_geojson(tmp_path / "a.geojson.gz").ids.tolist() == found.ids.tolist()


@pytest.mark.parametrize("chars", [1, 7, 64])
def test_how_the_text_is_cut_changes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch, chars: int) -> None:
    monkeypatch.setattr(geojson, "_READ_CHARS", chars)
    monkeypatch.setattr(geojson, "_BATCH", 3)
    shapes = [box(i, 0, i + 1, 12.5 + i) for i in range(10)]
    path = write(
        tmp_path / "a.geojson", [feature(s, id=10 * i) for i, s in enumerate(shapes, 1)], first={"version": 12}
    )
    found = read_geojson(path)
    assert found.ids.tolist() == list(range(10, 110, 10))
    assert found.ids.dtype == np.int64
    assert area(found.geometries).tolist() == area(shapes).tolist()


def test_of_a_cell_the_nucleus_is_taken(tmp_path) -> None:
    whole, nucleus = Point(20, 20).buffer(9), Point(20, 20).buffer(4)
    cells = [
        feature(whole, id="a", nucleusGeometry=mapping(nucleus), properties={"objectType": "cell"}),
        feature(whole, id="b", properties={"objectType": "cell"}),
    ]
    drawn = feature(box(0, 0, 900, 900), id="c", properties={"objectType": "annotation"})
    found = read_geojson(write(tmp_path / "a.geojson", [drawn, *cells], first=COLLECTION))
    assert found.ids.tolist() == ["a", "b"]
    assert found.geometries[0].equals_exact(nucleus, 0)
    assert found.geometries[1].equals_exact(whole, 0)
    # Where all that there is was drawn, it is what is meant.
    assert read_geojson(write(tmp_path / "b.geojson", [drawn], first=COLLECTION)).ids.tolist() == ["c"]


def test_the_ids_of_old_exports_are_kinds_and_names_of_classes_may_be_lists(tmp_path) -> None:
    features = [
        feature(box(0, 0, 2, 2), id="PathDetectionObject", properties={"classification": {"names": ["Tumor", "CD3"]}}),
        feature(box(4, 0, 6, 2), id="PathDetectionObject", properties={"classification": "Stroma"}),
        feature(box(0, 0, 90, 90), id="PathAnnotationObject"),
    ]
    found = read_geojson(write(tmp_path / "a.geojson", features, first=COLLECTION))
    assert found.ids.tolist() == [1, 2]
    assert found.classification.tolist() == ["Tumor: CD3", "Stroma"]


def test_heights_are_dropped_and_holes_in_the_data_are_left_open(tmp_path) -> None:
    flat = [[0, 0], [4, 0], [4, 4], [0, 0]]
    broken = [[0, 0], [float("nan"), 0], [4, 4], [0, 0]]
    kinds = [[[*point, 7] for point in flat], flat, broken, flat[:3]]
    features = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}} for ring in kinds]
    found = read_geojson(write(tmp_path / "a.geojson", [*features, feature(None)], first=COLLECTION))
    assert [shape is None for shape in found.geometries] == [False, False, True, True, True]
    assert area(found.geometries[:2]).tolist() == [8, 8]


BAD = {
    "no json": "hello",
    "cut": '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"type": "Poly',
    "cut between features": '{"features": [{"type": "Feature", "geometry": null}',
    "no geometry": '{"features": [{"type": "Feature"}]}',
    "numbers": "[1, 2]",
    "deep": "[" * 100_000,
    "text for a ring": '{"features": [{"geometry": {"type": "Polygon", "coordinates": ["abcdef"]}}]}',
}


@pytest.mark.parametrize("case", BAD)
def test_files_of_something_else_are_refused(tmp_path, case: str) -> None:
    (tmp_path / "a.geojson").write_text(BAD[case])
    with pytest.raises(DataValueError, match=r"'a.geojson' is no GeoJSON"):
        read_geojson(tmp_path / "a.geojson")


def test_nothing_and_nowhere_are_named(tmp_path) -> None:
    with pytest.raises(DataValueError, match="no features"):
        read_geojson(write(tmp_path / "a.geojson", [], first=COLLECTION))
    with pytest.raises(MissingKeyError, match="absent"):
        read_geojson(tmp_path / "absent.geojson")
    (tmp_path / "b.geojson.gz").write_bytes(b"\x1f\x8b\x08no")
    with pytest.raises(DataValueError, match="no GeoJSON"):
        read_geojson(tmp_path / "b.geojson.gz")


def test_a_broken_outline_costs_only_itself(tmp_path) -> None:
    square = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]
    broken = [
        {"type": "MultiPolygon", "coordinates": [[square], [[[1, 1], [2, 2]]]]},
        {"type": "MultiPolygon", "coordinates": [[[[float("nan"), 1], [2, 3], [4, 5], [1, 1]]]]},
        {"type": "Polygon", "coordinates": [square, []]},
        {"type": "MultiPolygon", "coordinates": []},
    ]
    whole = {"type": "Polygon", "coordinates": [square]}
    path = tmp_path / "cells.geojson"
    path.write_text(json.dumps([{"type": "Feature", "geometry": geometry} for geometry in [*broken, whole]]))
    found = read_geojson(path)
    assert found.ids.tolist() == [1, 2, 3, 4, 5]
    assert [geometry is not None and not geometry.is_empty for geometry in found.geometries] == [False] * 4 + [True]
