"""Pooling of parts inside networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.shares import aggregate
from hespotex.errors import DataValueError
from hespotex.models.nn.pooling import Bags, bag_rows


def test_pools_as_the_matrix_does(make_parts):
    section, truth = make_parts()
    rows = np.array([5, 2, 7])
    bags = Bags.of(section.parts.share, rows)
    values = torch.from_numpy(truth)[bags.part]
    np.testing.assert_allclose(bags.sum(values), aggregate(section.parts.share[rows], truth), rtol=1e-5)
    np.testing.assert_allclose(bags.mean(values), aggregate(section.parts.share[rows], truth, "mean"), rtol=1e-5)


def test_gradients_are_the_shares():
    share = sparse.csr_array(np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.25]]))
    bags = Bags.of(share)
    values = torch.zeros(len(bags.part), 1, requires_grad=True)
    bags.sum(values).sum().backward()
    assert values.grad.ravel().tolist() == [1.0, 0.5, 0.25]


def test_an_observation_without_parts_is_0_and_supervises_nothing():
    share = sparse.csr_array(np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert Bags.of(share).mean(torch.ones(1, 2)).tolist() == [[0, 0], [1, 1]]
    assert bag_rows(share).tolist() == [1]
    stored = sparse.csr_array((np.array([0.0, 1.0]), (np.array([0, 1]), np.array([0, 0]))), shape=(2, 2))
    assert bag_rows(stored).tolist() == [1]
    with pytest.raises(DataValueError, match="no spot holds any of its 2 parts"):
        bag_rows(sparse.csr_array((3, 2)))
