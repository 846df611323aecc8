"""Stage 1: spot embeddings of the training sections from the graph attention autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..._optional import optional_import
from .._training import Fit, fit_lightning
from ..nn.gate import GATE, gate_optimizer
from ..nn.graphs import edge_index
from .windows import cut, reached

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor

    from .._base import Run
    from .config import HESpotExConfig

__all__ = ["SpotSection", "spot_embeddings"]

NAME = "expression stream"

_HOPS = 2  # the reconstruction of a spot reads embeddings of its neighbours, and these read theirs


class SpotSection(NamedTuple):
    """What the expression stream sees of one section.

    Attributes
    ----------
    expression
        (n, G).
    edges
        (2, E), self loops included, sorted by target.
    windows
        Rows of the windows that a larger section is worked on in.
    """

    expression: Tensor
    edges: Tensor
    windows: Sequence[np.ndarray] = ()


def spot_embeddings(
    config: HESpotExConfig, sections: Sequence[SpotSection | tuple[Tensor, Tensor]], run: Run, *, gate: GATE
) -> tuple[list[Tensor], Fit]:
    """Fit `gate` and embed every section.

    Parameters
    ----------
    config
        Order of the sections and settings of the optimiser.
    sections
        Expression and edges of each.
    run
        Seed, device and so on.
    gate
        Autoencoder with its initial weights; fitted in place.

    Returns
    -------
    Embedding (n, width) of each section, and the history of the fit. In sequential order, which takes sections whole,
    an embedding is the one under the weights at the end of the section's own turn, so that no two of them share a space.
    """
    sequential = config.gate_order == "sequential"
    all_spots = [SpotSection(*section) for section in sections]
    module = _stage(config, gate, [len(section.expression) for section in all_spots] if sequential else [])
    fit = fit_lightning(
        module,
        _Items(all_spots, in_windows=not sequential),
        run,
        max_epochs=config.gate_epochs * (len(sections) if sequential else 1),
        gradient_clip=config.gate_clip,
        visit=(lambda epoch: [epoch // config.gate_epochs]) if sequential else None,
        name=NAME,
    )
    if sequential:
        return [module.get_buffer(f"embedding_{index}") for index in range(len(sections))], fit
    with torch.no_grad():
        return [_embedded(gate, section) for section in all_spots], fit


class _Items(Sequence[Any]):
    """Number, expression, edges and counted rows of what one step sees: a section, or a window of it, cut when asked for."""

    def __init__(self, sections: Sequence[SpotSection], *, in_windows: bool) -> None:
        self._sections = sections
        self._graphs: dict[int, sparse.csr_array] = {}
        self._steps: list[tuple[int, np.ndarray | None]] = []
        for index, section in enumerate(sections):
            if in_windows and len(section.windows) > 1:
                self._graphs[index] = _graph(section)
                self._steps += [(index, rows) for rows in section.windows]
            else:
                self._steps.append((index, None))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: Any) -> Any:
        index, rows = self._steps[number]
        section = self._sections[index]
        if rows is None:
            return torch.tensor(index), section.expression, section.edges, None
        every, edges = _window(self._graphs[index], rows, _HOPS)
        counted = torch.from_numpy(np.searchsorted(every, rows))
        return torch.tensor(index), section.expression[torch.from_numpy(every)], edges, counted


def _embedded(gate: GATE, section: SpotSection) -> Tensor:
    """Embedding of a section under the final weights."""
    if len(section.windows) < 2:
        return gate.encode(section.expression, section.edges)
    graph = _graph(section)
    embedding = torch.empty(len(section.expression), gate.w2.shape[1], dtype=gate.w2.dtype)
    for rows in section.windows:
        every, edges = _window(graph, rows, 1)
        found = gate.encode(section.expression[torch.from_numpy(every)], edges)
        embedding[torch.from_numpy(rows)] = found[torch.from_numpy(np.searchsorted(every, rows))]
    return embedding


def _graph(section: SpotSection) -> sparse.csr_array:
    """The section's edges, row i listing what i receives from."""
    from scipy import sparse

    source, target = section.edges.numpy()
    n = len(section.expression)
    start = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=n))])
    return sparse.csr_array((np.ones(len(source), dtype=np.float32), source, start), shape=(n, n))


def _window(graph: sparse.csr_array, rows: np.ndarray, hops: int) -> tuple[np.ndarray, Tensor]:
    every = reached(graph, rows, hops)
    return every, torch.from_numpy(edge_index(cut(graph, every)))


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
            _, expression, edges, counted = batch
            found = self.gate(expression, edges)[1]
            if counted is not None:
                found, expression = found[counted], expression[counted]
            return torch.nn.functional.mse_loss(found, expression)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if sizes and (self.current_epoch + 1) % self.epochs == 0:
                index, expression, edges, _ = batch
                with torch.no_grad():
                    self.get_buffer(f"embedding_{int(index)}").copy_(self.gate.encode(expression, edges))

    return ExpressionStage()
