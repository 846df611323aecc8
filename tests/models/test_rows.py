from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.errors import HespotexWarning
from hespotex.models._rows import RowBatches, mark_of
from hespotex.models._standardize import Standardizer
from hespotex.models.bleep import BLEEPConfig


def test_batches_cover_every_spot_once_per_epoch_in_a_new_order():
    batches = RowBatches(np.arange(10, 35), 8, 3, seed=0)
    epochs = [torch.cat([batches[number] for number in batches.visit(epoch)]).tolist() for epoch in range(3)]
    assert len(batches) == 12
    assert all(sorted(epoch) == list(range(10, 35)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batches[5].tolist() == epochs[1][8:16]


def test_mark_differs_with_data_and_settings_of_the_fit():
    config, tensors = BLEEPConfig(), (torch.arange(6.0), None)
    mark = mark_of(tensors, config)
    assert mark_of((torch.arange(6.0), None), BLEEPConfig()) == mark
    assert mark_of(tensors, replace(config, retrieved=3)) == mark  # of prediction
    assert mark_of(tensors, replace(config, lr=1.0)) != mark
    assert mark_of((torch.arange(6.0).reshape(2, 3), None), config) != mark
    assert mark_of((torch.arange(6.0) + 1, None), config) != mark


def test_features_are_taken_relative_to_what_is_asked_for(make_section):
    sections = [make_section(f"s{i}", seed=i) for i in range(2)]  # each with its own shift
    plain, common, own = (Standardizer.fit(sections, kind) for kind in ("none", "global", "section"))
    np.testing.assert_array_equal(plain.read_all(sections), np.concatenate([s.features for s in sections]))
    for fitted in (common, own):
        everything = fitted.read_all(sections)
        np.testing.assert_allclose(everything.mean(axis=0), 0, atol=1e-5)
        again = Standardizer.from_state(fitted.state(), fitted.kind)
        np.testing.assert_array_equal(again.read_all(sections), everything)
    np.testing.assert_allclose(common.read_all(sections).std(axis=0), 1, rtol=1e-4)
    assert np.abs(common.read_all(sections)[:64].mean(axis=0)).max() > 0.1
    np.testing.assert_allclose(own.read_all(sections)[:64].mean(axis=0), 0, atol=1e-5)
    part = own.read(sections[1], own.centre(sections[1]), np.array([3, 1]))
    np.testing.assert_allclose(part, own.read_all(sections)[[67, 65]], atol=1e-6)


def test_only_a_mean_of_few_is_warned_about(make_section):
    few = make_section(side=4)
    Standardizer.fit([few], "global").warn_if_few(few)
    with pytest.warns(HespotexWarning, match="16 observations"):
        Standardizer.fit([few], "section").warn_if_few(few)
