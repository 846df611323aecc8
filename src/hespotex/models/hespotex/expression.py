"""Stage 1: spot embeddings of the training sections from the graph attention autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..._optional import optional_import
from .._training import Fit, fit_lightning
from ..nn.gate import GATE, gate_optimizer

if TYPE_CHECKING:
    from torch import Tensor

    from .._base import Run
    from .config import HESpotExConfig

__all__ = ["spot_embeddings"]

NAME = "expression stream"


def spot_embeddings(
    config: HESpotExConfig, sections: Sequence[tuple[Tensor, Tensor]], run: Run, *, gate: GATE
) -> tuple[list[Tensor], Fit]:
    """Fit `gate` and embed every section.

    Parameters
    ----------
    config
        Order of the sections and settings of the optimiser.
    sections
        Expression (n, G) and edges (2, E) of each.
    run
        Seed, device and so on.
    gate
        Autoencoder with its initial weights; fitted in place.

    Returns
    -------
    Embedding (n, width) of each section, and the history of the fit. In sequential order an embedding is the one
    under the weights at the end of the section's own turn, so that no two of them share a space.
    """
    sequential = config.gate_order == "sequential"
    module = _stage(config, gate, [len(expression) for expression, _ in sections] if sequential else [])
    fit = fit_lightning(
        module,
        [(torch.tensor(index), *section) for index, section in enumerate(sections)],
        run,
        max_epochs=config.gate_epochs * (len(sections) if sequential else 1),
        gradient_clip=config.gate_clip,
        visit=(lambda epoch: [epoch // config.gate_epochs]) if sequential else None,
        name=NAME,
    )
    if sequential:
        return [module.get_buffer(f"embedding_{index}") for index in range(len(sections))], fit
    with torch.no_grad():
        return [gate.encode(*section) for section in sections], fit


def _stage(config: HESpotExConfig, gate: GATE, sizes: Sequence[int]) -> Any:
    """The Lightning module; `sizes` are the sections' numbers of observations in sequential order, else empty."""
    lightning = optional_import("lightning.pytorch", feature="training neural models")

    class ExpressionStage(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gate = gate
            self.epochs = config.gate_epochs
            for index, size in enumerate(sizes):  # buffers, so that an interrupted fit keeps those it has
                self.register_buffer(f"embedding_{index}", torch.zeros(size, gate.w2.shape[1], dtype=gate.w2.dtype))

        def configure_optimizers(self) -> Any:
            return gate_optimizer(self.gate, lr=config.gate_lr, weight_decay=config.gate_weight_decay)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            _, expression, edges = batch
            return torch.nn.functional.mse_loss(self.gate(expression, edges)[1], expression)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if sizes and (self.current_epoch + 1) % self.epochs == 0:
                index, expression, edges = batch
                with torch.no_grad():
                    self.get_buffer(f"embedding_{int(index)}").copy_(self.gate.encode(expression, edges))

    return ExpressionStage()
