"""Plots of what is stored: predicted against measured maps, scores beside nulls and ceiling, training curves."""

from __future__ import annotations

from ._gene_correlation import gene_correlation
from ._nuclei import nuclei
from ._predicted_vs_measured import predicted_vs_measured
from ._spatial import spatial
from ._superresolution import superresolution
from ._training import training

__all__ = ["gene_correlation", "nuclei", "predicted_vs_measured", "spatial", "superresolution", "training"]
