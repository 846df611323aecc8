"""The model: what is fitted, and how the parts of a section are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..._device import resolve_device
from ..._logging import logger
from ...data.section import Prediction, Section
from ...errors import DataValueError
from .._base import Model, ModelInfo, Run
from .._inner import Scaler, read_features, row_blocks
from .._registry import register
from .._training import Fit, fit_lightning, forget_checkpoints
from .config import PAPER, IStarConfig
from .features import smoothed
from .network import PartNetwork
from .training import GeneScale, SpotBatches, Supervision, section_depths, training_step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IStar"]

_ROWS_AT_ONCE = 2048  # parts whose predictions by all members are held together


@register
class IStar(Model[IStarConfig]):
    """Expression of superpixels (or nuclei) from their image features, taught by the counts of spots.

    After iStar (Zhang et al., Nature Biotechnology 2024): a small network maps the features of a part to expression
    that cannot be negative; only its sums over spots are compared with measurements. Several networks with different
    starts are averaged.

    A re-implementation from the published description, not the authors' code. ``preset="paper"`` does what they do,
    with seeds. The default repairs what its documentation lists: spots count the exact share of each part and not a
    disc of whole superpixels, counts are compared by the deviance that suits them, and features are standardised.

    Predictions are expected counts of whole parts, so that ``share @ prediction`` is the expected count of a spot.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> share = sparse.csr_array(np.kron(np.eye(20), np.ones((1, 3))))
    >>> parts = Parts(np.arange(60).astype(str), x[:, :2], share, x)
    >>> counts = np.random.default_rng(1).poisson(share @ np.exp(x[:, :1]))
    >>> spots = x[::3, :2]
    >>> targets = Targets(counts, counts.sum(axis=1), ("A",), "counts")
    >>> section = Section("s", np.arange(20).astype(str), np.empty((20, 0)), spots, targets=targets, parts=parts)
    >>> models.create("istar", epochs=2).fit([section]).predict(section).mean.shape
    (60, 1)
    """

    Config: ClassVar[type] = IStarConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="istar",
        summary="Network on the features of superpixels, taught by the sums over spots; mean of five",
        level="superpixel",
        task="both",
        needs=("parts",),
        uncertainty=True,
        distributed=True,
        in_memory=2,
        cost="2 to 3 minutes; grows with parts under spots and with genes",
        presets=("default", "paper"),
        paper="10.1038/s41587-023-02019-9",
    )

    @classmethod
    def preset(cls, name: str) -> IStarConfig:
        """``"default"``, or ``"paper"``: what the authors do, with seeds."""
        presets = {"default": IStarConfig(), "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'istar'; it has 'default', 'paper'")
        return presets[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Train one network after another on the spots of all sections."""
        self.unit = self.config.unit
        if run.precision is None:
            run = replace(run, precision="32-true")
        features = [self._features(section) for section in sections]
        self._scaler = Scaler.fit(features) if self.config.standardize == "global" else None
        supervised = [
            Supervision.of(section, each, self._scaler_of(each), self.config)
            for section, each in zip(sections, features, strict=True)
        ]
        data = Supervision.joined(supervised, section_depths(sections, self.config).tolist())
        minmax = self.config.loss == "mse"
        self._scale = GeneScale.fit(data, minmax=minmax)
        target = self._scale.scaled(data) if minmax else data.counts
        # Every member has its own seed, which is kept with it.
        seeds = np.random.SeedSequence(run.seed).generate_state(self.config.n_members)
        self.seeds = [int(seed) for seed in seeds]
        self._members: list[PartNetwork] = []
        fits: list[Fit] = []
        for number, seed in enumerate(self.seeds, start=1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = self._build()
            batches = SpotBatches(data, target, self.config.batch, seed)
            fit = fit_lightning(
                training_step(self.config, network, self._scale),
                batches,
                replace(run, seed=seed),
                max_epochs=self.config.epochs,
                visit=batches.visit,
                name=f"istar-{number}",
            )
            logger.info("istar: network %d of %d, loss %.4g", number, len(self.seeds), fit.history[-1]["loss"])
            self._members.append(network)
            fits.append(fit)
        self.history = [
            {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            for rows in zip(*(fit.history for fit in fits), strict=True)
        ]
        forget_checkpoints(*fits)

    def _features(self, section: Section) -> Section:
        """The parts of a section as observations of their own, with smoothed features."""
        parts = section.require_parts()
        features = smoothed(parts.require("features"), parts.grid, self.config.smooth)
        return Section(section.name, np.asarray(parts.ids), features, np.asarray(parts.coordinates))

    def _scaler_of(self, features: Section) -> Scaler | None:
        return Scaler.fit([features]) if self.config.standardize == "section" else self._scaler

    def _build(self) -> PartNetwork:
        return PartNetwork(
            self.n_features,
            len(self.genes),
            width=self.config.width,
            n_layers=self.config.n_layers,
            # Outputs in units of each gene's mean start there: the logarithm of a likelihood is steep near 0.
            level=None if self.config.loss == "mse" else 1.0,
            dispersion=self.config.loss == "nb",
        )

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the expected counts of whole parts, and the spread of the members where there are several."""
        self._check_section(section)
        parts = section.require_parts()
        features = self._features(section)
        scaler = self._scaler_of(features)
        device = resolve_device()
        try:
            for member in self._members:
                member.to(device)
            for rows in row_blocks(parts.n_parts, block_rows):
                x = read_features(features, rows)
                x = x if scaler is None else scaler(x)
                found = [
                    self._predicted(torch.from_numpy(x[part]).to(device)) for part in row_blocks(len(x), _ROWS_AT_ONCE)
                ]
                mean, std, latent = (
                    None if each[0] is None else np.concatenate([value for value in each if value is not None])
                    for each in zip(*found, strict=True)
                )
                assert mean is not None
                yield Prediction(
                    np.asarray(parts.ids)[rows],
                    self.genes,
                    self.unit,
                    mean,
                    std=std,
                    latent=latent,
                    level=parts.level,
                )
        finally:
            for member in self._members:
                member.cpu()

    def _predicted(self, x: Tensor) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Expected counts (k, G), their spread over the members, and the latent of some parts."""
        with torch.inference_mode():
            latents = [member.embed(x) for member in self._members]
            values = torch.stack(
                [self._scale(member.decode(z)) for member, z in zip(self._members, latents, strict=True)]
            )
            mean = values.mean(dim=0) if self.config.aggregate == "mean" else _median(values)
            std = values.std(dim=0).cpu().numpy() if len(values) > 1 else None
            return mean.cpu().numpy(), std, self._latent(latents)

    def _latent(self, latents: list[Tensor]) -> np.ndarray | None:
        if self.config.latent == "none":
            return None
        if self.config.latent == "first":
            return latents[0].cpu().numpy()
        if self.config.latent == "concatenate":
            return torch.cat(latents, dim=1).cpu().numpy()
        return _median(torch.stack(latents)).cpu().numpy()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights of the members, scale of each gene, standardisation, and the seeds."""
        arrays = {
            f"member{number}.{name}": value.numpy()
            for number, member in enumerate(self._members)
            for name, value in member.state_dict().items()
        }
        scaling = {} if self._scaler is None else self._scaler.state()
        return {**arrays, **self._scale.state(), **scaling}, {"seeds": self.seeds}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.seeds = [int(seed) for seed in values["seeds"]]
        self._scale = GeneScale.from_state(arrays, len(self.genes))
        self._scaler = Scaler.from_state(arrays) if self.config.standardize == "global" else None
        self._members = []
        for number in range(len(self.seeds)):
            prefix = f"member{number}."
            member = self._build()
            member.load_state_dict(
                {
                    name.removeprefix(prefix): torch.from_numpy(np.array(array))
                    for name, array in arrays.items()
                    if name.startswith(prefix)
                }
            )
            self._members.append(member.eval())


def _median(values: Tensor) -> Tensor:
    """Median over the first dimension; the mean of the middle two of an even number."""
    ordered = values.sort(dim=0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
