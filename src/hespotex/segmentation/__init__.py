"""Nuclei backends: functions from an image to its label image."""

from __future__ import annotations

from .cellpose import CellposeSegmenter
from .counts import count_in_circles, count_in_polygons, count_in_window
from .geojson import read_geojson
from .instanseg import LazyslideSegmenter
from .labels import load_labels
from .watershed import Watershed, estimate_diameter, segment_watershed

__all__ = [
    "CellposeSegmenter",
    "LazyslideSegmenter",
    "Watershed",
    "count_in_circles",
    "count_in_polygons",
    "count_in_window",
    "estimate_diameter",
    "load_labels",
    "read_geojson",
    "segment_watershed",
]
