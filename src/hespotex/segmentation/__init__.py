"""Nuclei of a slide: ways to find them, nuclei that are there already, and all that makes one result of many blocks.

Ways to find them, functions from an image to its label image: ``watershed`` (on ``_appearance``, ``_smooth``,
``_components``, ``_flood``, ``_necks``), ``cellpose`` and ``instanseg``. Nuclei that are there: ``labels`` and ``geojson``,
checked and measured by ``existing`` (on ``_fill``, ``_polygons``). A slide is worked on block by block by ``_tiled``, which
outlines and measures regions (``_outline``, on ``_trace``), holds them in flat arrays (``_packed``), joins blocks (``_merge``)
and keeps what an interruption must not cost (``_kept``). The result (``_nuclei``) is drawn by ``_raster``, becomes
elements of SpatialData in ``_store``, and is counted per spot by ``counts``.
"""

from __future__ import annotations

from .cellpose import CellposeSegmenter
from .counts import count_in_circles, count_in_polygons, count_in_window
from .geojson import GivenOutlines, read_geojson
from .instanseg import LazyslideSegmenter
from .labels import load_labels
from .watershed import TreeOptions, Watershed, estimate_diameter, segment_watershed

__all__ = [
    "CellposeSegmenter",
    "GivenOutlines",
    "LazyslideSegmenter",
    "TreeOptions",
    "Watershed",
    "count_in_circles",
    "count_in_polygons",
    "count_in_window",
    "estimate_diameter",
    "load_labels",
    "read_geojson",
    "segment_watershed",
]
