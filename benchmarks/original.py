"""One training step of HESpotEx as originally published, re-coded from its description for timing only.

Kept as it was: dense N × N adjacency rebuilt in a Python double loop with a full sort per row, Pearson losses in
Python loops over every spot and every gene, LSTM with hidden size G. Not part of the package.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def dense_adjacency(xy: np.ndarray, k: int = 4) -> np.ndarray:
    """N × N float32 of 0/1, row i listing the k nearest spots of i."""
    n = len(xy)
    adjacency = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        distance = np.sqrt(((xy - xy[i]) ** 2).sum(axis=1))
        order = distance.argsort()
        for j in range(1, k + 1):
            adjacency[i, order[j]] = 1.0
    return adjacency


def looped_pearson(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """1 - mean Pearson over rows, one row at a time."""
    values = torch.zeros(target.shape[0])
    for i in range(target.shape[0]):
        a, b = target[i], predicted[i]
        a_centred, b_centred = a - a.mean(), b - b.mean()
        values[i] = (a_centred * b_centred).mean() / (a.std(unbiased=False) * b.std(unbiased=False))
    return 1 - torch.nan_to_num(values).mean()


class NeighbourLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * width, width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, e: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        adjacency = adjacency - torch.eye(len(e))
        mean = adjacency @ e / adjacency.sum(dim=1, keepdim=True)
        out = torch.relu(torch.cat([e, mean], dim=1) @ self.weight)
        return nn.functional.normalize(out, dim=1)


class OriginalNet(nn.Module):
    def __init__(self, n_features: int, n_genes: int, width: int = 64) -> None:
        super().__init__()

        def head(n_in: int, n_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(n_in, 1024), nn.ReLU(), nn.LayerNorm(1024), nn.Linear(1024, n_out))

        self.latent, self.gene = head(n_features, width), head(width, n_genes)
        self.neighbours = nn.ModuleList(NeighbourLayer(width) for _ in range(4))
        self.reader = nn.LSTM(width, n_genes, num_layers=2)

    def forward(
        self, u: torch.Tensor, adjacency: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        e = self.latent(u)
        stacked = torch.stack([layer(e, adjacency) for layer in self.neighbours])
        return e, factor * (self.reader(stacked)[0].mean(dim=0) + self.gene(e))


class OriginalEpoch:
    """One epoch over one slide: adjacency, forward, losses, backward, AdamW step; the encoder is counted apart."""

    def __init__(self, features: np.ndarray, xy: np.ndarray, target: np.ndarray, latent: np.ndarray) -> None:
        torch.manual_seed(0)
        self.u, self.xy = torch.from_numpy(features), xy
        self.target, self.latent = torch.from_numpy(target), torch.from_numpy(latent)
        self.factor = torch.full((len(xy), 1), 1.5)
        self.net = OriginalNet(features.shape[1], target.shape[1], latent.shape[1])
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=1e-3)

    def step(self) -> float:
        adjacency = torch.from_numpy(dense_adjacency(self.xy))
        e, predicted = self.net(self.u, adjacency, self.factor)
        loss = looped_pearson(self.latent, e) + ((predicted - self.target) ** 2).mean()
        looped_pearson(self.target.T, predicted.T)  # computed and thrown away, as published
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())
