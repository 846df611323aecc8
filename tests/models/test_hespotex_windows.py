"""HESpotEx on sections larger than one step: windows give what the whole section gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hespotex.errors import DataValueError
from hespotex.models import Run, create
from hespotex.models.hespotex import HESpotExConfig
from hespotex.models.hespotex import inputs as inputs_module
from hespotex.models.hespotex.expression import SpotSection, _embedded, _Items
from hespotex.models.hespotex.image import ImageItems, ImageSection, new_members
from hespotex.models.hespotex.inputs import Inputs, gate_edges
from hespotex.models.hespotex.windows import cut, reached, windows_of
from hespotex.models.nn.gate import GATE

RUN = Run(device="cpu", precision="32-true")
QUICK = {"epochs": 2, "gate_epochs": 2, "width": 16, "head_width": 16, "gate_hidden": 16, "n_members": 2}


@pytest.fixture(scope="module")
def section(make_section):
    """900 spots in an order that follows no row of the lattice."""
    one = make_section(side=30, seed=3, n_features=9)
    order = np.random.default_rng(1).permutation(one.n_obs)
    targets = one.targets
    return replace(
        one,
        ids=one.ids[order],
        features=one.features[order],
        coordinates=one.coordinates[order],
        edges=one.edges[order][:, order],
        targets=replace(targets, counts=targets.counts[order], library_size=targets.library_size[order]),
        extras={name: values[order] for name, values in one.extras.items()},
    )


def windowed(model, size):
    model.config = replace(model.config, window=size)
    return model


def test_windows_cover_every_row_once_and_are_compact(section):
    windows = windows_of(section.coordinates, 128)
    assert sorted(np.concatenate(windows)) == list(range(900))
    assert max(map(len, windows)) <= 128
    assert all((np.diff(rows) > 0).all() for rows in windows)
    sides = [np.ptp(section.coordinates[rows], axis=0).max() / 200 for rows in windows]
    assert max(sides) < 16  # of 30: 113 spots fill a square of side 11
    assert [len(rows) for rows in windows_of(section.coordinates, None)] == [900]


def test_what_reaches_a_row_is_all_that_lies_upstream():
    chain = np.zeros((6, 6))
    chain[np.arange(1, 6), np.arange(5)] = 1  # i receives from i - 1
    from scipy import sparse

    graph = sparse.csr_array(chain)
    assert reached(graph, np.array([4]), 2).tolist() == [2, 3, 4]
    assert reached(graph, np.array([4, 1]), 0).tolist() == [1, 4]
    assert cut(graph, np.array([1, 2, 4])).toarray().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "options", [{}, {"standardize": "global", "nuclei": "feature"}, {"context": 0}, {"input_rank": 5}]
)
def test_inputs_are_the_same_read_in_windows(section, options):
    whole = Inputs.fit(HESpotExConfig(window=None, **options), [section])
    parts = Inputs.fit(HESpotExConfig(window=64, **options), [section])
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-5)
    expected = whole(section).features
    reader = replace(whole, config=replace(whole.config, window=64)).of(section)
    assert reader.shape == expected.shape
    for rows in (slice(3, 700, 7), slice(0, 900), np.array([5, 890, 17]), slice(40, 41)):
        np.testing.assert_allclose(reader[rows], expected[rows], atol=1e-5)


def test_no_read_takes_more_than_twice_a_window(section, monkeypatch):
    inputs = Inputs.fit(HESpotExConfig(window=200), [section])
    lengths = []

    def counted(one, rows=slice(None)):
        block = original(one, rows)
        lengths.append(len(block))
        return block

    original = inputs_module.read_features
    monkeypatch.setattr(inputs_module, "read_features", counted)
    assert inputs.of(section)[::2].shape[0] == 450
    assert 0 < max(lengths) <= 400


@pytest.mark.parametrize("order", ["parallel", "chained"])
def test_losses_of_windows_add_up_to_that_of_the_section(section, order):
    config = HESpotExConfig(window=100, layer_order=order, dropout=0.0, n_members=1, width=8, head_width=8)
    reader = Inputs.fit(config, [section]).of(section)
    target = np.random.default_rng(0).normal(size=(900, 5)).astype(np.float32)
    hops = config.n_layers if order == "chained" else 1
    torch.manual_seed(0)
    (member,) = new_members(config, reader.shape[1], 5)

    def gradient(windows):
        member.zero_grad()
        for item in ImageItems([ImageSection(reader, windows, target, None)], hops=hops):
            found = member(item.features, item.edges, item.weights, item.factor, chunk=64)[1]
            rows = slice(None) if item.rows is None else item.rows
            F.mse_loss(found[rows], item.target[rows], reduction="sum").backward()
        return torch.cat([weight.grad.ravel().clone() for weight in member.parameters()])

    whole = gradient([np.arange(900)])
    torch.testing.assert_close(gradient(reader.windows()), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_the_expression_stream_sees_in_windows_what_it_sees_at_once(section):
    expression = torch.randn(900, 6, generator=torch.Generator().manual_seed(0))
    edges = torch.from_numpy(gate_edges(HESpotExConfig(), section))
    torch.manual_seed(0)
    gate = GATE(6, hidden=12, embedding=4)
    windows = windows_of(section.coordinates, 100)
    whole, parts = SpotSection(expression, edges), SpotSection(expression, edges, windows)

    def gradient(one):
        gate.zero_grad()
        for _, x, own, counted in _Items([one], in_windows=True):
            found = gate(x, own)[1]
            rows = slice(None) if counted is None else counted
            F.mse_loss(found[rows], x[rows], reduction="sum").backward()
        return torch.cat([weight.grad.ravel().clone() for weight in gate.parameters()])

    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(_embedded(gate, parts), gate.encode(expression, edges))


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_order": "chained"}, {"nuclei": "feature"}, {"regression": "none", "output": "shift"}, {"context": 0}],
)
def test_a_section_is_predicted_in_windows_as_it_is_whole(section, options):
    model = create("hespotex", window=None, **QUICK, **options).fit([section], RUN)
    whole = model.predict(section)
    for block_rows in (128, 37):
        parts = windowed(model, 150).predict(section, block_rows=block_rows)
        np.testing.assert_allclose(parts.mean, whole.mean, atol=2e-5)
        np.testing.assert_allclose(parts.latent, whole.latent, atol=2e-5)


def test_training_takes_a_step_for_each_window(section, monkeypatch):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
    model = create("hespotex", window=250, **QUICK).fit([section], RUN)
    assert len(steps) == 2 * 4
    assert np.isfinite(model.predict(section).mean).all()
    r = [np.corrcoef(m, p)[0, 1] for m, p in zip(section.targets[:].T, model.predict(section).mean.T, strict=True)]
    assert np.mean(r) > 0.3


@pytest.mark.parametrize("options", [{"stopping": "inner"}, {"gate_order": "sequential"}, {"align_weight": 0.0}])
def test_every_way_of_training_takes_windows(section, make_section, options):
    small = make_section("small", side=8, n_features=9, group="other")
    model = create("hespotex", window=300, **QUICK, **options).fit([section, small], RUN)
    again = create("hespotex", window=300, **QUICK, **options).fit([section, small], RUN)
    np.testing.assert_array_equal(model.predict(section).mean, again.predict(section).mean)
    assert np.isfinite(model.predict(small).mean).all()


def test_a_section_that_fits_is_trained_as_without_windows(section):
    whole = create("hespotex", window=None, **QUICK).fit([section], RUN)
    fitting = create("hespotex", window=900, **QUICK).fit([section], RUN)
    for name, array in whole.state()[0].items():
        np.testing.assert_array_equal(fitting.state()[0][name], array)


def test_a_window_of_a_few_spots_is_an_error():
    with pytest.raises(DataValueError, match="window"):
        create("hespotex", window=3)
