"""Plain-array data structures of the models; no scverse package needed.

A `Section` is all a model learns from; a `Prediction` is all it returns. Both hold *row fields*:
anything with a ``shape`` that can be sliced by rows (an array, a CSR matrix, a block source on disk),
so that a section with a million bins is read in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from scipy import sparse

from ..errors import DataValueError
from .units import check_unit, normalize

__all__ = ["Level", "Parts", "Prediction", "Rows", "Section", "Targets", "rows_of"]

Level = Literal["spot", "nucleus", "superpixel"]  # "spot" stands for any observation: spots, tiles, positions


@runtime_checkable
class Rows(Protocol):
    """A matrix that can be sliced by rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, rows first."""

    def __getitem__(self, rows: Any) -> Any:
        """The rows that a slice or an index array selects."""


def rows_of(source: Rows, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """`rows` of `source` as a dense array, whatever `source` is."""
    block = source[rows]
    if sparse.issparse(block):
        return block.toarray()
    return np.asarray(block)


def _check_length(owner: str, expected: int, **fields: Any) -> None:
    for name, value in fields.items():
        if value is not None and value.shape[0] != expected:
            raise DataValueError(f"{owner}.{name} has {value.shape[0]} rows, expected {expected} (one per id)")


@dataclass(frozen=True, eq=False)
class Targets:
    """Measured expression of a gene panel; slicing it by rows normalises those rows.

    Attributes
    ----------
    counts
        Raw counts of the panel, (n, G); any row field.
    library_size
        Total count of each observation over all genes of the assay, (n,).
    genes
        Panel in order, G names.
    unit
        Unit of what slicing returns.
    """

    counts: Rows
    library_size: np.ndarray
    genes: tuple[str, ...]
    unit: str = "log1p_cp10k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(map(str, self.genes)))
        check_unit(self.unit)
        if self.counts.shape[1] != len(self.genes):
            raise DataValueError(f"Targets.counts has {self.counts.shape[1]} columns for {len(self.genes)} genes")
        _check_length("Targets", self.counts.shape[0], library_size=self.library_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Observations × genes."""
        return int(self.counts.shape[0]), len(self.genes)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Selected rows in :attr:`unit`, dense float32."""
        return normalize(self.counts[rows], self.library_size[rows], self.unit)

    def in_unit(self, unit: str) -> Targets:
        """The same counts, sliced in another unit."""
        return replace(self, unit=unit)


@dataclass(frozen=True, eq=False)
class Parts:
    """What lies below the observations: nuclei, cells of a fine grid, or positions between the spots.

    Attributes
    ----------
    ids
        Names, (m,).
    coordinates
        Centres in µm (x, y), (m, 2).
    share
        Observations × parts, sparse (n, m): how much of each part an observation covers, in units of a whole part.
        A nucleus counts 1; a cell of the grid the area of it that lies under the spot *and* in tissue, over that of
        a whole cell. So ``share @ values`` sums values per part, and what the tissue's border cuts off counts nothing.
    features
        Features of the parts, (m, d); any row field.
    colour
        Mean colour of the parts, RGB in [0, 1], (m, 3) float32; any row field.
    grid
        Row and column of each cell on the grid, (m, 2) int; ``None`` for nuclei.
    size_um
        Side of a cell of the grid in µm; ``None`` for nuclei.
    level
        ``"nucleus"``, ``"superpixel"``, or ``"spot"`` for positions of another lattice.
    """

    ids: np.ndarray
    coordinates: np.ndarray
    share: sparse.csr_array
    features: Rows | None = None
    colour: Rows | None = None
    grid: np.ndarray | None = None
    size_um: float | None = None
    level: Level = "nucleus"

    def __post_init__(self) -> None:
        _check_length(
            "Parts",
            len(self.ids),
            coordinates=self.coordinates,
            features=self.features,
            colour=self.colour,
            grid=self.grid,
        )
        if self.share.shape[1] != len(self.ids):
            raise DataValueError(f"Parts.share has {self.share.shape[1]} columns for {len(self.ids)} parts")

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.ids)

    def require(self, field_name: Literal["features", "colour", "grid"]) -> Any:
        """One of the optional fields, or an error naming the call that makes it."""
        value = getattr(self, field_name)
        if value is None:
            shapes = {"nucleus": "nuclei", "superpixel": "superpixels"}.get(self.level, "tiles")
            made_by = {
                "features": "hx.pp.embed_nuclei(sdata)"
                if self.level == "nucleus"
                else f"hx.pp.embed(sdata, encoder, shapes_key={shapes!r})",
                "colour": f"hx.pp.embed(sdata, 'rgb', shapes_key={shapes!r})",
                "grid": "hx.pp.superpixels(sdata)",
            }
            raise DataValueError(f"the {shapes} have no {field_name}; make them with {made_by[field_name]}")
        return value


@dataclass(frozen=True, eq=False)
class Section:
    """One section (or several regions of one object) as plain arrays.

    Attributes
    ----------
    name
        Name of the section, unique within a training set.
    ids
        Names of the observations (spots or tiles), (n,).
    features
        Image embedding of the observations, (n, d); any row field.
    coordinates
        Centres in µm (x right, y down), (n, 2) float64.
    edges
        Symmetric neighbour graph without self loops, sparse (n, n); values are ignored. No edge joins two regions.
    targets
        Measured expression; ``None`` for a section that has only an image.
    group
        Patient (or whatever must not be split between training and test); the section's own name by default.
    region
        Index of the region of each observation, (n,) int; all 0 by default.
    parts
        Nuclei or grid cells, for methods that predict below the spot.
    extras
        Further per-observation arrays by name, such as ``"n_nuclei"`` (n,) or ``"pixel"`` (n, 2).
    """

    name: str
    ids: np.ndarray
    features: Rows
    coordinates: np.ndarray
    edges: sparse.csr_array | None = None
    targets: Targets | None = None
    group: str | None = None
    region: np.ndarray | None = None
    parts: Parts | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.ids)
        _check_length(
            "Section", n, features=self.features, coordinates=self.coordinates, edges=self.edges, targets=self.targets
        )
        if self.region is None:
            object.__setattr__(self, "region", np.zeros(n, dtype=np.int64))
        if self.group is None:
            object.__setattr__(self, "group", self.name)
        _check_length("Section", n, region=self.region, **dict(self.extras))
        if self.parts is not None and self.parts.share.shape[0] != n:
            raise DataValueError(f"Section.parts.share has {self.parts.share.shape[0]} rows for {n} observations")

    @property
    def n_obs(self) -> int:
        """Number of observations."""
        return len(self.ids)

    def require_targets(self) -> Targets:
        """The targets, or an error naming the section that has none."""
        if self.targets is None:
            raise DataValueError(f"section {self.name!r} has no measured expression to learn from")
        return self.targets

    def require_parts(self) -> Parts:
        """The parts, or an error naming the section that has none."""
        if self.parts is None:
            raise DataValueError(
                f"section {self.name!r} has no parts below its spots; make them with hx.pp.superpixels(sdata) or "
                "hx.pp.segment_nuclei(sdata)"
            )
        return self.parts

    def extra(self, name: str, made_by: str) -> np.ndarray:
        """One of :attr:`extras`, or an error naming the call that makes it."""
        try:
            return np.asarray(self.extras[name])
        except KeyError:
            raise DataValueError(f"section {self.name!r} lacks {name!r}; make it with {made_by}") from None


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts for the observations of a section.

    Attributes
    ----------
    ids
        Names of the observations, (n,).
    genes
        Predicted genes in order, G names.
    unit
        Unit of :attr:`mean`, one of :data:`hespotex.data.UNITS`.
    mean
        Predicted expression, (n, G) float32; any row field.
    std, lower, upper
        Spread and interval, (n, G), where the model gives them.
    samples
        Draws of a generative model, (n, G, draws).
    latent
        Model-internal representation, (n, k).
    ood
        Rank of each observation among training distances, (n,) in [0, 1].
    level
        What a row is.
    """

    ids: np.ndarray
    genes: tuple[str, ...]
    unit: str
    mean: Rows
    std: Rows | None = None
    lower: Rows | None = None
    upper: Rows | None = None
    samples: Rows | None = None
    latent: np.ndarray | None = None
    ood: np.ndarray | None = None
    level: Level = "spot"

    _ROW_FIELDS = ("mean", "std", "lower", "upper", "samples", "latent", "ood")

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(map(str, self.genes)))
        check_unit(self.unit)
        _check_length("Prediction", len(self.ids), **{name: getattr(self, name) for name in self._ROW_FIELDS})
        if self.mean.shape[1] != len(self.genes):
            raise DataValueError(f"Prediction.mean has {self.mean.shape[1]} columns for {len(self.genes)} genes")

    @staticmethod
    def concatenate(blocks: Sequence[Prediction]) -> Prediction:
        """Join row blocks of one section's prediction."""
        if not blocks:
            raise DataValueError("no blocks to concatenate")
        first = blocks[0]
        for block in blocks[1:]:
            if (block.genes, block.unit, block.level) != (first.genes, first.unit, first.level):
                raise DataValueError("blocks of one prediction must agree in genes, unit and level")
        joined: dict[str, Any] = {}
        for name in Prediction._ROW_FIELDS:
            values = [getattr(block, name) for block in blocks]
            present = [value is not None for value in values]
            if any(present) and not all(present):
                raise DataValueError(f"some blocks of the prediction lack {name!r}")
            joined[name] = np.concatenate([rows_of(value) for value in values]) if all(present) else None
        ids = np.concatenate([np.asarray(block.ids) for block in blocks])
        return replace(first, ids=ids, **joined)
