"""The expression stream of HESpotEx: a graph attention autoencoder with tied weights (the STAGATE design)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

__all__ = ["GATE", "NeighbourhoodAttention", "Tying", "gate_optimizer"]

Tying = Literal["shared", "legacy"]

_GAIN = 1.414  # of the Xavier initialisation, as published
_MESSAGES = 2**24  # numbers sent along all edges at a time: 64 MiB


class NeighbourhoodAttention(MessagePassing):
    """Weighted sum over each node's incoming neighbours."""

    def __init__(self) -> None:
        super().__init__(aggr="sum", node_dim=0)

    @staticmethod
    def weights(source_score: Tensor, target_score: Tensor, edges: Tensor) -> Tensor:
        """Attention per edge, (E,): softmax over a node's incoming edges of the *sigmoid* of the summed scores.

        The sigmoid bounds the ratio of two weights of one neighbourhood by e.
        """
        source, target = edges
        logits = torch.sigmoid(source_score[source] + target_score[target])
        return softmax(logits, target, num_nodes=len(target_score))

    def forward(self, values: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights_ij · values_j, (n, d)."""
        columns = max(1, _MESSAGES // max(edges.shape[1], 1))
        if columns >= values.shape[1]:
            return self._aggregate(edges, values, weights)
        blocks = values.split(columns, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([self._aggregate(edges, block, weights) for block in blocks], dim=1)
        # Recomputing a block's messages in the backward pass keeps memory at nodes × columns, not edges × columns.
        summed = [
            checkpoint(self._aggregate, edges, block, weights, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
        return torch.cat(summed, dim=1)

    def _aggregate(self, edges: Tensor, block: Tensor, weights: Tensor) -> Tensor:
        return self.propagate(edges, values=block, weights=weights)

    def message(self, values_j: Tensor, weights: Tensor) -> Tensor:
        """What one neighbour sends."""
        return weights[:, None] * values_j


class GATE(nn.Module):
    """Graph attention autoencoder G → hidden → embedding → hidden → G.

    One head, no bias, no dropout. Attention and ELU act in the first layer of the encoder and the first of
    the decoder, with one set of scores for both; the other two layers are linear; the decoder's weights are
    the encoder's, transposed.

    Parameters
    ----------
    n_genes, hidden, embedding
        Widths.
    tying
        ``"shared"``: one parameter used twice, its gradients summed. ``"legacy"``: as published, the decoder's
        tensors are parameters of their own that lie in the encoder's memory, so that an optimiser updates that
        memory twice per step, with two sets of moments, and a gradient clip counts both uses.

    Attributes
    ----------
    w1, w2
        Encoder weights, (G, hidden) and (hidden, embedding).
    a_source, a_target
        Attention vectors, (hidden,).
    """

    def __init__(self, n_genes: int, *, hidden: int = 512, embedding: int = 64, tying: Tying = "shared") -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_genes, hidden))
        self.a_source = nn.Parameter(torch.empty(hidden))
        self.a_target = nn.Parameter(torch.empty(hidden))
        self.w2 = nn.Parameter(torch.empty(hidden, embedding))
        for weight in (self.w1, self.w2):
            nn.init.xavier_normal_(weight, gain=_GAIN)
        for vector in (self.a_source, self.a_target):
            nn.init.xavier_normal_(vector[None], gain=_GAIN)
        self.attend = NeighbourhoodAttention()
        self.tying: Tying = tying
        if tying == "legacy":
            self.w2_decoder = nn.Parameter(self.w2.detach().t())
            self.w1_decoder = nn.Parameter(self.w1.detach().t())

    def forward(self, expression: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (n, embedding) and reconstruction (n, G) of `expression` (n, G).

        `edges` is (2, E), row 0 sources and row 1 targets, self loops included.
        """
        hidden, weights = self.encode_hidden(expression, edges)
        embedding = hidden @ self.w2
        w2_t, w1_t = self._decoder_weights()
        return embedding, F.elu(self.attend(embedding @ w2_t, edges, weights)) @ w1_t

    def encode_hidden(self, expression: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the attention layer (n, hidden) and the attention of each edge (E,)."""
        projected = expression @ self.w1
        weights = self.attend.weights(projected @ self.a_source, projected @ self.a_target, edges)
        return F.elu(self.attend(projected, edges, weights)), weights

    def encode(self, expression: Tensor, edges: Tensor) -> Tensor:
        """Embedding (n, embedding)."""
        return self.encode_hidden(expression, edges)[0] @ self.w2

    def _decoder_weights(self) -> tuple[Tensor, Tensor]:
        if self.tying == "shared":
            return self.w2.t(), self.w1.t()
        # Moving the module to a device separates the two memories, so they are joined again before each use.
        self.w2_decoder.data = self.w2.data.t()
        self.w1_decoder.data = self.w1.data.t()
        return self.w2_decoder, self.w1_decoder


def gate_optimizer(gate: GATE, *, lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam with L2 over the parameters in the published order: W1, attention, W2, then the decoder's uses."""
    # One tensor after another: under legacy tying the second update of a memory must see the first.
    return torch.optim.Adam(gate.parameters(), lr=lr, weight_decay=weight_decay, foreach=False)
