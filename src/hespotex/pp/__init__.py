"""Preprocessing: attach tissue, tiles, nuclei, embeddings, graphs and target genes to a section."""

from __future__ import annotations

from ._densify import densify
from ._detect_tissue import detect_tissue
from ._embed import embed
from ._embed_nuclei import embed_nuclei
from ._make_tiles import make_tiles
from ._normalize_counts import normalize_counts
from ._normalize_stain import normalize_stain
from ._qc import qc
from ._segment_nuclei import segment_nuclei
from ._select_genes import select_genes
from ._set_scale import set_scale
from ._spatial_graph import spatial_graph
from ._superpixels import superpixels
from ._use_features import use_features

__all__ = [
    "densify",
    "detect_tissue",
    "embed",
    "embed_nuclei",
    "make_tiles",
    "normalize_counts",
    "normalize_stain",
    "qc",
    "segment_nuclei",
    "select_genes",
    "set_scale",
    "spatial_graph",
    "superpixels",
    "use_features",
]
