"""Preprocessing: attach tissue, tiles, nuclei, embeddings, graphs and target genes to a section."""

from __future__ import annotations

from ._normalize_counts import normalize_counts
from ._select_genes import select_genes

__all__ = [
    "normalize_counts",
    "select_genes",
]
