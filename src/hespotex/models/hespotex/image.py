"""Stage 2: training of the image stream, all members of an ensemble side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._optional import optional_import
from .._training import Fit, fit_lightning
from ..nn.decoder import ImageStream
from ..nn.losses import alignment_loss

if TYPE_CHECKING:
    from .._base import Run
    from .config import HESpotExConfig

__all__ = ["ImageItem", "fit_image_stream", "new_members"]

NAME = "image stream"


class ImageItem(NamedTuple):
    """Tensors of one section, which one optimiser step sees.

    Attributes
    ----------
    features, edges, weights, factor
        As in :class:`~hespotex.models.hespotex.inputs.ImageInputs`.
    target
        What the networks shall predict, (n, width of the target space).
    spots
        Spot embeddings to align with, (n, D), or ``None``.
    rows
        Observations that count in the loss, or ``None`` for all.
    """

    features: Tensor
    edges: Tensor
    weights: Tensor
    factor: Tensor | None
    target: Tensor
    spots: Tensor | None
    rows: Tensor | None = None


def new_members(config: HESpotExConfig, n_features: int, n_out: int) -> nn.ModuleList:
    """Untrained members of the ensemble, from the present random state."""
    return nn.ModuleList(
        ImageStream(
            n_features,
            n_out,
            width=config.width,
            head_width=config.head_width,
            jk_hidden=config.jk_hidden,
            n_layers=config.n_layers,
            order=config.layer_order,
            dropout=config.dropout,
        )
        for _ in range(config.n_members)
    )


def fit_image_stream(
    config: HESpotExConfig,
    members: nn.ModuleList,
    items: Sequence[ImageItem],
    run: Run,
    *,
    epochs: int,
    validation: Sequence[ImageItem] = (),
    name: str = NAME,
) -> Fit:
    """Fit `members` in place; the history has the columns ``loss``, ``mse``, ``align`` and with validation ``val_mse``."""
    return fit_lightning(_stage(config, members), items, run, max_epochs=epochs, validation=validation, name=name)


def _stage(config: HESpotExConfig, members: nn.ModuleList) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training neural models")

    class ImageStage(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.members = members
            self.align_weight = config.align_weight

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=config.weight_decay)

        def training_step(self, item: ImageItem, batch_idx: int) -> Any:
            mse = align = torch.zeros((), device=item.features.device)
            for member in self.members:
                embedding, predicted = _forward(member, item, config.chunk)
                mse = mse + F.mse_loss(_counted(predicted, item), _counted(item.target, item))
                if item.spots is not None:
                    align = align + alignment_loss(_counted(item.spots, item), _counted(embedding, item))
            mse, align = mse / len(self.members), align / len(self.members)  # Adam does not mind the scale
            return {"loss": mse + self.align_weight * align, "mse": mse, "align": align}

        def validation_step(self, item: ImageItem, batch_idx: int) -> Any:
            mean = torch.stack([_forward(member, item, config.chunk)[1] for member in self.members]).mean(dim=0)
            error = _counted(mean, item) - _counted(item.target, item)
            # A section's own level is beyond the image's reach and says nothing about the pattern within.
            return {"mse": (error - error.mean(dim=0)).square().mean()}

    return ImageStage()


def _forward(member: nn.Module, item: ImageItem, chunk: int) -> tuple[Tensor, Tensor]:
    return member(item.features, item.edges, item.weights, item.factor, chunk=chunk)


def _counted(values: Tensor, item: ImageItem) -> Tensor:
    return values if item.rows is None else values[item.rows]
