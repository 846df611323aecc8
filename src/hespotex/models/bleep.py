"""BLEEP: image and expression are drawn together in one space, and the nearest training spots answer a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from .._device import resolve_device
from .._logging import logger
from .._optional import optional_import
from ..data.section import Prediction, Section
from ..data.units import check_unit
from ..errors import DataValueError
from ._base import Model, ModelInfo, Run
from ._config import check_choices
from ._inner import gene_correlation, inner_folds, of_shape, row_blocks
from ._registry import register
from ._rows import RowBatches, mark_of
from ._standardize import Standardize, Standardizer
from ._training import Fit, fit_lightning, forget_checkpoints

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["BLEEP", "BLEEPConfig"]

Answer = Literal["average", "simple", "weighted"]
Stopping = Literal["fixed", "random", "inner"]

_CHOICE, _FINAL = "bleep-choice", "bleep-final"
_READ_ROWS = 4096
_QUERY_ROWS, _BANK_ROWS = 1024, 16_384
_HELD_OUT = 0.2  # of the spots, as published, where they are held out at random


@dataclass(frozen=True)
class BLEEPConfig:
    """Settings of :class:`BLEEP`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of the targets that :func:`hespotex.tl.train` uses for this model.
    gene_selection
        Keyword arguments of :func:`hespotex.pp.select_genes` that it chooses the genes with.
    standardize
        Embeddings as they come (``"none"``); or in units of their spread in training, about their mean over all
        training spots (``"global"``) or over their own section (``"section"``, against stain shift).
    scale_genes
        Give the expression head each gene in units of its spread in training, about its mean.
    width, dropout
        Of both projection heads.
    temperature
        Divides similarities in loss and targets.
    lr, weight_decay, batch
        Of AdamW.
    max_epochs
        Most epochs; also their number where there is too little to choose by.
    stopping
        ``"inner"``: as many epochs as serve best, by the mean Pearson r per gene within a left-out training group, then
        anew on all; ``"random"``: the epoch with the least loss on a random fifth of the spots, as published;
        ``"fixed"``: all.
    retrieved
        Number of training spots that answer a query.
    answer
        Their mean (``"average"``), the nearest alone (``"simple"``), or weights exp(−(d² − d²min + 1))
        (``"weighted"``).
    """

    at_prediction: ClassVar[tuple[str, ...]] = ("retrieved", "answer")

    unit: str = "log1p_cp10k"
    gene_selection: Mapping[str, Any] = field(default_factory=dict)
    standardize: Standardize = "section"
    scale_genes: bool = True
    width: int = 256
    dropout: float = 0.1
    temperature: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 1e-3
    batch: int = 256
    max_epochs: int = 60
    stopping: Stopping = "inner"
    retrieved: int = 50
    answer: Answer = "average"

    def __post_init__(self) -> None:
        check_unit(self.unit)
        check_choices(self, {"answer": Answer, "stopping": Stopping, "standardize": Standardize})
        for name in ("width", "batch", "max_epochs", "retrieved"):
            if getattr(self, name) < 1:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("temperature", "lr"):
            if not getattr(self, name) > 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must be positive")
        if not 0 <= self.dropout < 1:
            raise DataValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if self.weight_decay < 0:
            raise DataValueError(f"weight_decay={self.weight_decay!r} must not be negative")


# As published, as far as it applies to frozen embeddings; expression is not aligned with that of the test section.
_PAPER = BLEEPConfig(
    gene_selection={"method": "hvg", "n_top": 1000, "min_spots_fraction": 0.0},
    standardize="none",
    scale_genes=False,
    max_epochs=4,
    stopping="random",
)


@register
class BLEEP(Model[BLEEPConfig]):
    """Retrieval of training spots in a joint space of image and expression, after BLEEP (NeurIPS 2023).

    Two projection heads, one for image embeddings and one for expression, learn by a contrastive loss with soft targets
    that a spot's image and its expression lie together, and near those of similar spots. A query's image is projected,
    and answered by the measured expression of the training spots whose expression lies nearest. The fitted model
    carries the expression of all training spots.

    A re-implementation from a written account, on frozen embeddings in place of a trained image network. Nothing of the
    section to be predicted enters the fit.

    Notes
    -----
    The search is exact. Predictions never leave the range of the training spots' expression.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> features = rng.normal(size=(40, 6))
    >>> targets = Targets(rng.poisson(3, size=(40, 5)), np.full(40, 100.0), tuple("ABCDE"))
    >>> section = Section("s", np.arange(40).astype(str), features, features[:, :2], targets=targets)
    >>> model = models.create("bleep", width=8, max_epochs=2, retrieved=5).fit([section])
    >>> model.predict(section).mean.shape
    (40, 5)
    """

    Config: ClassVar[type] = BLEEPConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="bleep",
        summary="Contrastive projection of embedding and expression; mean of the nearest training spots",
        distributed=True,
        in_memory=2,
        cost="seconds; grows with spots, and in prediction with spots × training spots",
        presets=("default", "paper"),
        paper="10.48550/arXiv.2306.01859",
    )

    epochs: int

    @classmethod
    def preset(cls, name: str) -> BLEEPConfig:
        """``"default"``, or ``"paper"``: the published settings."""
        presets = {"default": BLEEPConfig(), "paper": _PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'bleep'; it has 'default', 'paper'")
        return presets[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose the number of epochs, train both heads, and project the expression of all training spots."""
        config = self.config
        self._embedding = Standardizer.fit(sections, config.standardize)
        features = self._embedding.read_all(sections)
        self._bank = np.concatenate([section.require_targets()[:] for section in sections])
        if not np.isfinite(self._bank).all():
            raise DataValueError("the measured expression holds values that are NaN or infinite; leave those genes out")
        self._gene_mean, self._gene_inverse = _gene_scale(self._bank, scale=config.scale_genes)
        everything = np.arange(len(features))
        self.epochs = config.max_epochs
        fits: list[Fit] = []
        if config.stopping == "random" and len(everything) >= 5:
            order = np.random.default_rng([run.seed, 1]).permutation(everything)
            n_held = max(1, round(_HELD_OUT * len(order)))
            kept, held = np.sort(order[n_held:]), np.sort(order[:n_held])
            self._heads, fit = self._train(features, kept, run, self.epochs, _FINAL, held=[held], monitor="val_loss")
            self.epochs, self.history = fit.best_epoch, fit.history
            self._project_bank()
            forget_checkpoints(fit)
            return
        if config.stopping == "inner" and (folds := inner_folds(sections)[1]):
            starts = np.cumsum([0] + [section.n_obs for section in sections])
            groups = [starts[index] + rows for index, rows in folds[0].held_out.items()]
            kept = np.setdiff1d(everything, np.concatenate(groups))
            fit = self._train(
                features, kept, run, self.epochs, _CHOICE, held=groups, monitor="val_pearson", mode="max"
            )[1]
            fits.append(fit)
            self.history, self.epochs = fit.history, fit.best_epoch or self.epochs
            if np.isfinite(fit.best_score):
                self.scores = {"inner_pearson": fit.best_score}
            logger.info("bleep: %d epochs, r %.3f on the held-out part", self.epochs, fit.best_score)
        self._heads, final = self._train(features, everything, run, self.epochs, _FINAL)
        self.history = self.history or final.history
        self._project_bank()
        forget_checkpoints(*fits, final)

    def _train(
        self,
        features: np.ndarray,
        kept: np.ndarray,
        run: Run,
        epochs: int,
        name: str,
        *,
        held: Sequence[np.ndarray] = (),
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> tuple[nn.ModuleDict, Fit]:
        """Heads trained on the rows `kept`, judged on each of `held`."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            heads = self._build()
        batches = RowBatches(kept, self.config.batch, epochs, run.seed)
        fit = fit_lightning(
            _step(self, heads, features, kept),
            batches,
            run,
            max_epochs=epochs,
            validation=[torch.from_numpy(rows) for rows in held],
            monitor=monitor,
            mode=mode,
            visit=batches.visit,
            name=name,
        )
        return heads, fit

    def _build(self) -> nn.ModuleDict:
        from torch import nn

        config = self.config
        return nn.ModuleDict(
            {
                "image": _head(self.n_features, config.width, config.dropout),
                "expression": _head(len(self.genes), config.width, config.dropout),
            }
        )

    def _scaled(self, expression: Tensor) -> Tensor:
        """Expression as its head takes it."""
        import torch

        mean, inverse = (torch.from_numpy(each).to(expression.device) for each in (self._gene_mean, self._gene_inverse))
        return (expression - mean) * inverse

    def _project_bank(self) -> None:
        """Project the expression of all training spots, in blocks."""
        import torch

        self._heads.requires_grad_(False).eval()
        with torch.inference_mode():
            blocks = [
                self._heads["expression"](self._scaled(torch.from_numpy(self._bank[rows]))).numpy()
                for rows in row_blocks(len(self._bank), _READ_ROWS)
            ]
        self._keys = np.concatenate(blocks)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield what the retrieved training spots answer."""
        import torch

        self._check_section(section)
        self._embedding.warn_if_few(section)
        device, centre = resolve_device(), self._embedding.centre(section)
        keys = torch.from_numpy(self._keys).to(device)
        self._heads.to(device)
        try:
            for block in row_blocks(section.n_obs, block_rows):
                answers = []
                for part in row_blocks(block.stop - block.start, _QUERY_ROWS):
                    rows = slice(block.start + part.start, block.start + part.stop)
                    image = torch.from_numpy(self._embedding.read(section, centre, rows)).to(device)
                    with torch.inference_mode():
                        answers.append(self._answer(self._heads["image"](image), keys, self._bank))
                yield Prediction(np.asarray(section.ids)[block], self.genes, self.unit, np.concatenate(answers))
        finally:
            self._heads.cpu()

    def _answer(self, query: Tensor, keys: Tensor, bank: np.ndarray) -> np.ndarray:
        """Weighted mean of the rows of `bank` whose keys lie nearest to each query, (n, G) float32."""
        found, weights = retrieve(query, keys, self.config.retrieved, self.config.answer)
        return _weighted_mean(bank, found.cpu().numpy(), weights.cpu().numpy())

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Heads, scales, and the expression of the training spots with its projection."""
        weights = {f"heads.{name}": value.numpy() for name, value in self._heads.state_dict().items()}
        arrays = {
            "expression": self._bank,
            "keys": self._keys,
            "gene_mean": self._gene_mean,
            "gene_inverse": self._gene_inverse,
        }
        return {**weights, **arrays, **self._embedding.state()}, {"epochs": self.epochs}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        import torch

        self._embedding = Standardizer.from_state(arrays, self.config.standardize)
        self._bank = of_shape(arrays["expression"], (None, len(self.genes)), "expression")
        self._keys = of_shape(arrays["keys"], (len(self._bank), self.config.width), "keys")
        self._gene_mean = of_shape(arrays["gene_mean"], (len(self.genes),), "gene_mean")
        self._gene_inverse = of_shape(arrays["gene_inverse"], (len(self.genes),), "gene_inverse")
        self.epochs = int(values["epochs"])
        self._heads = self._build()
        weights = {name.removeprefix("heads."): array for name, array in arrays.items() if name.startswith("heads.")}
        self._heads.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        self._heads.requires_grad_(False).eval()


def contrastive_loss(image: Tensor, expression: Tensor, temperature: float) -> Tensor:
    """Symmetric cross-entropy of similarities with soft targets, for projections (n, width) of the same spots.

    Targets are the softmax of the mean similarity within image and within expression: spots that are alike count as
    partners.
    """
    import torch
    from torch.nn import functional

    logits = expression @ image.T / temperature
    alike = (image @ image.T + expression @ expression.T) / 2
    targets = torch.softmax(alike / temperature, dim=1)
    forward = functional.cross_entropy(logits, targets)
    return (forward + functional.cross_entropy(logits.T, targets.T)) / 2


def retrieve(query: Tensor, keys: Tensor, k: int, answer: Answer) -> tuple[Tensor, Tensor]:
    """Nearest keys of each query by cosine, and their weights, (n, k) each; exact, over blocks of keys.

    With fewer than `k` keys all of them are taken. Of equal keys the first is preferred.
    """
    import torch
    from torch.nn import functional

    k = 1 if answer == "simple" else min(k, len(keys))
    unit = functional.normalize(query.float(), dim=1)
    best = torch.full((len(query), 0), -1.0, device=query.device)
    found = torch.zeros((len(query), 0), dtype=torch.int64, device=query.device)
    for rows in row_blocks(len(keys), _BANK_ROWS):
        similarity = unit @ functional.normalize(keys[rows].float(), dim=1).T
        order = torch.sort(similarity, dim=1, descending=True, stable=True)[1][:, :k]
        best = torch.cat([best, similarity.gather(1, order)], dim=1)
        found = torch.cat([found, order + rows.start], dim=1)
        top = torch.sort(best, dim=1, descending=True, stable=True)[1][:, :k]
        best, found = best.gather(1, top), found.gather(1, top)
    if answer != "weighted":
        return found, torch.full_like(best, 1 / k)
    squared = ((query[:, None].float() - keys[found].float()) ** 2).sum(dim=2)
    weights = torch.exp(-(squared - squared.min(dim=1, keepdim=True).values + 1))
    return found, weights / weights.sum(dim=1, keepdim=True)


def _weighted_mean(bank: np.ndarray, found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of rows of `bank`, (n, G) float32."""
    from scipy import sparse

    n, k = found.shape
    picks = sparse.csr_array(
        (weights.ravel().astype(np.float32), found.ravel(), np.arange(0, n * k + 1, k)), shape=(n, len(bank))
    )
    return picks @ bank


def _gene_scale(expression: np.ndarray, *, scale: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centre and reciprocal spread of each gene; the reciprocal is 0 where a gene is constant."""
    if not scale:
        return np.zeros(expression.shape[1], np.float32), np.ones(expression.shape[1], np.float32)
    spread = expression.std(axis=0, dtype=np.float64)
    inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-6)
    return expression.mean(axis=0, dtype=np.float64).astype(np.float32), inverse.astype(np.float32)


def _head(n_inputs: int, width: int, dropout: float) -> nn.Module:
    """Projection head: linear, then GELU, linear and dropout as a residual, then normalisation."""
    from torch import nn

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(n_inputs, width)
            self.refine = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
            self.norm = nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            projected = self.project(x)
            return self.norm(projected + self.refine(projected))

    return Head()


def _step(model: BLEEP, heads: nn.ModuleDict, features: np.ndarray, kept: np.ndarray) -> Any:
    """Module for :func:`~hespotex.models._training.fit_lightning` over row numbers, trained on the rows `kept`."""
    lightning = optional_import("lightning.pytorch", feature="training bleep")
    import torch

    config, bank = model.config, model._bank[kept]

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads
            # Buffers, so that they move to the device at once; not kept in checkpoints, which are known by the mark.
            self.register_buffer("features", torch.from_numpy(features), persistent=False)
            self.register_buffer("expression", torch.from_numpy(model._bank), persistent=False)
            self.register_buffer("kept", torch.from_numpy(kept), persistent=False)
            self.mark = mark_of((self.features, self.expression, self.kept), config)
            self.judged_by = f"{config.retrieved}, {config.answer}"

        def loss(self, rows: torch.Tensor) -> torch.Tensor:
            image = self.heads["image"](self.features[rows])
            return contrastive_loss(image, self.keys(rows), config.temperature)

        def keys(self, rows: torch.Tensor) -> torch.Tensor:
            return self.heads["expression"](model._scaled(self.expression[rows]))

        def training_step(self, rows: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.loss(rows)

        def validation_step(self, rows: torch.Tensor, batch_idx: int) -> dict[str, float]:
            losses = [float(self.loss(piece)) for piece in rows.split(config.batch)]
            keys = torch.cat([self.keys(piece) for piece in self.kept.split(_READ_ROWS)])
            queries = (self.heads["image"](self.features[piece]) for piece in rows.split(_QUERY_ROWS))
            answers = np.concatenate([model._answer(query, keys, bank) for query in queries])
            r = gene_correlation(self.expression[rows].cpu().numpy(), answers)
            score = float(np.nanmean(r)) if np.isfinite(r).any() else float("nan")
            return {"loss": float(np.mean(losses)), "pearson": score}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    return Step()
