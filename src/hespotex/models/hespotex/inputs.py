"""What the image stream reads of a section: scaled features with their context, a neighbour operator, a nuclei factor.

All of it can be read for some observations alone, so that a section need not fit into memory with its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..._keys import Keys
from ...errors import DataValueError
from .._inner import read_features
from ..nn.graphs import edge_index, nearest, neighbour_mean, ring, truncated, with_self_loops
from ..nn.nuclei import nuclei_factor, nuclei_reference
from .windows import cut, reached, windows_of

if TYPE_CHECKING:
    from scipy import sparse

    from ...data.section import Section
    from .config import HESpotExConfig

__all__ = ["ImageInputs", "Inputs", "SectionInputs", "gate_edges"]

_BOUND = 8.0  # of a scaled feature, in units of its spread
_PCA_ROWS = 8192  # observations, evenly spread, that the principal axes are found from
_LARGEST_REACH = 2  # windows: observations read at a time, those around the wanted ones included


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
        blocks = [(section, rows) for section in sections for rows in _blocks(config, section)]
        centre = sum(read_features(section, rows).sum(axis=0, dtype=np.float64) for section, rows in blocks) / n
        nuclei = None
        if config.nuclei in {"multiply", "feature"}:
            nuclei = nuclei_reference([_nuclei(config, section) for section in sections])
        inputs = cls(config, centre.astype(np.float32), None, None, nuclei)
        if config.standardize == "none":
            return inputs
        square, magnitude = np.zeros(1), np.zeros(1)
        contexts = [inputs._context(section) for section in sections]
        for section, context in zip(sections, contexts, strict=True):
            for rows in _blocks(config, section):
                square = square + np.square(context.read(rows), dtype=np.float64).sum(axis=0)
                magnitude = np.maximum(magnitude, np.abs(read_features(section, rows)).max(axis=0))
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
        readers = (SectionInputs(inputs, *each) for each in zip(sections, contexts, strict=True))
        sample = np.concatenate([reader[::step] for reader in readers])
        return replace(inputs, axes=_principal_axes(sample, config.input_rank))

    def of(self, section: Section) -> SectionInputs:
        """Reader of the arrays of `section`, which may lack expression."""
        return SectionInputs(self, section, self._context(section))

    def __call__(self, section: Section) -> ImageInputs:
        """All arrays of `section` at once."""
        return self.of(section).window(None)[0]

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and plain values."""
        arrays = {"centre": self.centre, "scale": self.scale, "axes": self.axes}
        return {name: array for name, array in arrays.items() if array is not None}, {"nuclei": self.nuclei}

    @classmethod
    def from_state(cls, config: HESpotExConfig, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`state`."""
        return cls(config, arrays["centre"], arrays.get("scale"), arrays.get("axes"), values["nuclei"])

    def _context(self, section: Section) -> _Context:
        """Features of `section` before they are scaled, to be read in parts."""
        config = self.config
        offset = None
        if config.standardize == "section":
            blocks = _blocks(config, section)
            total = sum(read_features(section, rows).sum(axis=0, dtype=np.float64) for rows in blocks)
            offset = np.asarray(total / max(section.n_obs, 1), dtype=np.float32)
        elif config.standardize == "global":
            offset = self.centre
        share = None
        if config.nuclei == "feature":
            assert self.nuclei is not None
            share = np.log1p(_nuclei(config, section)) / np.log1p(self.nuclei)
            share = (share - share.mean()).astype(np.float32)
        around = neighbour_mean(ring(_lattice(section))).astype(np.float32) if config.context else None
        return _Context(section, offset, share, around, config.context)

    def _with_context(self, section: Section) -> np.ndarray:
        """Features, centred unless used as they come, with the number of nuclei and the context appended."""
        return self._context(section).read(slice(None))

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        # The bound keeps a feature that was all but dead in training from overruling the rest where it is not.
        if self.scale is not None:
            features = features * self.scale
            np.clip(features, -_BOUND, _BOUND, out=features)
        return features if self.axes is None else features @ self.axes


@dataclass(frozen=True, eq=False)
class _Context:
    """Features of a section about their reference, with the averages over the rings around appended.

    Attributes
    ----------
    section
        Where they are read.
    offset
        What is subtracted, (d,), or ``None``.
    share
        Number of nuclei as a further feature, (n,), or ``None``.
    around
        Operator of one round of averaging, (n, n), or ``None`` without context.
    rounds
        How often it is applied.
    """

    section: Section
    offset: np.ndarray | None
    share: np.ndarray | None
    around: sparse.csr_array | None
    rounds: int

    def parts(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """`rows` in parts, in order, for each of which at most `size` observations are read."""
        if self.around is None:
            yield from np.array_split(rows, max(-(-len(rows) // size), 1))
        elif len(rows) < 2 or len(reached(self.around, rows, self.rounds)) <= size:
            yield rows
        else:
            for half in np.array_split(rows, 2):
                yield from self.parts(half, size)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Features of some observations, (m, d'); each depends on those at most `rounds` rings away."""
        around = self.around
        local: slice | np.ndarray = slice(None)
        whole = isinstance(rows, slice) and rows == slice(None)
        if around is not None and not whole:
            chosen = np.arange(self.section.n_obs)[rows]
            rows = reached(around, chosen, self.rounds)
            around, local = cut(around, rows), np.searchsorted(rows, chosen)
        features = read_features(self.section, rows)
        if self.offset is not None:
            features = features - self.offset
        if self.share is not None:
            features = np.column_stack([features, self.share[rows]])
        if around is None:
            return features
        found = [features]
        for _ in range(self.rounds):
            found.append(around @ found[-1])
        return np.concatenate([each[local] for each in found], axis=1)


class SectionInputs:
    """The inputs of one section, read for any of its observations; slicing it by rows gives their features."""

    def __init__(self, inputs: Inputs, section: Section, context: _Context) -> None:
        self._inputs, self._section, self._context = inputs, section, context

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Observations × features."""
        return self._section.n_obs, int(self[:1].shape[1])

    def __len__(self) -> int:
        return self._section.n_obs

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Features of some observations, (m, d) float32."""
        size = self._inputs.config.window
        if size is None or len(self) <= size:
            return self._whole[rows]
        parts = self._context.parts(np.arange(len(self))[rows], _LARGEST_REACH * size)
        read = [self._read(part) for part in parts]
        return read[0] if len(read) == 1 else np.concatenate(read)

    @cached_property
    def operator(self) -> sparse.csr_array:
        """Neighbour operator of the decoder, (n, n)."""
        config = self._inputs.config
        return neighbour_mean(_decoder_graph(config, self._section), subtract_self=config.legacy_self_subtraction)

    @cached_property
    def factor(self) -> np.ndarray | None:
        """Nuclei factor, (n, 1) float32, or ``None``."""
        config = self._inputs.config
        if config.nuclei == "multiply_legacy":
            return nuclei_factor(_nuclei(config, self._section))
        if config.nuclei == "multiply":
            return nuclei_factor(_nuclei(config, self._section), self._inputs.nuclei)
        return None

    def windows(self) -> list[np.ndarray]:
        """Rows of the windows that a larger section is worked on in; one of all rows if it is not."""
        return windows_of(self._section.coordinates, self._inputs.config.window)

    def window(self, rows: np.ndarray | None, hops: int = 0) -> tuple[ImageInputs, np.ndarray, np.ndarray]:
        """Arrays of some observations and of those that reach them over `hops` edges; of all for ``None``.

        Returns
        -------
        The arrays, the observations they are of, and where among these `rows` are.
        """
        if rows is None:
            rows = every = np.arange(len(self))
            features = self._whole
        else:
            every = reached(self.operator, rows, hops)
            features = self[every]
        operator = cut(self.operator, every)
        inputs = ImageInputs(
            np.ascontiguousarray(features, dtype=np.float32),
            edge_index(operator),
            operator.data.astype(np.float32),
            None if self.factor is None else self.factor[every],
        )
        return inputs, every, np.searchsorted(every, rows)

    @cached_property
    def _whole(self) -> np.ndarray:
        return np.ascontiguousarray(self._read(slice(None)), dtype=np.float32)

    def _read(self, rows: slice | np.ndarray) -> np.ndarray:
        return self._inputs._scaled(self._context.read(rows))


def _blocks(config: HESpotExConfig, section: Section) -> Iterator[slice | np.ndarray]:
    """Rows of a section in parts that fit into memory with their context."""
    if config.window is None or section.n_obs <= config.window:
        yield slice(None)
    else:
        yield from windows_of(section.coordinates, config.window)


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
