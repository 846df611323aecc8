"""Preprocessing: attach tissue, tiles, nuclei, embeddings, graphs and target genes to a section."""

from __future__ import annotations

__all__: list[str] = []
