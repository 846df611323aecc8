"""A multilayer perceptron on the image features: the plainest network, one observation at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .._device import resolve_device
from .._logging import logger
from .._optional import optional_import
from ..data.section import Prediction, Section
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._inner import Scaler, gene_correlation, inner_folds, read_features, row_blocks
from ._registry import register
from ._training import fit_lightning, forget_checkpoints

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MLP", "MLPConfig"]

_CHOICE, _FINAL = "mlp-choice", "mlp-final"


@dataclass(frozen=True)
class MLPConfig:
    """Settings of :class:`MLP`.

    Attributes
    ----------
    hidden
        Widths of the hidden layers.
    dropout
        Share of hidden units dropped in training.
    lr, weight_decay
        Of AdamW.
    batch
        Observations per optimiser step.
    max_epochs
        Most epochs; also their number where there is too little to stop by.
    patience
        Epochs without a better held-out score after which training stops.
    """

    hidden: tuple[int, ...] = (256,)
    dropout: float = 0.3
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 128
    max_epochs: int = 60
    patience: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(map(int, self.hidden)))
        for name in ("lr", "batch", "max_epochs", "patience"):
            if not getattr(self, name) > 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be positive")
        if min(self.hidden, default=1) < 1:
            raise DataValueError(f"hidden={self.hidden} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise DataValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if self.weight_decay < 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")


@register
class MLP(Model[MLPConfig]):
    """Multilayer perceptron from standardised features to expression, trained on squared error.

    The number of epochs is the one with the highest mean Pearson r per gene within a held-out training group (else
    section, else spatial block); the network is then fitted anew on all sections for as many epochs.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> features = np.random.default_rng(0).normal(size=(40, 3))
    >>> targets = Targets(np.exp(features[:, :1]), np.ones(40), ("A",), unit="counts")
    >>> section = Section("s", np.arange(40).astype(str), features, features[:, :2], targets=targets)
    >>> model = models.create("mlp", hidden=[8], max_epochs=2).fit([section])
    >>> model.predict(section).mean.shape
    (40, 1)
    """

    Config: ClassVar[type] = MLPConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="mlp",
        summary="Multilayer perceptron on the embedding, stopped by a held-out group",
        distributed=True,
        in_memory=3,
        cost="seconds; grows with spots × genes",
        presets=("default",),
    )

    epochs: int

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose the number of epochs on a held-out part of the training sections, then train on all of them."""
        self._scaler = Scaler.fit(sections)
        features = [self._scaler(read_features(section)) for section in sections]
        targets = [section.require_targets()[:] for section in sections]
        _, folds = inner_folds(sections)
        self.epochs = self.config.max_epochs
        fits = []
        if folds:
            kept = folds[0].kept(sections)
            part = self._train(
                [features[i][rows] for i, rows in kept.items()],
                [targets[i][rows] for i, rows in kept.items()],
                run,
                self.config.max_epochs,
                _CHOICE,
                held=[(features[i][rows], targets[i][rows]) for i, rows in folds[0].held_out.items()],
            )[1]
            fits.append(part)
            if np.isfinite(part.best_score):
                self.scores = {"inner_pearson": part.best_score}
            self.history = part.history
            self.epochs = part.best_epoch or self.config.max_epochs
            logger.info("mlp: %d epochs, r %.3f on the held-out part", self.epochs, part.best_score)
        self._network, final = self._train(features, targets, run, self.epochs, _FINAL)
        self.history = self.history or final.history
        forget_checkpoints(*fits, final)

    def _train(
        self,
        features: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        run: Run,
        epochs: int,
        name: str,
        held: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> tuple[nn.Module, Any]:
        import torch

        x, y = torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            network = self._build(y.mean(dim=0))
        # Batches mix the sections once and stay as they are; their order changes.
        shuffled = torch.from_numpy(np.random.default_rng(run.seed).permutation(len(x)))
        batches = [(x[rows], y[rows]) for rows in shuffled.split(self.config.batch)]
        fit = fit_lightning(
            _step(self.config, network),
            batches,
            run,
            max_epochs=epochs,
            validation=[tuple(map(torch.from_numpy, pair)) for pair in held],
            monitor="val_pearson" if held else None,
            mode="max",
            patience=self.config.patience,
            name=name,
        )
        return network, fit

    def _build(self, level: torch.Tensor | None = None) -> nn.Module:
        from torch import nn

        layers: list[nn.Module] = []
        width = self.n_features
        for hidden in self.config.hidden:
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(self.config.dropout)]
            width = hidden
        last = nn.Linear(width, len(self.genes))
        nn.init.zeros_(last.weight)
        if level is not None:
            last.bias.data = level.clone()
        return nn.Sequential(*layers, last)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the network's output."""
        import torch

        self._check_section(section)
        device = resolve_device()
        network = self._network.to(device)
        try:
            for rows in row_blocks(section.n_obs, block_rows):
                x = torch.from_numpy(self._scaler(read_features(section, rows))).to(device)
                with torch.inference_mode():
                    mean = network(x).float().cpu().numpy()
                yield Prediction(np.asarray(section.ids)[rows], self.genes, self.unit, mean)
        finally:
            self._network.cpu()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights, scaling and number of epochs."""
        weights = {f"network.{name}": value.numpy() for name, value in self._network.state_dict().items()}
        return {**weights, **self._scaler.state()}, {"epochs": self.epochs}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        import torch

        self._scaler = Scaler.from_state(arrays)
        self.epochs = int(values["epochs"])
        self._network = self._build()
        weights = {
            name.removeprefix("network."): array for name, array in arrays.items() if name.startswith("network.")
        }
        self._network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
        self._network.eval()


def _step(config: MLPConfig, network: nn.Module) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training the mlp")
    import torch
    from torch.nn import functional

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return functional.mse_loss(self.network(x), y)

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, float]:
            x, y = batch
            predicted = self.network(x).float()
            r = gene_correlation(y.cpu().numpy(), predicted.cpu().numpy())
            score = float(np.nanmean(r)) if np.isfinite(r).any() else float("nan")
            return {"loss": float(functional.mse_loss(predicted, y)), "pearson": score}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    return Step()
