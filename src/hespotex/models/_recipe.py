"""What a trained model must know to meet new data: its genes, unit, and the `pp` steps it was fed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How the sections were prepared that a model was trained on.

    Attributes
    ----------
    genes
        Predicted genes in order.
    unit
        Unit of the prediction.
    embedding_key
        ``obsm`` key the features were read from.
    encoder
        Name and parameters of the encoder, as :meth:`hespotex.encoders.Encoder.params` gives them; empty
        if the features came from elsewhere.
    n_features
        Width of the embedding.
    tiles
        ``diameter_um``, ``pitch_um`` and ``lattice`` (``"square"`` or ``"hex"``) of the training spots.
    graph
        Keyword arguments of :func:`hespotex.pp.spatial_graph`; empty if the model uses no graph.
    nuclei
        Keyword arguments of :func:`hespotex.pp.segment_nuclei`; empty if the model uses no nuclei.
    parts
        For methods below the spot: ``level``, ``shapes`` (name), ``size_um`` of a cell, and ``colour``, the parameters of
        the encoder of colours; empty for others.
    training
        Provenance: one entry per section (name, group, number of spots), seed, versions.
    scores
        Scores known at training time (of an inner validation, never of a test section).
    """

    genes: tuple[str, ...]
    unit: str
    embedding_key: str = ""
    encoder: Mapping[str, Any] = field(default_factory=dict)
    n_features: int = 0
    tiles: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict)
    nuclei: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "genes": list(self.genes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_json`."""
        return cls(**{**values, "genes": tuple(values["genes"])})
