"""Fitting of the networks of one section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ..._device import resolve_device
from ..._optional import optional_import
from .._inner import gene_correlation
from .._training import Fit, fit_lightning
from .losses import directions, latent_loss, reconstruction_loss, total_loss
from .network import Autoencoder

if TYPE_CHECKING:
    from torch import Tensor

    from .._base import Run
    from .config import StageConfig

__all__ = ["Batches", "drawn_rows", "fit_networks", "stage_module"]

Pair = tuple[np.ndarray, np.ndarray]


def fit_networks(
    config: StageConfig, spots: Pair, run: Run, *, epochs: int, held: Pair | None = None, name: str
) -> tuple[Autoencoder, Fit]:
    """Fit new networks on `spots`.

    Parameters
    ----------
    config
        Architecture, loss and optimiser.
    spots
        Scaled expression (n, G) and coordinates (n, X), float32.
    run
        Seed, device and so on.
    epochs
        Largest number of epochs.
    held
        Spots to stop by; ``None`` runs all epochs.
    name
        Shown in messages.

    Returns
    -------
    The networks, on the CPU, and the history with the columns ``loss``, ``latent``, ``reconstruction`` and, with
    `held`, ``val_mse`` and ``val_pearson``.
    """
    expression, coordinates = map(torch.from_numpy, spots)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        networks = Autoencoder(expression.shape[1], coordinates.shape[1], config)
    device = resolve_device(run.device)
    batches = Batches(expression.to(device), coordinates.to(device), config.batch, run.seed)
    fit = fit_lightning(
        stage_module(config, networks),
        batches,  # type: ignore[arg-type]
        run,
        max_epochs=epochs,
        visit=batches.of_epoch,
        validation=[] if held is None else [tuple(map(torch.from_numpy, held))],
        monitor=None if held is None else "val_pearson",
        mode="max",
        patience=config.patience,
        name=name,
    )
    return networks, fit


def drawn_rows(n: int, share: float, generator: np.random.Generator | np.random.RandomState) -> np.ndarray:
    """A random share of `n` spots, rounded, each at most once, in order."""
    return np.sort(generator.choice(n, round(share * n), replace=False))


class Batches:
    """Batches of every epoch, drawn anew in each: item ``e * len(batches) + b`` is batch b of epoch e.

    The tensors stay on their device; an epoch only permutes indices. A last batch of one spot, which batch normalisation
    cannot take, joins the one before.
    """

    def __init__(self, expression: Tensor, coordinates: Tensor, size: int, seed: int) -> None:
        self.expression, self.coordinates, self.seed = expression, coordinates, seed
        n = len(expression)
        self.starts = [start for start in range(0, n, size) if start == 0 or n - start > 1]

    def __len__(self) -> int:
        return len(self.starts)

    def of_epoch(self, epoch: int) -> range:
        """Items that an epoch (from 0) visits."""
        return range(epoch * len(self), (epoch + 1) * len(self))

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        epoch, batch = divmod(item, len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.expression))
        chosen = np.split(order, self.starts[1:])[batch]
        rows = torch.from_numpy(chosen).to(self.expression.device)
        return self.expression[rows], self.coordinates[rows]


def stage_module(config: StageConfig, networks: Autoencoder) -> Any:
    """The Lightning module.

    One Adam takes the part of the published two, one for each network, with equal settings: it treats every weight by
    itself. The published learning-rate schedule multiplies by 1 and is left out.
    """
    lightning = optional_import("lightning.pytorch", feature="training stage")

    class StageModule(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.networks = networks
            self.weights = repr((config.swd_weight, config.l1_weight, config.recon_weight, config.n_projections))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=config.lr)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            expression, coordinates = batch
            latent, predicted = self.networks(expression, coordinates)
            losses = {"reconstruction": reconstruction_loss(predicted, expression, config.l1_weight)}
            if latent is not None:
                along = directions(config.n_projections, coordinates)
                losses["latent"] = latent_loss(latent, coordinates, along, config.swd_weight)
            return {"loss": total_loss(losses.get("latent"), losses["reconstruction"], config), **losses}

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor | float]:
            expression, coordinates = batch
            predicted = self.networks.decoder(coordinates)
            r = gene_correlation(expression.cpu().numpy(), predicted.float().cpu().numpy())
            score = float(np.nanmean(r)) if np.isfinite(r).any() else float("nan")
            return {"mse": F.mse_loss(predicted, expression), "pearson": score}

    return StageModule()
