"""Stage 2: training of the image stream, all members of an ensemble side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
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
    from .inputs import SectionInputs

__all__ = ["ImageItem", "ImageItems", "ImageSection", "fit_image_stream", "new_members"]

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


@dataclass(frozen=True, eq=False)
class ImageSection:
    """What the image stream is fitted on of one section.

    Attributes
    ----------
    inputs
        Reader of its inputs.
    windows
        Rows of the windows it is worked on in; one of all its observations where it is small enough.
    target
        What the networks shall predict, (n, width of the target space).
    spots
        Spot embeddings to align with, (n, D), or ``None``.
    """

    inputs: SectionInputs
    windows: Sequence[np.ndarray]
    target: np.ndarray
    spots: np.ndarray | None


class ImageItems(Sequence[ImageItem]):
    """Items of some sections; those of a section that has windows are read when asked for.

    Parameters
    ----------
    sections
        All sections.
    hops
        Neighbour layers that a prediction looks through one after another.
    counted
        Rows of each section that count; sections that are not named are left out. ``None``: all of all.
    whole
        Items of the sections without windows, by number of the section, where they were made already.
    """

    def __init__(
        self,
        sections: Sequence[ImageSection],
        *,
        hops: int,
        counted: Mapping[int, np.ndarray] | None = None,
        whole: Mapping[int, ImageItem] | None = None,
    ) -> None:
        self._sections, self._hops = sections, hops
        self.whole: dict[int, ImageItem] = dict(whole or {})
        self._steps: list[tuple[int, np.ndarray, np.ndarray | None]] = []  # section, window, what counts of it
        for index, section in enumerate(sections):
            rows = None if counted is None else counted.get(index, np.empty(0, dtype=np.int64))
            if rows is not None and len(rows) == len(section.target):
                rows = None
            for window in section.windows:
                own = None if rows is None else np.intersect1d(window, rows, assume_unique=True)
                if own is None or len(own):
                    self._steps.append((index, window, own))
            if len(section.windows) == 1 and index not in self.whole:
                self.whole[index] = _item(section, None, hops)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: Any) -> Any:
        index, window, counted = self._steps[number]
        if index in self.whole:
            item = self.whole[index]
            return item if counted is None else item._replace(rows=torch.from_numpy(counted))
        return _item(self._sections[index], window if counted is None else counted, self._hops)


def _item(section: ImageSection, rows: np.ndarray | None, hops: int) -> ImageItem:
    """Tensors of some observations and of those that these depend on; of all for ``None``."""
    inputs, every, local = section.inputs.window(rows, hops)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return ImageItem(
        features=tensor(inputs.features),
        edges=tensor(inputs.edges),
        weights=tensor(inputs.weights),
        factor=None if inputs.factor is None else tensor(inputs.factor),
        target=tensor(section.target if rows is None else section.target[every]),
        spots=None if section.spots is None else tensor(section.spots if rows is None else section.spots[every]),
        rows=None if rows is None else tensor(local),
    )


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
