"""What the image stream reads of a section: scaled features with their context, a neighbour operator, a nuclei factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..._keys import Keys
from ...errors import DataValueError
from .._inner import read_features
from ..nn.graphs import edge_index, nearest, neighbour_mean, truncated, with_self_loops
from ..nn.nuclei import nuclei_factor, nuclei_reference

if TYPE_CHECKING:
    from scipy import sparse

    from ...data.section import Section
    from .config import HESpotExConfig

__all__ = ["ImageInputs", "Inputs", "gate_edges"]


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Arrays of one section.

    Attributes
    ----------
    features
        (n, d) float32.
    edges, weights
        Entries of the neighbour operator, (2, E) int64 and (E,) float32.
    factor
        Nuclei factor, (n, 1) float32, or ``None``.
    """

    features: np.ndarray
    edges: np.ndarray
    weights: np.ndarray
    factor: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Fitted map from sections to :class:`ImageInputs`.

    Attributes
    ----------
    config
        Settings of the model.
    mean, scale
        Mean and spread of the features over the training observations, (d,) float64.
    nuclei
        Reference count of nuclei, where one is used.
    """

    config: HESpotExConfig
    mean: np.ndarray
    scale: np.ndarray
    nuclei: float | None

    @classmethod
    def fit(cls, config: HESpotExConfig, sections: Sequence[Section]) -> Self:
        """Learn scales and reference from training sections."""
        n, total, square = 0, 0.0, 0.0
        shift = read_features(sections[0]).mean(axis=0, dtype=np.float64)  # against cancellation in the squares
        for section in sections:
            x = read_features(section) - shift
            n += len(x)
            total = total + x.sum(axis=0)
            square = square + (x * x).sum(axis=0)
        mean = total / n
        variance = np.maximum(square / n - mean**2, 0.0)
        varies = variance > 1e-10 * np.maximum(square / n, np.finfo(float).tiny)
        scale = np.sqrt(np.where(varies, variance, np.inf))
        nuclei = None
        if config.nuclei in {"multiply", "feature"}:
            nuclei = nuclei_reference([_nuclei(config, section) for section in sections])
        return cls(config, mean + shift, scale, nuclei)

    def __call__(self, section: Section) -> ImageInputs:
        """Arrays of `section`, which may lack expression."""
        features = self._standardized(read_features(section))
        if self.config.nuclei == "feature":
            share = np.log1p(_nuclei(self.config, section)) / np.log1p(self.nuclei)
            features = np.column_stack([features, share.astype(np.float32)])
        if self.config.context:
            operator = neighbour_mean(_lattice(section)).astype(np.float32)
            rounds = [features]
            for _ in range(self.config.context):
                rounds.append(operator @ rounds[-1])
            features = np.concatenate(rounds, axis=1)
        operator = neighbour_mean(
            _decoder_graph(self.config, section), subtract_self=self.config.legacy_self_subtraction
        )
        factor = None
        if self.config.nuclei == "multiply_legacy":
            factor = nuclei_factor(_nuclei(self.config, section))
        elif self.config.nuclei == "multiply":
            factor = nuclei_factor(_nuclei(self.config, section), self.nuclei)
        return ImageInputs(
            np.ascontiguousarray(features, dtype=np.float32),
            edge_index(operator),
            operator.data.astype(np.float32),
            factor,
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and plain values."""
        return {"mean": self.mean, "scale": self.scale}, {"nuclei": self.nuclei}

    @classmethod
    def from_state(cls, config: HESpotExConfig, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(config, np.asarray(arrays["mean"]), np.asarray(arrays["scale"]), values["nuclei"])

    def _standardized(self, features: np.ndarray) -> np.ndarray:
        if self.config.standardize == "none":
            return features
        mean, scale = self.mean, self.scale
        if self.config.standardize == "section" and len(features) > 1:
            mean = features.mean(axis=0, dtype=np.float64)
            # Half the training spread is the floor: a feature that is all but constant here carries only noise.
            scale = np.maximum(features.std(axis=0, dtype=np.float64), 0.5 * self.scale)
        return ((features - mean) / scale).astype(np.float32)


def gate_edges(config: HESpotExConfig, section: Section) -> np.ndarray:
    """Edges of the expression stream's graph, self loops included, (2, E)."""
    if config.gate_graph == "lattice":
        return edge_index(with_self_loops(_lattice(section)))
    graph = nearest(section.coordinates, 7, region=section.region, symmetric=True, include_self=True)
    return edge_index(graph)


def _decoder_graph(config: HESpotExConfig, section: Section) -> sparse.csr_array:
    if config.graph == "lattice":
        return _lattice(section)
    # Without pixel positions there is nothing to truncate: the four nearest are taken as they lie.
    pixels = section.extras.get("pixel")
    points = section.coordinates if pixels is None else truncated(pixels)
    return nearest(points, 4, region=section.region, symmetric=False, include_self=False)


def _lattice(section: Section) -> sparse.csr_array:
    if section.edges is None:
        raise DataValueError(f"section {section.name!r} has no neighbour graph; make it with hx.pp.spatial_graph(sdata)")
    return section.edges


def _nuclei(config: HESpotExConfig, section: Section) -> np.ndarray:
    name = Keys.N_NUCLEI_WINDOW if config.nuclei == "multiply_legacy" else Keys.N_NUCLEI
    return np.asarray(section.extra(name, "hx.pp.segment_nuclei(sdata)"), dtype=np.float64)
