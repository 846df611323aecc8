"""The model: spots and superpixels in space and colour, and the weighted means between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from ..._logging import logger
from ..._settings import settings
from ...data.lattice import spot_pitch
from ...data.section import Parts, Prediction, Section, rows_of
from ...data.shares import aggregate
from ...errors import DataValueError
from .._base import Model, ModelInfo, Run
from .._inner import row_blocks
from .._interpolation import (
    distance_rank,
    find_neighbours,
    mean_operator,
    neighbour_weights,
    own_distances,
    position_order,
)
from .._registry import register
from ..nn.pooling import bag_rows
from .config import PAPER, TESLAConfig
from .imputation import channel_weights, distance_quantile, third_axis

__all__ = ["TESLA"]


class _Space(NamedTuple):
    """Places in units of `px_um`: spots (n, 3) in `order`, superpixels (m, 3)."""

    spots: np.ndarray
    order: np.ndarray
    superpixels: np.ndarray


@register
class TESLA(Model[TESLAConfig]):
    """Superpixels as weighted means of the spots around, near in space and in colour :cite:p:`tesla2023`.

    Nothing is trained: a section's own spots are read when it is predicted. Values are convex combinations of measured
    ones, so they never leave their range, and say how much there is where a spot would lie rather than in a superpixel.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> spots = np.array([[0.0, 0.0], [100.0, 0.0]])
    >>> between = np.array([[0.0, 0.0], [50.0, 0.0], [100.0, 0.0]])
    >>> share = sparse.csr_array(np.array([[1.0, 0, 0], [0, 0, 1.0]]))
    >>> parts = Parts(np.arange(3), between, share, colour=np.full((3, 3), 0.5), level="superpixel")
    >>> targets = Targets(np.array([[1.0], [3.0]]), np.ones(2), ("A",), unit="counts")
    >>> section = Section("s", np.array(["a", "b"]), np.empty((2, 0)), spots, targets=targets, parts=parts)
    >>> models.create("tesla").fit([section]).predict(section).mean.ravel().round(2).tolist()
    [1.0, 2.0, 3.0]
    """

    Config: ClassVar[type] = TESLAConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="tesla",
        summary="Mean of the nearest spots in space and colour, on a fine grid; nothing is trained",
        level="superpixel",
        task="in-sample",
        needs=("positions", "colour", "expression"),
        trained=False,
        in_memory=1,
        cost="seconds; grows with superpixels x genes",
        presets=("default", "paper"),
        paper="10.1016/j.cels.2023.03.008",
    )

    @classmethod
    def preset(cls, name: str) -> TESLAConfig:
        """Our settings (``"default"``) or the published ones (``"paper"``)."""
        return PAPER if name == "paper" else super().preset(name)

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Check that the sections can be interpolated."""
        for section in sections:
            self._space(section)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield weighted means of the spots, and the rank of each superpixel's nearest distance among the spots' own."""
        self._check_section(section)
        config, parts = self.config, section.require_parts()
        space = self._space(section)
        tree = cKDTree(space.spots)
        cut = self._cut(section, space)
        own = own_distances(tree)
        expression = section.require_targets()[space.order]
        n_empty = 0
        for rows in row_blocks(parts.n_parts, block_rows):
            found = find_neighbours(tree, space.superpixels[rows], config.neighbours, cut=cut, workers=settings.n_jobs)
            weight = neighbour_weights(found.distance, config.weighting, config.power)
            empty = np.isinf(found.distance[:, 0])
            n_empty += int(empty.sum())
            if config.empty == "nearest":
                weight[empty, 0] = 1.0
            mean = mean_operator(found.spot, weight, section.n_obs) @ expression
            ood = distance_rank(own, found.nearest)
            yield Prediction(np.asarray(parts.ids)[rows], self.genes, self.unit, mean, ood=ood, level=parts.level)
        if n_empty:
            does = "take the value of the nearest spot" if config.empty == "nearest" else "are 0"
            logger.info("tesla: %d of %d superpixels have no spot within the cut and %s", n_empty, parts.n_parts, does)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Nothing: what is interpolated is the section's own."""
        return {}, {}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Nothing to take."""

    def _space(self, section: Section) -> _Space:
        """Spots and superpixels in space and colour."""
        config, parts = self.config, section.require_parts()
        if section.n_obs < 2:
            raise DataValueError(f"section {section.name!r} has one spot; interpolating needs at least two")
        bag_rows(parts.share, section.name)
        colour = _colours(section, parts)
        weights = channel_weights(colour)
        along = colour @ weights
        mean, sd = float(along.mean()), float(along.std())
        xy = np.asarray(section.coordinates, dtype=np.float64)
        centres = np.asarray(parts.coordinates, dtype=np.float64)
        if config.colour_scale == "pitch":
            scale = config.colour_weight * spot_pitch(xy, section.region)
        else:
            scale = config.colour_weight * float(centres.std(axis=0).max())
        if config.colour_formula == "one":
            z = third_axis(_spot_colours(section, parts, colour) @ weights, scale, mean=mean, sd=sd)
        else:
            z = third_axis(colour[_nearest_cell(centres, xy)].mean(axis=1), scale)
        order = position_order(xy)
        spots = np.column_stack([xy, z])[order] / config.px_um
        superpixels = np.column_stack([centres, third_axis(along, scale, mean=mean, sd=sd)]) / config.px_um
        return _Space(spots, order, superpixels)

    def _cut(self, section: Section, space: _Space) -> float:
        """Distance beyond which a spot is no neighbour."""
        config = self.config
        if config.cut == "radius":
            return config.radius * spot_pitch(section.coordinates, section.region) / config.px_um
        share = min(1.0, config.neighbours / len(space.spots))
        return distance_quantile(space.superpixels, space.spots, share)


def _colours(section: Section, parts: Parts) -> np.ndarray:
    """Colours of all superpixels, (m, 3) float64; twelve bytes each on disk, so they are read at once."""
    colour = rows_of(parts.require("colour")).astype(np.float64)
    if not np.isfinite(colour).all():
        raise DataValueError(
            f"section {section.name!r} has superpixels whose colour is NaN or infinite: image and superpixels do not lie "
            "on each other; make the colours anew with hx.pp.embed(sdata, 'rgb', shapes_key='superpixels')"
        )
    return colour


def _spot_colours(section: Section, parts: Parts, colour: np.ndarray) -> np.ndarray:
    """Mean colour under each spot, (n, 3); that of the nearest superpixel where a spot covers none."""
    mean = aggregate(parts.share, colour, "mean")
    bare = np.flatnonzero(np.isnan(mean).any(axis=1))
    mean[bare] = colour[_nearest_cell(parts.coordinates, section.coordinates[bare])]
    return mean


def _nearest_cell(centres: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return cKDTree(centres).query(xy)[1]
