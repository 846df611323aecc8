"""The model: what is fitted, and how positions are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..._device import resolve_device
from ..._logging import logger
from ...data.section import Prediction, Section
from ...errors import DataValueError
from .._base import Model, ModelInfo, Run
from .._inner import MIN_TO_SPLIT, of_shape, row_blocks
from .._registry import register
from .._training import Fit, forget_checkpoints
from .config import PAPER, StageConfig
from .network import ExpressionScale, Frame, decoder
from .training import drawn_rows, fit_networks

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Stage"]


@register
class Stage(Model[StageConfig]):
    """Expression at unmeasured positions of a section, after STAGE (Nucleic Acids Research, 2024).

    An auto-encoder compresses the expression of each measured spot to as many numbers as it has coordinates, which are
    pulled towards these coordinates; its decoder, fed the coordinates of a place that was not measured, returns the
    expression there. The histology is not looked at: where a method that reads it does no better, the image adds nothing
    to smooth interpolation.

    Each section has networks of its own, and only it can be predicted.

    A re-implementation from the published description, not the authors' code. ``preset="paper"`` does what they do; the
    default scales coordinates isotropically to [0, 1], standardises expression, leaves out the ReLU behind the latent, and
    stops by held-out spots; see :class:`StageConfig`.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> xy = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), axis=-1).reshape(-1, 2) * 100
    >>> targets = Targets(xy[:, :1], np.full(25, 1e4), ("A",))
    >>> between = Parts(np.arange(3), np.full((3, 2), 50.0), sparse.csr_array((25, 3)), level="spot")
    >>> section = Section("s", np.arange(25).astype(str), np.zeros((25, 0)), xy, targets=targets, parts=between)
    >>> models.create("stage", widths=[8], max_epochs=5).fit([section]).predict(section).mean.shape
    (3, 1)
    """

    Config: ClassVar[type] = StageConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="stage",
        summary="Auto-encoder whose code is the position: interpolation between spots, without histology",
        level="spot",
        task="in-sample",
        needs=("positions",),
        in_memory=2,
        cost="under a minute; grows with spots × genes",
        presets=("default", "paper"),
        paper="10.1093/nar/gkae294",
    )

    epochs: list[int]

    @classmethod
    def preset(cls, name: str) -> StageConfig:
        """``"default"``, or ``"paper"``: what the authors do."""
        presets = {"default": StageConfig(), "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'stage'; it has 'default', 'paper'")
        return presets[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Fit networks for each section."""
        fits: list[Fit] = []
        self._frames, self._scales, self._decoders, self.epochs = [], [], [], []
        found: list[float] = []
        for number, section in enumerate(sections):
            if section.n_obs < 2:
                raise DataValueError(
                    f"section {section.name!r} has {section.n_obs} spot: a function of position needs at least 2"
                )
            frame = Frame.fit(section.coordinates, self.config, section.name)
            order = np.lexsort(np.asarray(section.coordinates).T)  # the order of the spots shall not matter
            measured = section.require_targets()[:][order]
            scale = ExpressionScale.fit(measured, standardize=self.config.standardize)
            expression = scale(measured)
            coordinates = frame(section.coordinates, section.name)[order]
            epochs = self.config.max_epochs
            name = f"stage, section {number + 1}"
            kept, held = _split(section.n_obs, self.config, run.seed)
            if len(held):
                _, choice = fit_networks(
                    self.config,
                    (expression[kept], coordinates[kept]),
                    run,
                    epochs=epochs,
                    held=(expression[held], coordinates[held]),
                    name=f"{name}, choice of epochs",
                )
                epochs = choice.best_epoch or epochs
                fits.append(choice)
                found.append(choice.best_score)
                self.history += choice.history
                logger.info("stage: %d epochs for %r, r %.3f at held-out spots", epochs, section.name, found[-1])
            networks, final = fit_networks(self.config, (expression, coordinates), run, epochs=epochs, name=name)
            fits.append(final)
            if not len(held):
                self.history += final.history
            self._frames.append(frame)
            self._scales.append(scale)
            self._decoders.append(networks.decoder)
            self.epochs.append(epochs)
        if np.isfinite(found).any():
            self.scores = {"inner_pearson": float(np.nanmean(found))}
        forget_checkpoints(*fits)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Decode the positions of the parts."""
        self._check_section(section)
        parts = section.require_parts()
        number = self._number_of(section)
        frame, scale, network = self._frames[number], self._scales[number], self._decoders[number]
        device = resolve_device()
        network.to(device)
        try:
            for rows in row_blocks(parts.n_parts, block_rows):
                coordinates = torch.from_numpy(frame(parts.coordinates[rows], section.name)).to(device)
                with torch.inference_mode():
                    mean = scale.inverse(network(coordinates).float().cpu().numpy())
                yield Prediction(np.asarray(parts.ids)[rows], self.genes, self.unit, mean, level=parts.level)
        finally:
            network.cpu()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Decoder and scales of each section; the encoders are needed for training only."""
        arrays: dict[str, np.ndarray] = {}
        for number, (frame, scale) in enumerate(zip(self._frames, self._scales, strict=True)):
            weights = self._decoders[number].state_dict()
            arrays |= {f"{number}.origin": frame.origin, f"{number}.scale": frame.scale}
            arrays |= {f"{number}.mean": scale.mean, f"{number}.spread": np.asarray(scale.spread)}
            arrays |= {f"{number}.decoder.{name}": value.numpy() for name, value in weights.items()}
        return arrays, {"epochs": self.epochs}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.epochs = [int(epochs) for epochs in values["epochs"]]
        self._frames, self._scales, self._decoders = [], [], []
        for number in range(len(self.epochs)):
            origin = of_shape(arrays[f"{number}.origin"], (None,), "origin")
            self._frames.append(Frame(origin, of_shape(arrays[f"{number}.scale"], (len(origin),), "scale")))
            mean = of_shape(arrays[f"{number}.mean"], (len(self.genes),), "mean")
            self._scales.append(ExpressionScale(mean, float(arrays[f"{number}.spread"].item())))
            network: nn.Sequential = decoder(len(self.genes), len(origin), self.config)
            state = {
                # Scalars come back as arrays of one.
                name: torch.tensor(arrays[f"{number}.decoder.{name}"]).reshape(value.shape)
                for name, value in network.state_dict().items()
            }
            network.load_state_dict(state)
            self._decoders.append(network.eval())


def _split(n: int, config: StageConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are fitted on and rows to stop by; none of the latter where there are too few, or no stopping."""
    if config.patience is None or n < MIN_TO_SPLIT:
        return np.arange(n), np.empty(0, dtype=np.int64)
    kept = drawn_rows(n, min(1 - config.held_out, 1 - 1 / n), np.random.default_rng([seed, n]))
    return kept, np.setdiff1d(np.arange(n), kept)
