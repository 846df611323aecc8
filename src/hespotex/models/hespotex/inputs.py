"""What the image stream reads of a section: scaled features with their context, a neighbour operator, a nuclei factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..._keys import Keys
from ...errors import DataValueError
from .._inner import read_features
from ..nn.graphs import edge_index, nearest, neighbour_mean, ring, truncated, with_self_loops
from ..nn.nuclei import nuclei_factor, nuclei_reference

if TYPE_CHECKING:
    from scipy import sparse

    from ...data.section import Section
    from .config import HESpotExConfig

__all__ = ["ImageInputs", "Inputs", "gate_edges"]

_BOUND = 8.0  # of a scaled feature, in units of its spread
_PCA_ROWS = 8192  # observations, evenly spread, that the principal axes are found from


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
    centre
        Mean of the raw features over the training observations, (d,) float32.
    scale
        Factor of each feature after context was appended, (d',) float32; 0 for those constant in training.
    axes
        Principal axes that the scaled features are turned onto, (d', p) float32, or ``None``.
    nuclei
        Reference count of nuclei, where one is used.
    """

    config: HESpotExConfig
    centre: np.ndarray
    scale: np.ndarray | None
    axes: np.ndarray | None
    nuclei: float | None

    @classmethod
    def fit(cls, config: HESpotExConfig, sections: Sequence[Section]) -> Self:
        """Learn scales, axes and reference from training sections."""
        n = sum(section.n_obs for section in sections)
        centre = sum(read_features(section).sum(axis=0, dtype=np.float64) for section in sections) / n
        nuclei = None
        if config.nuclei in {"multiply", "feature"}:
            nuclei = nuclei_reference([_nuclei(config, section) for section in sections])
        inputs = cls(config, centre.astype(np.float32), None, None, nuclei)
        if config.standardize == "none":
            return inputs
        square, magnitude = np.zeros(1), np.zeros(1)
        for section in sections:
            square = square + np.square(inputs._with_context(section), dtype=np.float64).sum(axis=0)
            magnitude = np.maximum(magnitude, np.abs(read_features(section)).max(axis=0))
        if config.nuclei == "feature":
            magnitude = np.append(magnitude, 1.0)
        spread = np.sqrt(square / n)
        # Centring leaves of a constant feature what rounding makes of its size.
        varies = spread > 1e-6 * np.maximum(np.tile(magnitude, 1 + config.context), 1e-30)
        scale = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0).astype(np.float32)
        inputs = replace(inputs, scale=scale)
        if config.input_rank is None:
            return inputs
        step = -(-n // _PCA_ROWS)
        sample = np.concatenate([inputs._scaled(section)[::step] for section in sections])
        return replace(inputs, axes=_principal_axes(sample, config.input_rank))

    def __call__(self, section: Section) -> ImageInputs:
        """Arrays of `section`, which may lack expression."""
        features = self._scaled(section)
        if self.axes is not None:
            features = features @ self.axes
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
        arrays = {"centre": self.centre, "scale": self.scale, "axes": self.axes}
        return {name: array for name, array in arrays.items() if array is not None}, {"nuclei": self.nuclei}

    @classmethod
    def from_state(cls, config: HESpotExConfig, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(config, arrays["centre"], arrays.get("scale"), arrays.get("axes"), values["nuclei"])

    def _with_context(self, section: Section) -> np.ndarray:
        """Features, centred unless used as they come, with the number of nuclei and the context appended."""
        features = read_features(section)
        if self.config.standardize == "section":
            features = features - features.mean(axis=0, dtype=np.float64).astype(np.float32)
        elif self.config.standardize == "global":
            features = features - self.centre
        if self.config.nuclei == "feature":
            assert self.nuclei is not None
            share = np.log1p(_nuclei(self.config, section)) / np.log1p(self.nuclei)
            features = np.column_stack([features, (share - share.mean()).astype(np.float32)])
        if not self.config.context:
            return features
        operator = neighbour_mean(ring(_lattice(section))).astype(np.float32)
        rounds = [features]
        for _ in range(self.config.context):
            rounds.append(operator @ rounds[-1])
        return np.concatenate(rounds, axis=1)

    def _scaled(self, section: Section) -> np.ndarray:
        features = self._with_context(section)
        # The bound keeps a feature that was all but dead in training from overruling the rest where it is not.
        return features if self.scale is None else np.clip(features * self.scale, -_BOUND, _BOUND)


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
        raise DataValueError(
            f"section {section.name!r} has no neighbour graph; make it with hx.pp.spatial_graph(sdata)"
        )
    return section.edges


def _nuclei(config: HESpotExConfig, section: Section) -> np.ndarray:
    name = Keys.N_NUCLEI_WINDOW if config.nuclei == "multiply_legacy" else Keys.N_NUCLEI
    return np.asarray(section.extra(name, "hx.pp.segment_nuclei(sdata)"), dtype=np.float64)


def _principal_axes(x: np.ndarray, rank: int) -> np.ndarray:
    """Leading right singular vectors of `x` (n, d), (d, p), over the root mean square of what they yield."""
    from scipy.linalg import eigh

    n, d = x.shape
    gram = (x @ x.T if n < d else x.T @ x).astype(np.float64)
    p = min(rank, n, d)
    values, vectors = eigh(gram, subset_by_index=(len(gram) - p, len(gram) - 1), check_finite=False)
    values, vectors = values[::-1], vectors[:, ::-1]
    if not values[0] > 0:  # no feature varies: one axis on which all lie at 0
        return np.zeros((d, 1), dtype=np.float32)
    kept = values > 1e-7 * values[0]
    values, vectors = values[kept], vectors[:, kept]
    axes = x.T @ (vectors / np.sqrt(values)) if n < d else vectors
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # whatever the library's signs
    # Contiguous like what a saved model is loaded into, for products that are equal to the last bit.
    return np.ascontiguousarray(axes * np.sqrt(n * axes.shape[1] / values.sum()), dtype=np.float32)
