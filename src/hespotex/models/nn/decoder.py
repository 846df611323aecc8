"""The image stream of HESpotEx: latent head, neighbour layers read by an LSTM, gene head, nuclei factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import MessagePassing

__all__ = ["Head", "ImageStream", "LSTMReader", "LayerOrder", "NeighbourLayer", "NeighbourMean"]

LayerOrder = Literal["parallel", "chained"]


class Head(nn.Module):
    """Linear → ReLU → LayerNorm → Linear, optionally with dropout before the last."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_hidden)
        self.norm = nn.LayerNorm(n_hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(n_hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) → (n, n_out)."""
        return self.fc2(self.dropout(self.norm(F.relu(self.fc1(x)))))


class NeighbourMean(MessagePassing):
    """Product of the sparse operator of :func:`~hespotex.models.nn.graphs.neighbour_mean` with node embeddings."""

    def __init__(self) -> None:
        super().__init__(aggr="sum", node_dim=0)

    def forward(self, embedding: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        """Neighbour term m of each node, (n, d); `edges` (2, E) and `weights` (E,) are the operator's entries."""
        return self.propagate(edges, embedding=embedding, weights=weights)

    def message(self, embedding_j: Tensor, weights: Tensor) -> Tensor:
        """What one neighbour sends."""
        return weights[:, None] * embedding_j


class NeighbourLayer(nn.Module):
    """[embedding, neighbour mean] → linear without bias → ReLU → rows of unit length (GraphSAGE-mean)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2 * width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: Tensor, mean: Tensor) -> Tensor:
        """(n, width) twice → (n, width)."""
        return F.normalize(F.relu(F.linear(torch.cat([embedding, mean], dim=1), self.weight)), dim=1)


class LSTMReader(nn.Module):
    """LSTM over the stacked outputs of the neighbour layers, averaged over its steps.

    Parameters
    ----------
    width
        Width of the layers' outputs.
    n_out
        Width of the result.
    hidden
        Hidden size; ``None`` as published: `n_out`, so that every entry of the result lies in (−1, 1), at a
        cost in parameters that grows with its square. Otherwise a linear map leads from `hidden` to `n_out`.
    """

    def __init__(self, width: int, n_out: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden or n_out, num_layers=2)
        self.out = nn.Identity() if hidden is None else nn.Linear(hidden, n_out)

    def forward(self, steps: Tensor) -> Tensor:
        """(steps, n, width) → (n, n_out)."""
        return self.out(self.lstm(steps)[0].mean(dim=0))


class ImageStream(nn.Module):
    """Image features and a neighbour operator in, expression out.

    Parameters
    ----------
    n_features, n_out
        Widths of the image features and of the prediction.
    width
        Width of the patch embedding.
    head_width
        Hidden width of latent and gene head.
    jk_hidden
        Hidden size of the LSTM; ``None``: `n_out`.
    n_layers, order
        Number of neighbour layers, and whether all read the patch embedding (``"parallel"``, as published code)
        or each reads the one before (``"chained"``, as the published figure).
    dropout
        Dropout in both heads, 0 as published.
    """

    def __init__(
        self,
        n_features: int,
        n_out: int,
        *,
        width: int = 64,
        head_width: int = 1024,
        jk_hidden: int | None = None,
        n_layers: int = 4,
        order: LayerOrder = "parallel",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.order: LayerOrder = order
        self.latent_head = Head(n_features, head_width, width, dropout=dropout)
        self.mean = NeighbourMean()
        self.layers = nn.ModuleList(NeighbourLayer(width) for _ in range(n_layers))
        self.reader = LSTMReader(width, n_out, hidden=jk_hidden)
        self.gene_head = Head(width, head_width, n_out, dropout=dropout)

    def forward(
        self,
        features: Tensor,
        edges: Tensor,
        weights: Tensor,
        factor: Tensor | None = None,
        *,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Patch embedding (n, width) and prediction (n, n_out) of all nodes of a section.

        Parameters
        ----------
        features
            Image features, (n, n_features).
        edges, weights
            Entries of the neighbour operator, (2, E) and (E,).
        factor
            Nuclei factor of each node, (n, 1); ``None``: none (the published "ST1K" variant).
        chunk
            Nodes decoded at a time; the numbers are the same, the memory of the wide layers is bounded.
        """
        embedding = self.embed(features, chunk=chunk)
        steps = self.neighbourhood(embedding, edges, weights)
        if chunk is None or chunk >= len(embedding):
            return embedding, self.decode(embedding, steps, factor)
        parts = []
        for start in range(0, len(embedding), chunk):
            rows = slice(start, start + chunk)
            part = (embedding[rows], steps[:, rows], None if factor is None else factor[rows])
            parts.append(_recomputed(self.decode, *part))
        return embedding, torch.cat(parts)

    def embed(self, features: Tensor, *, chunk: int | None = None) -> Tensor:
        """Patch embedding e, (n, width)."""
        if chunk is None:
            return self.latent_head(features)
        return torch.cat([_recomputed(self.latent_head, part) for part in features.split(chunk)])

    def neighbourhood(self, embedding: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        """Outputs of the neighbour layers, (layers, n, width): all that a node's prediction takes from its graph."""
        outputs: list[Tensor] = []
        source, mean = embedding, self.mean(embedding, edges, weights)
        for layer in self.layers:
            if self.order == "chained" and outputs:
                source = outputs[-1]
                mean = self.mean(source, edges, weights)
            outputs.append(layer(source, mean))
        return torch.stack(outputs)

    def decode(self, embedding: Tensor, steps: Tensor, factor: Tensor | None = None) -> Tensor:
        """Prediction of some nodes from their embedding and their layer outputs, (m, n_out)."""
        expression = self.reader(steps) + self.gene_head(embedding)
        return expression if factor is None else factor * expression


def _recomputed(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    """Call `function`; in training its intermediates are computed again in the backward pass and not kept."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
