"""Likelihoods of counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hespotex.models.nn.counts import nb_loss, poisson_loss


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.uniform(0.5, 9, (40, 3))), torch.tensor(rng.poisson(4, (40, 3)).astype(float))


def test_likelihoods_are_those_of_scipy(pair):
    expected, counts = pair
    theta = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    share = (theta / (theta + expected)).numpy()
    reference = -stats.nbinom.logpmf(counts.numpy(), theta.numpy(), share).mean()
    assert nb_loss(expected, counts, theta).item() == pytest.approx(reference, rel=1e-6)
    reference = -stats.poisson.logpmf(counts.numpy(), expected.numpy()).mean()
    assert poisson_loss(expected, counts).item() == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("loss", [poisson_loss, lambda mu, y: nb_loss(mu, y, torch.ones(3))])
def test_nothing_expected_gives_no_infinite_gradient(loss):
    zero = torch.zeros(2, 3, requires_grad=True)
    loss(zero, torch.tensor([[0.0, 1, 2], [0, 0, 0]])).backward()
    assert torch.isfinite(zero.grad).all()
