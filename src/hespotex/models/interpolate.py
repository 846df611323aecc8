"""Interpolation in space alone, blind to the image: what every method below the spot has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.spatial import cKDTree

from .._settings import settings
from ..data.lattice import spot_pitch
from ..data.section import Level, Prediction, Section
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._config import check_choices
from ._inner import row_blocks
from ._interpolation import (
    distance_rank,
    find_neighbours,
    gaussian_weights,
    mean_operator,
    neighbour_weights,
    own_distances,
    position_order,
)
from ._registry import register

__all__ = ["Interpolate", "InterpolateConfig"]

_PITCHES = 0.7  # narrower passes the noise of single spots on, wider blurs what lies between them

Method = Literal["nearest", "gaussian", "idw"]


@dataclass(frozen=True)
class InterpolateConfig:
    """Settings of :class:`Interpolate`.

    Attributes
    ----------
    method
        ``"nearest"``: the value of the nearest spot; ``"gaussian"``: a mean of the spots around, whose weights fall off
        as a normal density; ``"idw"``: one whose weights are distance to the power of minus `power`.
    bandwidth
        Standard deviation of ``"gaussian"`` in µm; by default 0.7 of the distance of neighbouring spots.
    power
        Exponent of ``"idw"``.
    neighbours
        Most spots that a mean is taken over.
    level
        Parts to predict: ``"superpixel"``, ``"nucleus"``, or ``"spot"`` for positions of another lattice.
    """

    method: Method = "gaussian"
    bandwidth: float | None = None
    power: float = 2.0
    neighbours: int = 20
    level: Level = "superpixel"

    def __post_init__(self) -> None:
        check_choices(self, {"method": Method, "level": Level})
        for name in ("bandwidth", "power"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise DataValueError(f"{name}={value!r} must be positive")
        if self.neighbours < 1:
            raise DataValueError(f"neighbours={self.neighbours!r} must be at least 1")


@register
class Interpolate(Model[InterpolateConfig]):
    """Nuclei, superpixels or positions as weighted means of the spots around; nothing is trained and no image is read.

    Values are convex combinations of measured ones, in the spots' unit.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> spots, between = np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([[10.0, 0.0], [50.0, 0.0]])
    >>> parts = Parts(np.arange(2), between, sparse.csr_array((2, 2)), level="superpixel")
    >>> targets = Targets(np.array([[1.0], [3.0]]), np.ones(2), ("A",), unit="counts")
    >>> section = Section("s", np.array(["a", "b"]), np.empty((2, 0)), spots, targets=targets, parts=parts)
    >>> models.create("interpolate", method="nearest").fit([section]).predict(section).mean.ravel().tolist()
    [1.0, 1.0]
    """

    Config: ClassVar[type] = InterpolateConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="interpolate",
        summary="Nearest spot, Gaussian or inverse-distance mean of the spots around; blind to the image",
        level="superpixel",
        task="in-sample",
        needs=("positions", "expression"),
        trained=False,
        in_memory=1,
        cost="seconds; grows with parts x genes",
        presets=("default",),
    )

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Check that a bandwidth can be had."""
        for section in sections:
            self._bandwidth(section)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield weighted means of the spots, and the rank of each part's nearest distance among the spots' own."""
        self._check_section(section)
        parts = section.require_parts()
        spots = np.asarray(section.coordinates, dtype=np.float64)
        order = position_order(spots)
        tree = cKDTree(spots[order])
        own = own_distances(tree)
        expression = section.require_targets()[order]
        k = 1 if self.config.method == "nearest" else self.config.neighbours
        bandwidth = self._bandwidth(section)
        for rows in row_blocks(parts.n_parts, block_rows):
            found = find_neighbours(tree, parts.coordinates[rows], k, workers=settings.n_jobs)
            if bandwidth is not None:
                weight = gaussian_weights(found.distance, bandwidth)
            else:
                weight = neighbour_weights(found.distance, "power", self.config.power)
            mean = mean_operator(found.spot, weight, section.n_obs) @ expression
            ood = distance_rank(own, found.nearest)
            yield Prediction(np.asarray(parts.ids)[rows], self.genes, self.unit, mean, ood=ood, level=parts.level)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Nothing: what is interpolated is the section's own."""
        return {}, {}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Nothing to take."""

    def _bandwidth(self, section: Section) -> float | None:
        """Standard deviation of the Gaussian in µm; ``None`` for the other methods."""
        if self.config.method != "gaussian":
            return None
        if self.config.bandwidth is not None:
            return self.config.bandwidth
        try:
            return _PITCHES * spot_pitch(section.coordinates, section.region)
        except DataValueError as error:
            raise DataValueError(f"section {section.name!r}: {error}; or give bandwidth= in µm") from error
