"""The published image encoder: a VQ-VAE on crops of single nuclei."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..._optional import optional_import
from ...errors import DataValueError
from .._training import Fit, fit_lightning
from .keras import Conv, ConvTranspose, KerasAdam, keras_init

if TYPE_CHECKING:
    from torch import Tensor

    from .._base import Run
    from .config import STAnDConfig

__all__ = ["CROP", "LATENT", "VQVAE", "as_crops", "fit_vqvae", "random_symmetry", "scaled"]

NAME = "VQ-VAE"
CROP = (28, 28, 3)  # pixels of 0.5 µm: 14 µm around a nucleus
LATENT = 784
_VARIANCE_CROPS = 10_000


class VQVAE(nn.Module):
    """Crops of 28 × 28 pixels to a grid of 7 × 7 codes of 16 numbers, and back.

    Images come as (k, 28, 28, 3) in [−0.5, 0.5]; padding is Keras'.
    """

    def __init__(self, n_codes: int = 1024, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Conv(3, 32), nn.ReLU(), Conv(32, 64), nn.ReLU(), nn.Conv2d(64, width, 1))
        self.codebook = nn.Parameter(torch.empty(n_codes, width).uniform_(-0.05, 0.05))
        self.decoder = nn.Sequential(
            ConvTranspose(width, 64),
            nn.ReLU(),
            ConvTranspose(64, 32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 3, padding=1),
        )
        keras_init(self)

    def encode(self, x: Tensor) -> Tensor:
        """Latent grid, (k, 7, 7, 16)."""
        return self.encoder(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def codes(self, z: Tensor) -> Tensor:
        """Index of the code nearest to each position of a latent grid, (k, 7, 7)."""
        square = (self.codebook * self.codebook).sum(dim=1)
        return (square - 2 * z @ self.codebook.T).argmin(dim=-1)

    def decode(self, e: Tensor) -> Tensor:
        """Image of a latent grid, (k, 28, 28, 3)."""
        return self.decoder(e.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def losses(self, x: Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction error in units of the pixels' variance, and the two terms that tie latents and codes."""
        z = self.encode(x)
        e = self.codebook[self.codes(z)]
        through = z + (e - z).detach()  # the decoder's gradient reaches the encoder as if nothing were quantised
        reconstruction = F.mse_loss(self.decode(through), x) / variance
        return reconstruction, F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())

    def features(self, x: Tensor) -> Tensor:
        """Quantised latents, row-major (y, x, channel), (k, 784)."""
        return self.codebook[self.codes(self.encode(x))].flatten(1)


def as_crops(features: np.ndarray, name: str = "section") -> np.ndarray:
    """Features that are raw crops, as (k, 2352) uint8, or an error if they are something else."""
    if features.shape[1] != np.prod(CROP):
        raise DataValueError(
            f"section {name!r} has {features.shape[1]} features per part; encoder='vqvae' reads raw crops, 28 × 28 × 3 = "
            "2352 numbers from 0 to 255: make them with hx.pp.embed_nuclei(sdata, 'crops'), or take encoder='frozen'"
        )
    if len(features) and not (features.min() >= 0 and features.max() <= 255):
        raise DataValueError(f"section {name!r}: crops must hold numbers from 0 to 255 and none that is not finite")
    return np.rint(features).astype(np.uint8)


def scaled(crops: Tensor) -> Tensor:
    """Crops (k, 2352) uint8 as images in [−0.5, 0.5], (k, 28, 28, 3)."""
    return crops.reshape(-1, *CROP).float() / 255 - 0.5


def random_symmetry(images: Tensor) -> Tensor:
    """Each image flipped upside down, left to right and across its diagonal, each with probability one half."""
    chosen = torch.rand((3, len(images), 1, 1, 1), device=images.device) < 0.5
    images = torch.where(chosen[0], images.flip(1), images)
    images = torch.where(chosen[1], images.flip(2), images)
    return torch.where(chosen[2], images.transpose(1, 2), images)


def fit_vqvae(config: STAnDConfig, crops: np.ndarray, run: Run) -> tuple[VQVAE, Fit]:
    """A VQ-VAE trained on `crops` (k, 2352) uint8; the history has ``loss``, ``reconstruction`` and ``quantisation``."""
    rng = np.random.default_rng([run.seed, 1])
    order = rng.permutation(len(crops))
    variance = float(scaled(torch.from_numpy(crops[np.sort(order[:_VARIANCE_CROPS])])).double().var(correction=0))
    batches = list(torch.from_numpy(crops[order]).split(config.vqvae_batch))
    if len(batches) > 1 and len(batches[-1]) < config.vqvae_batch:
        batches.pop()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = VQVAE()
    module = _stage(network, config.vqvae_lr, max(variance, 1e-12))
    fit = fit_lightning(module, batches, run, max_epochs=config.vqvae_epochs, name=NAME)
    return network, fit


def _stage(network: VQVAE, lr: float, variance: float) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training neural models")

    class Stage(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network, self.variance = network, variance

        def configure_optimizers(self) -> Any:
            return KerasAdam(self.parameters(), lr=lr)

        def training_step(self, crops: Tensor, batch_idx: int) -> Any:
            reconstruction, quantisation = self.network.losses(random_symmetry(scaled(crops)), self.variance)
            return {
                "loss": reconstruction + quantisation,
                "reconstruction": reconstruction,
                "quantisation": quantisation,
            }

    return Stage()
