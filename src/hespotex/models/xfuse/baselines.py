"""Baselines of the genes, effects of the sections on them, and the fit that training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .likelihood import nb_log_prob, nb_mean
from .network import EPS

__all__ = ["Baselines", "Start", "cluster_profiles", "fit_start"]

_BATCH = 100
_LEAST_PASSES = 100
_START_SD = 1e-2


class Start(NamedTuple):
    """Where training starts: scale of a spot, log rates and logits of the genes, (G,) each."""

    scale: float
    log_rate: np.ndarray
    logits: np.ndarray


def fit_start(counts: Sequence[np.ndarray], *, background: bool, most_passes: int | None = None) -> Start:
    """Maximum likelihood of x_sg ~ NB(s · e^{u_g}, λ_g) over all spots.

    Parameters
    ----------
    counts
        Counts of each section, (n, G); NaN is left out.
    background
        Count the background of each section as one spot without counts, as published.
    most_passes
        Passes after which the fit ends in any case.

    Notes
    -----
    Adam at 0.01 on the summed likelihood of 100 spots at a time, in a fixed order, until the running error of a spot
    improves by less than 1e-4 in a pass, after 100 passes at least. Nothing is drawn at random.
    """
    genes = counts[0].shape[1]
    rows = [np.vstack([np.zeros((1, genes)), each]) if background else each for each in counts]
    x = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    known = torch.isfinite(x)
    x = torch.where(known, x, 0.0)
    scale, rate, logits = (torch.zeros(size, requires_grad=True) for size in (1, genes, genes))
    optimizer = torch.optim.Adam([scale, rate, logits], lr=0.01)
    error, previous, done = None, float("inf"), 0
    while len(x) and (most_passes is None or done < most_passes):
        for batch, mask in zip(x.split(_BATCH), known.split(_BATCH), strict=True):
            total = torch.exp(scale + rate)
            off = torch.where(mask, batch - nb_mean(total, logits).detach(), 0.0)
            rmse = float((off.square().sum(dim=1) / mask.sum(dim=1).clamp_min(1)).sqrt().mean())
            loss = -torch.where(mask, nb_log_prob(batch, total, logits), 0.0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = rmse if error is None else error + 0.01 * (rmse - error)
        done += 1
        if error is None or (done > _LEAST_PASSES and previous - error < 1e-4):
            break
        previous = error
    return Start(float(scale.detach().exp()), rate.detach().numpy(), logits.detach().numpy())


def cluster_profiles(counts: Sequence[np.ndarray], k: int, seed: int) -> np.ndarray:
    """Log ratios of the mean composition of `k` clusters of spots to that of all spots, (k, G) float32.

    Clusters are those of k-means on log1p of counts per 10,000. With fewer spots than clusters some are equal; a gene that a
    section did not measure is there as frequent as on average.

    Parameters
    ----------
    counts
        Counts of each section, (n, G); NaN is unknown.
    k
        Number of clusters.
    seed
        Of their start.
    """
    from sklearn.cluster import KMeans

    x = np.concatenate(counts).astype(np.float64)
    known = np.isfinite(x)
    x = np.where(known, x, 0.0)
    mean = x.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    share = mean / max(mean.sum(), 1e-12)
    x = np.where(known, x, (x.sum(axis=1) / np.maximum(known @ share, 1e-12))[:, None] * share)
    size = np.maximum(x.sum(axis=1, keepdims=True), 1e-12)
    expression = np.log1p(1e4 * x / size)
    n_clusters = min(k, len(np.unique(expression.round(6), axis=0)))
    means = KMeans(n_clusters, n_init=4, random_state=seed).fit(expression)
    pooled = np.stack([x[means.labels_ == label].sum(axis=0) for label in range(n_clusters)])
    # A count per gene and cluster, spread as on average, keeps rare genes from telling clusters apart.
    prior = share * len(share)
    composition = (pooled + prior) / (pooled + prior).sum(axis=1, keepdims=True)
    overall = (x.sum(axis=0) + prior) / (x.sum() + prior.sum())
    ratios = np.log(np.maximum(composition, 1e-12)) - np.log(np.maximum(overall, 1e-12))
    return ratios[np.arange(k) % n_clusters].astype(np.float32)


class Baselines(nn.Module):
    """Log rate ρ and logits λ of each gene, widths of the metagenes' effects, and effects of sections on ρ and λ.

    Parameters
    ----------
    start
        Where ρ and λ start.
    n_levels
        Sections with effects of their own; 0 for none.
    """

    def __init__(self, start: Start, n_levels: int) -> None:
        super().__init__()
        genes = len(start.log_rate)
        self.rho = nn.Parameter(torch.tensor(start.log_rate, dtype=torch.float32))
        self.logits = nn.Parameter(torch.tensor(start.logits, dtype=torch.float32))
        self.log_tau = nn.Parameter(torch.zeros(genes))
        self.n_levels = n_levels
        if n_levels:  # ρ first, then λ
            self.effect_mean = nn.Parameter(torch.zeros(2, n_levels, genes))
            self.effect_log_sd = nn.Parameter(torch.full((2, n_levels, genes), _START_SD).log())
            self.effect_log_width = nn.Parameter(torch.zeros(2, genes))

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.rho)

    def tau(self) -> Tensor:
        """Prior sd of the metagenes' effects, (G,)."""
        return EPS + self.log_tau.exp()

    def effects(self, level: int) -> tuple[Tensor, Tensor]:
        """Mean and sd of a section's effects on ρ and λ, (2, G) each."""
        return self.effect_mean[:, level], EPS + self.effect_log_sd[:, level].exp()

    def effect_width(self) -> Tensor:
        """Prior sd of the effects, (2, G)."""
        return EPS + self.effect_log_width.exp()
