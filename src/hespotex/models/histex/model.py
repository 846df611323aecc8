"""The model: fitting on the spots of a section, and prediction of its superpixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..._device import resolve_device
from ..._optional import optional_import
from ...data.section import Prediction, Section
from ...errors import DataValueError
from .._base import Model, ModelInfo, Run
from .._inner import Scaler, of_shape, row_blocks
from .._registry import register
from .._training import fit_lightning, forget_checkpoints
from ..nn.pooling import Bags
from .config import PAPER, HistexConfig
from .inputs import Batch, Batches, Inputs, Shape, fit_scale, spots_of
from .network import network_of
from .scale import Scale
from .windows import N_EXTRA

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Histex"]

_TOKENS = 4096  # that pass through the network at once in prediction; bounds memory


@register
class Histex(Model[HistexConfig]):
    """Superpixel expression from image features and nearby spots, after HISTEX (MICCAI 2025).

    A window of superpixels and the measured expression around it attend to each other; the mean of the superpixels under a
    spot learns the spot. The prediction is the expected count of each superpixel.

    The model predicts the sections it was fitted on: it reads measured expression wherever it predicts, and no published
    result speaks of other sections.

    A re-implementation from the published description, not the authors' code. ``preset="paper"`` does what they do; the
    default repairs the defects that its documentation lists.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> grid = np.indices((8, 8)).reshape(2, -1).T
    >>> share = sparse.csr_array(np.kron(np.eye(8), np.ones((1, 8))))  # each spot covers one row
    >>> parts = Parts(np.arange(64), grid[:, ::-1] * 8.0 + 4, share, rng.normal(size=(64, 3)), rng.uniform(size=(64, 3)),
    ...               grid, 8.0, "superpixel")
    >>> spots = np.column_stack([np.full(8, 32.0), np.arange(8) * 8.0 + 4])
    >>> targets = Targets(rng.poisson(5, size=(8, 2)), np.full(8, 10.0), ("A", "B"), unit="counts")
    >>> section = Section("s", np.arange(8), np.zeros((8, 0)), spots, targets=targets, parts=parts)
    >>> model = models.create("histex", epochs=1, width=8).fit([section])
    >>> model.predict(section).mean.shape
    (64, 2)
    """

    Config: ClassVar[type] = HistexConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="histex",
        summary="Windows of superpixels and nearby measured expression attend to each other; spots are sums (HISTEX-style)",
        level="superpixel",
        task="in-sample",
        needs=("parts", "colour", "expression"),
        uncertainty=True,
        distributed=True,
        in_memory=1,
        cost="2 to 5 minutes; grows with spots × superpixels per spot × genes",
        presets=("default", "paper"),
        paper="MICCAI 2025, https://github.com/wenwenmin/HISTEX",
    )

    @classmethod
    def preset(cls, name: str) -> HistexConfig:
        """``"default"``, or ``"paper"``: what the authors do."""
        presets = {"default": HistexConfig(), "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'histex'; it has 'default', 'paper'")
        return presets[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Fit the networks side by side on all spots that have superpixels."""
        config = self.config
        spots = [spots_of(section) for section in sections]
        self._shape = Shape.of(spots, config.mode)
        self._scale = fit_scale(spots, self._shape, config.mode)
        self._scaler = None if config.mode == "original" else Scaler.fit([each.cells.section for each in spots])
        inputs = [self._inputs(each) for each in spots]
        n_spots = sum(len(each.rows) for each in spots)
        batches = Batches(
            inputs,
            self._scale,
            size=batch_size(n_spots, config.batch),
            seed=None if config.mode == "original" else run.seed,
        )
        level = None
        if config.mode == "fixed":
            scaled = np.concatenate([self._scale(each.density[each.rows]) for each in spots])
            level = torch.from_numpy(scaled.mean(axis=0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self._members = self._new_members(level)
        fit = fit_lightning(
            _step(config, self._members),
            batches,
            replace(run, precision=run.precision or "32-true"),
            max_epochs=config.epochs,
            shuffle=config.mode == "fixed",
            name="histex",
        )
        self.history = fit.history
        forget_checkpoints(fit)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the counts of superpixels with their spread over the networks, and latents."""
        self._check_section(section)
        inputs = self._inputs(spots_of(section))
        device = resolve_device()
        members = self._members.to(device)
        try:
            for rows in row_blocks(section.require_parts().n_parts, block_rows):
                values, latents = self._predict(members, inputs, rows, device)
                std = values.std(axis=0, ddof=1) if len(values) > 1 else None
                if self.config.mode == "original":
                    mean, latent = np.median(values, axis=0), np.median(latents, axis=0)
                else:
                    mean, latent = values.mean(axis=0), np.concatenate(latents, axis=1)
                ids = np.asarray(section.require_parts().ids)[rows]
                yield Prediction(ids, self.genes, "counts", mean, std=std, latent=latent, level="superpixel")
        finally:
            self._members.cpu()

    def _predict(
        self, members: nn.ModuleList, inputs: Inputs, rows: slice, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        """Counts (members, m, G) and latents (members, m, width) of some cells."""
        cells, side = inputs.spots.cells, self._shape.side
        place = cells.place[rows]
        corners = inputs.corners(place)
        weight = torch.from_numpy(inputs.importance()).to(device)
        m = len(place)
        values = torch.zeros(len(members), m, len(self.genes), device=device)
        latents = torch.zeros(len(members), m, self.config.width, device=device)
        total = torch.zeros(m, device=device)
        for chunk in row_blocks(len(corners), max(1, _TOKENS // side**2)):
            windows = cells.windows(corners[chunk], side)
            tokens, present = (each.to(device) for each in inputs.tokens(windows))
            context = inputs.context(inputs.centres(corners[chunk])).to(device)
            window, token = np.nonzero((windows >= rows.start) & (windows < rows.start + m))
            cell = torch.from_numpy(windows[window, token] - rows.start).to(device)
            entry = torch.from_numpy(window * side**2 + token).to(device)
            each = weight[torch.from_numpy(token).to(device)]
            total.index_add_(0, cell, each)
            with torch.inference_mode():
                for number, member in enumerate(members):
                    latent = member.encode(tokens, context, present).flatten(0, 1)[entry]  # type: ignore[operator]
                    output = member.decode(latent, tokens.flatten(0, 1)[entry])  # type: ignore[operator]
                    values[number].index_add_(0, cell, output * each[:, None])
                    latents[number].index_add_(0, cell, latent * each[:, None])
        values = self._scale.counts(values / total[:, None])
        return values.cpu().numpy(), (latents / total[:, None]).cpu().numpy()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Networks, scales and size of the windows."""
        arrays = {f"members.{name}": value.numpy() for name, value in self._members.state_dict().items()}
        scale_arrays, scale_values = self._scale.state()
        scaler = {} if self._scaler is None else self._scaler.state()
        values = {**scale_values, "side": self._shape.side, "radius": self._shape.radius}
        return {**arrays, **scale_arrays, **scaler}, values

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._shape = Shape(int(values["side"]), float(values["radius"]))
        self._scale = Scale.from_state(arrays, values, len(self.genes))
        self._scaler = None
        if self.config.mode == "fixed":
            self._scaler = Scaler.from_state(arrays)
            of_shape(self._scaler.mean, (self.n_features + N_EXTRA,), "feature_mean")
        weights = {
            name.removeprefix("members."): array for name, array in arrays.items() if name.startswith("members.")
        }
        with torch.random.fork_rng(devices=[]):
            self._members = self._new_members(None)
        self._members.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
        self._members.eval()

    def _inputs(self, spots: Any) -> Inputs:
        return Inputs.of(self.config, self._shape, spots, self._scale, self._scaler)

    def _new_members(self, level: Tensor | None) -> nn.ModuleList:
        n_channels = self.n_features + N_EXTRA
        return nn.ModuleList(
            network_of(self.config, n_channels, len(self.genes), level) for _ in range(self.config.n_members)
        )


def batch_size(n_spots: int, most: int) -> int:
    """Spots per optimiser step: at most `most`, and few enough for 16 steps per epoch, but never none."""
    return max(1, min(most, n_spots // 16))


def spot_loss(network: Any, batch: Batch) -> Tensor:
    """Squared error of the mean of the cells under each spot, over spots and genes."""
    latent = network.encode(batch.tokens, batch.context, batch.present).flatten(0, 1)[batch.cell]
    scaled = network.decode(latent, batch.tokens.flatten(0, 1)[batch.cell])
    mean = Bags(batch.cell, batch.bag, batch.weight, len(batch.target)).mean(scaled)
    return ((mean - batch.target) ** 2 * batch.importance[:, None]).mean()


def _step(config: HistexConfig, members: nn.ModuleList) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training histex")

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.members = members

        def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            # Each network sees its own gradient alone, whatever is trained beside it.
            losses = torch.stack([spot_loss(member, batch) for member in self.members])
            return {"loss": losses.sum(), "mse": losses.mean().detach()}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    return Step()
