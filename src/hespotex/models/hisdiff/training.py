"""The module that is trained on batches of row numbers, and gathers what they stand for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._optional import optional_import
from .._rows import mark_of
from .config import HisDiffConfig
from .diffusion import Schedule, denoising_terms
from .network import Context, Denoiser

__all__ = ["Spots", "make_step"]


class Spots(NamedTuple):
    """All training spots, each section's after the other's.

    Attributes
    ----------
    features
        Embeddings, (n, d).
    values
        What is diffused, (n, r).
    near, wide
        Row numbers of the neighbourhoods, (n, k) int64; ``None`` where only the spot itself counts.
    near_absent, wide_absent
        Which of them stand for no neighbour, (n, k) bool.
    """

    features: Tensor
    values: Tensor
    near: Tensor | None
    wide: Tensor | None
    near_absent: Tensor | None
    wide_absent: Tensor | None


def make_step(config: HisDiffConfig, network: Denoiser, spots: Spots, seed: int) -> Any:
    """Module for :func:`~hespotex.models._training.fit_lightning` over batches of row numbers of `spots`.

    ``module.trained`` is the network to sample with: the one that is optimised, or the running mean of it.
    """
    lightning = optional_import("lightning.pytorch", feature="training hisdiff")

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.average = deepcopy(network).requires_grad_(False) if config.average else None
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
            # Buffers, so that they move to the device at once; not kept in checkpoints, which are known by the mark.
            for name, value in spots._asdict().items():
                self.register_buffer(f"spots_{name}", value, persistent=False)
            self.mark = mark_of(spots, config)
            self.tables = Schedule.linear().tables()

        @property
        def trained(self) -> Denoiser:
            return self.network if self.average is None else self.average

        def on_fit_start(self) -> None:
            self.tables = Schedule.linear().tables(self.device)

        def context(self, rows: Tensor) -> Context:
            local = self.spots_features[rows]
            if self.spots_near is None:
                return Context(local)
            near, wide = self.spots_features[self.spots_near[rows]], self.spots_features[self.spots_wide[rows]]
            return Context(local, near, wide, self.spots_near_absent[rows], self.spots_wide_absent[rows])

        def terms(self, model: Denoiser, rows: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
            clean = self.spots_values[rows]
            noisy = self.tables.noisy(clean, noise, step)
            output, interpolation = model(noisy, step, self.context(rows)).float().unbind(dim=1)
            return denoising_terms(
                self.tables, clean, noisy, noise, step, output, interpolation, config.likelihood, config.output
            )

        def training_step(self, rows: Tensor, batch_idx: int) -> dict[str, Tensor]:
            step = torch.randint(len(self.tables.signal), (len(rows),), device=rows.device)
            noise = torch.randn(len(rows), self.spots_values.shape[1], device=rows.device)
            squared, bits = self.terms(self.network, rows, step, noise)
            if bits is None:
                return {"loss": squared.mean()}
            return {"loss": (squared + bits).mean(), "mse": squared.mean().detach(), "bits": bits.mean().detach()}

        def on_train_start(self) -> None:
            self.steps = int(self.trainer.global_step)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.average is None or self.trainer.global_step == self.steps:  # a step may take several batches
                return
            self.steps = int(self.trainer.global_step)
            self.updates += 1
            # A long memory would keep the untrained weights for most of a short training.
            decay = torch.clamp((1 + self.updates) / (10 + self.updates), max=config.average)
            with torch.no_grad():
                for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                    kept.lerp_(new, (1 - decay).to(kept.dtype))

        def validation_step(self, rows: Tensor, batch_idx: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(seed)  # the same times and noise at every validation
            n, width = len(rows), self.spots_values.shape[1]
            losses = []
            for share in range(4):
                step = (torch.randperm(n, generator=generator) + share / 4) / n * len(self.tables.signal)
                noise = torch.randn(n, width, generator=generator)
                losses.append(self.terms(self.trained, rows, step.long().to(rows.device), noise.to(rows.device))[0])
            return {"loss": torch.stack(losses).mean()}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    return Step()
