"""How the decoders are trained: one step per batch of spots, judged on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ..._optional import optional_import
from .._inner import gene_correlation
from .._training import Fit, fit_lightning
from .counts import CountDecoder
from .keras import KerasAdam
from .spots import SpotBatch, SpotBatches, Spots
from .vqvae import VQVAE, random_symmetry, scaled

if TYPE_CHECKING:
    from torch import Tensor

    from .._base import Run
    from .config import STAnDConfig
    from .decoder import PublishedDecoder

__all__ = ["fit_decoder"]

_LEVELS_FASTER = 10.0  # logarithms move by about the learning rate per step, whatever their gradient


def fit_decoder(
    config: STAnDConfig,
    decoder: CountDecoder | PublishedDecoder,
    spots: Sequence[Spots],
    chosen: Mapping[int, np.ndarray],
    run: Run,
    *,
    epochs: int,
    name: str,
    encoder: VQVAE | None = None,
    held_out: Mapping[int, np.ndarray] | None = None,
) -> Fit:
    """Fit `decoder` in place on the `chosen` spots of each section; with `held_out` spots, keep the best epoch.

    The history has the column ``loss`` and with held-out spots ``val_loss``, ``val_pearson`` (mean over genes of the
    correlation within a section, of log expression) and ``val_unscored`` (genes whose measurement is constant there).
    """
    published = not isinstance(decoder, CountDecoder)
    batches = SpotBatches(spots, chosen, config.batch, run.seed, drop_last=published)
    if isinstance(decoder, CountDecoder):
        decoder.start(*_beginning(spots, chosen))
    held = [] if held_out is None else [_in_batches(spots[i], rows, config.batch) for i, rows in held_out.items()]
    return fit_lightning(
        _stage(config, decoder, encoder),
        batches,
        run,
        max_epochs=epochs,
        validation=held,
        monitor="val_pearson" if held else None,
        mode="max",
        patience=config.patience,
        name=name,
    )


def _beginning(spots: Sequence[Spots], chosen: Mapping[int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, size factors and amounts of parts of the chosen spots."""
    counts = np.concatenate([spots[i].target[rows] for i, rows in chosen.items()])
    size = np.concatenate([spots[i].size[rows] for i, rows in chosen.items()])
    amount = np.concatenate([spots[i].amount[rows] for i, rows in chosen.items()])
    return torch.from_numpy(counts), torch.from_numpy(size), torch.from_numpy(amount)


def _in_batches(spots: Spots, rows: np.ndarray, size: int) -> tuple[SpotBatch, ...]:
    return tuple(spots.batch(rows[start : start + size]) for start in range(0, len(rows), size))


def _stage(config: STAnDConfig, decoder: CountDecoder | PublishedDecoder, encoder: VQVAE | None) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training neural models")

    class Stage(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = decoder, encoder

        def configure_optimizers(self) -> Any:
            if not isinstance(self.decoder, CountDecoder):
                return KerasAdam(self.decoder.parameters(), lr=config.lr)
            network = list(self.decoder.network.named_parameters())
            levels = [each for key, each in self.decoder.named_parameters() if key.startswith("log_")]
            groups: list[dict[str, Any]] = [
                {"params": [each for key, each in network if each.ndim > 1]},
                {"params": [each for key, each in network if each.ndim < 2], "weight_decay": 0.0},
                {"params": levels, "weight_decay": 0.0, "lr": _LEVELS_FASTER * config.lr},
            ]
            return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

        def features(self, batch: SpotBatch, *, augment: bool) -> Tensor:
            if batch.features.dtype != torch.uint8:
                return batch.features
            images = scaled(batch.features)
            with torch.no_grad():
                return self.encoder.features(random_symmetry(images) if augment else images)  # type: ignore[union-attr]

        def loss(self, batch: SpotBatch, *, augment: bool) -> tuple[Tensor, Tensor]:
            """Loss, and the expected log expression."""
            expected = self.decoder(self.features(batch, augment=augment), batch.bags)
            if isinstance(self.decoder, CountDecoder):
                return self.decoder.loss(batch.size[:, None] * expected, batch.target), torch.log1p(expected)
            return F.mse_loss(expected, batch.target), expected

        def training_step(self, batch: SpotBatch, batch_idx: int) -> Tensor:
            return self.loss(batch, augment=True)[0]

        def validation_step(self, batches: Sequence[SpotBatch], batch_idx: int) -> dict[str, float]:
            losses, expected, measured = [], [], []
            for batch in batches:
                loss, log_expression = self.loss(batch, augment=False)
                losses.append(float(loss) * len(batch.target))
                expected.append(log_expression.float().cpu().numpy())
                target = batch.target
                if isinstance(self.decoder, CountDecoder):
                    target = torch.log1p(target / batch.size[:, None])
                measured.append(target.float().cpu().numpy())
            r = gene_correlation(np.concatenate(measured), np.concatenate(expected))
            unscored = int(np.isnan(r).sum())
            return {
                "loss": sum(losses) / sum(map(len, measured)),
                "pearson": float(np.nanmean(r)) if unscored < len(r) else float("nan"),
                "unscored": unscored,
            }

    return Stage()
