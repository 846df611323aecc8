"""Statements about the published algorithm, by number.

====  =====================================================================================================
 1    superpixels of 16 px at 0.5 µm; white completes the image to multiples of 256 px
 2    192 + 384 + 3 features
 3-5  tests/encoders/test_hipt.py
 6    16 shifts, their coverage and the empty border
 7    box filter of even width
 8    integer discs
 9    output activation
10    number of parameters
11    loss is the MSE of disc means; superpixels within a disc can be exchanged
12    constant outputs scale back to range and minimum
13    mean, not sum
14    unstandardised features
15    optimiser, epochs, batches, members, median
16    genes by raw variance; a given list keeps its order
17    positive predictions, outside of spots as well
18    tests/annotation/test_clusters.py
19    tests/annotation/test_signatures.py
20    from pixels to genes with random weights
====  =====================================================================================================
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex import models
from hespotex.data.geometry import Level, Slide
from hespotex.data.panel import PanelSource, choose_panel
from hespotex.data.section import Parts, Section, Targets
from hespotex.encoders.hipt import HIPT
from hespotex.models import Run
from hespotex.models.istar import model as istar_model
from hespotex.models.istar.config import PAPER
from hespotex.models.istar.features import HIPT_BOXES, box_filter, feature_map, pad_white, rgb_map, shift_ensemble
from hespotex.models.istar.network import PartNetwork, positive
from hespotex.models.istar.spots import disc, disc_members, published_radius
from hespotex.models.istar.training import GeneScale, SpotBatches, Supervision, batch_loss

CPU = Run(seed=1, device="cpu")


def fitted(section, **options):
    return models.create("istar", preset="paper", **{"epochs": 1, "n_members": 1, "width": 8, **options}).fit(
        [section], CPU
    )


def of_spots(n=4, members=5, n_features=3, n_genes=2, seed=0):
    """Spots over separate superpixels, as many each."""
    rng = np.random.default_rng(seed)
    return Supervision(
        features=rng.normal(size=(n * members, n_features)).astype(np.float32),
        share=sparse.csr_array(np.kron(np.eye(n), np.ones((1, members)))),
        counts=rng.poisson(20, (n, n_genes)).astype(np.float32),
        size=np.full(n, members, np.float32),
        depth=np.ones(n, np.float32),
    )


def loss_of(network, data, y):
    (batch,) = SpotBatches(data, y, data.n, seed=0)
    return float(batch_loss(network, batch, PAPER, torch.ones(y.shape[1])).detach())


def test_checklist_01_grid_of_superpixels():
    image = np.zeros((300, 500, 3), np.uint8)
    padded = pad_white(image)
    assert padded.shape == (512, 512, 3)
    assert padded[300:].min() == padded[:, 500:].min() == 255
    assert padded[:300, :500].max() == 0
    assert rgb_map(padded).shape == (32, 32, 3)
    assert HIPT.info.mpp * 16 == HIPT.info.tile_um == 8.0


def test_checklist_02_order_and_number_of_features():
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)

    def extract(part):
        shape = part.shape[0] // 16, part.shape[1] // 16
        return np.full((*shape, 192), 1.0), np.full((*shape, 384), 2.0)

    features = feature_map(image, extract)
    assert features.shape == (32, 32, 579)
    assert HIPT.n_features == sum(width for width, _ in HIPT_BOXES) == 579
    np.testing.assert_allclose(features[..., :192], 1, rtol=1e-6)
    np.testing.assert_allclose(features[..., 192:576], 2, rtol=1e-6)
    np.testing.assert_allclose(features[..., 576:], rgb_map(image), rtol=1e-6)


def test_checklist_06_coverage_of_the_shifts():
    seen = []

    def extract(part):
        seen.append(part.shape)
        return [np.ones((part.shape[0] // 16, part.shape[1] // 16, 1))]

    image = np.zeros((768, 1024, 3), np.uint8)
    (coverage,) = shift_ensemble(image, extract, legacy=True)
    assert seen == [(512, 768, 3)] * 16
    along = np.array([1] * 4 + [2] * 4 + [3] * 4 + [4] * 20 + [0] * 16) / 4
    np.testing.assert_allclose(coverage[:, 20, 0], along)
    np.testing.assert_allclose(coverage[20, :32, 0], along[:32])
    assert (coverage[-16:] == 0).all()
    assert (coverage[:, -16:] == 0).all()
    (repaired,) = shift_ensemble(image, extract)
    np.testing.assert_allclose(repaired, 1)


def test_checklist_07_even_boxes_are_half_a_superpixel_off():
    impulse = np.zeros((21, 21))
    impulse[10, 10] = 1
    smooth = box_filter(impulse, 4, centred=False)
    expected = np.zeros((21, 21))
    expected[9:13, 9:13] = 1 / 16
    np.testing.assert_allclose(smooth, expected, atol=1e-12)
    repaired = box_filter(impulse, 4, centred=True)
    np.testing.assert_allclose(repaired, repaired[::-1, ::-1], atol=1e-12)


def test_checklist_08_discs(make_parts):
    assert len(disc(3.4375)) == 37
    assert np.ptp(disc(3.4375), axis=0).tolist() == [6, 6]  # within a window of 9 × 9
    assert [len(disc(radius)) for radius in (4, 8)] == [49, 197]
    section, _ = make_parts(side=30, radius_um=27.5, pitch_um=80)
    assert published_radius(section.parts) == 3.4375
    members = disc_members(section.parts, section.coordinates, 3.4375)
    assert np.diff(members.indptr).max() == 37


def test_checklist_08_discs_follow_the_turned_grid_and_leave_out_holes(make_parts):
    section, _ = make_parts(side=30)
    parts = section.parts
    plain = disc_members(parts, section.coordinates, 2.0)
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    turned = replace(parts, coordinates=parts.coordinates @ turn + 1000.0, grid=parts.grid + [8, -4])
    other = disc_members(turned, section.coordinates @ turn + 1000.0, 2.0)
    assert (plain != other).nnz == 0
    kept = np.arange(parts.n_parts) % 7 > 0
    holes = replace(
        parts,
        ids=parts.ids[kept],
        coordinates=parts.coordinates[kept],
        grid=parts.grid[kept],
        share=parts.share[:, kept],
        features=parts.features[kept],
        colour=parts.colour[kept],
    )
    assert (disc_members(holes, section.coordinates, 2.0) != plain[:, kept]).nnz == 0


def test_checklist_08_cells_cut_by_the_border_move_no_disc(make_parts):
    """Their centres are those of what is left; spots on halves must not notice."""
    section, _ = make_parts(side=30)
    spots = np.stack(np.meshgrid(np.arange(36.0, 200, 8), np.arange(36.0, 200, 8)), axis=-1).reshape(-1, 2)
    border = (section.parts.grid == 0).any(axis=1)
    cut = section.parts.coordinates + np.where(border, 2.5, 0.0)[:, None]
    plain = disc_members(section.parts, spots, 2.0)
    assert (disc_members(replace(section.parts, coordinates=cut), spots, 2.0) != plain).nnz == 0


def test_checklist_09_activation():
    out = positive(torch.tensor([-1e4, 0.0, 1.0])).numpy()
    np.testing.assert_allclose(out, [0, 0.01, 1.01], atol=1e-7)


@pytest.mark.parametrize("n_genes", [1, 1000])
def test_checklist_10_number_of_parameters(n_genes):
    network = PartNetwork(579, n_genes)
    assert sum(parameter.numel() for parameter in network.parameters()) == 345_856 + 257 * n_genes


def test_checklist_11_loss_and_exchange_within_a_disc():
    data = of_spots()
    y = GeneScale.fit(data, minmax=True).scaled(data)
    assert y.min() == 0
    assert y.max() == pytest.approx(1)
    network = PartNetwork(3, 2, width=8)
    with torch.no_grad():
        means = network(torch.from_numpy(data.features)).reshape(4, 5, 2).mean(dim=1).numpy()
    assert loss_of(network, data, y) == pytest.approx(((means - y) ** 2).mean(), rel=1e-6)
    order = np.concatenate([5 * spot + np.random.default_rng(spot).permutation(5) for spot in range(4)])
    assert loss_of(network, replace(data, features=data.features[order]), y) == pytest.approx(
        loss_of(network, data, y), rel=1e-6
    )


def test_checklist_12_constant_outputs(make_parts):
    section, _ = make_parts(side=10)
    model = fitted(section)
    n, counts = len(disc(published_radius(section.parts))), section.targets.counts
    for value in (0.0, 0.3):
        with torch.no_grad():
            model._members[0].output.weight.zero_()
            model._members[0].output.bias.fill_(value)
        total = n * model.predict(section).mean
        expected = (value + 0.01) * np.ptp(counts, axis=0) + counts.min(axis=0)
        np.testing.assert_allclose(total, np.broadcast_to(expected, total.shape), rtol=1e-5)


def test_checklist_13_superpixels_twice_change_nothing():
    data = of_spots()
    y = GeneScale.fit(data, minmax=True).scaled(data)
    network = PartNetwork(3, 2, width=8)
    twice = replace(
        data, features=data.features.repeat(2, axis=0), share=sparse.csr_array(np.kron(np.eye(4), np.ones((1, 10))))
    )
    assert loss_of(network, twice, y) == pytest.approx(loss_of(network, data, y), rel=1e-6)


def test_checklist_14_features_are_not_standardised(make_parts, monkeypatch):
    section, _ = make_parts(side=20)
    section = replace(section, parts=replace(section.parts, features=section.parts.features * 30 + 7))
    seen = []
    forward = PartNetwork.embed
    monkeypatch.setattr(PartNetwork, "embed", lambda self, x: (seen.append(x.detach()), forward(self, x))[1])
    model = fitted(section)
    trained = torch.cat(seen).numpy()
    assert {tuple(row) for row in trained} <= {tuple(row) for row in section.parts.features}
    seen.clear()
    model.predict(section)
    np.testing.assert_array_equal(torch.cat(seen).numpy(), section.parts.features)


def test_checklist_15_training(make_parts, monkeypatch):
    assert (PAPER.lr, PAPER.epochs, PAPER.batch, PAPER.n_members, PAPER.weight_decay) == (1e-4, 400, None, 5, 0)
    assert (PAPER.aggregate, PAPER.loss, PAPER.width, PAPER.n_layers) == ("median", "mse", 256, 4)
    for n, batch in ((400, 25), (5000, 128), (10, 1)):
        data = of_spots(n, members=1)
        batches = SpotBatches(data, data.counts, None, seed=0)
        assert batches.batch == batch
        assert max(len(batches[index][-1]) for index in batches.visit(3)) <= batch
        for epoch in (0, 1):  # each spot once, in other batches
            seen = np.concatenate([batches[index][0].numpy() for index in batches.visit(epoch)])
            assert sorted(map(tuple, seen)) == sorted(map(tuple, data.features))
        if batch > 1:
            assert not torch.equal(batches[batches.visit(0)[0]][0], batches[batches.visit(1)[0]][0])
    calls = []
    original = istar_model.fit_lightning

    def recorded(module, items, run, **options):
        calls.append((module.configure_optimizers(), run, options))
        return original(module, items, run, **{**options, "max_epochs": 1})

    monkeypatch.setattr(istar_model, "fit_lightning", recorded)
    section, _ = make_parts(side=20)
    model = fitted(section, epochs=400, n_members=5)
    assert len({run.seed for _, run, _ in calls}) == 5
    for optimizer, run, options in calls:
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults["lr"] == 1e-4
        assert options["max_epochs"] == 400
        assert run.precision == "32-true"
    single = []
    for member in model._members:
        alone = models.create("istar", config=model.config)
        alone.__dict__.update(model.__dict__)
        alone._members = [member]
        single.append(alone.predict(section).mean)
    np.testing.assert_array_equal(model.predict(section).mean, np.median(single, axis=0))


def test_checklist_16_genes(make_parts):
    assert PAPER.gene_selection == {"method": "variance", "n_top": 1000}
    counts = np.random.default_rng(0).poisson([1, 50, 5, 200, 20], size=(300, 5))
    panel = choose_panel([PanelSource(sparse.csr_array(counts), tuple("abcde"))], method="variance", n_top=3)
    assert set(panel) == {"b", "d", "e"}
    section, _ = make_parts(side=20)
    given = ("z", "a", "m", "b")
    model = fitted(replace(section, targets=replace(section.targets, genes=given)))
    assert model.predict(section).genes == given


def test_checklist_17_predictions_are_positive_and_everywhere(make_parts):
    section, _ = make_parts(side=20, pitch_um=50)
    counts = np.array(section.targets.counts)
    counts[0] = 0  # every gene's least count
    model = fitted(replace(section, targets=replace(section.targets, counts=counts)))
    uncovered = np.asarray(section.parts.share.sum(axis=0)).ravel() == 0
    assert uncovered.any()
    predicted = model.predict(section)
    assert (predicted.mean > 0).all()
    assert len(predicted.ids) == section.parts.n_parts


def test_checklist_20_from_pixels_to_genes():
    rng = np.random.default_rng(0)
    quarter = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    image = np.tile(quarter, (2, 2, 1))  # equal patches are computed once
    import dask.array as da

    slide = Slide("image", (Level(da.from_array(image.transpose(2, 0, 1)), 1.0),), 0.5, np.diag([0.5, 0.5, 1.0]))
    grid = np.argwhere(np.ones((64, 64), dtype=bool))
    encoder = HIPT("random")
    features = np.empty((len(grid), 579), dtype=np.float32)
    run = {"batch_size": 16, "device": "cpu", "progress_bar": False}
    for rows, values in encoder.embed(slide, (grid[:, ::-1] + 0.5) * 16.0, **run):
        features[rows] = values
    parts = Parts(
        ids=np.arange(len(grid)).astype(str),
        coordinates=(grid[:, ::-1] + 0.5) * 8.0,
        share=sparse.csr_array((25, len(grid))),
        features=features,
        grid=grid,
        size_um=8.0,
        level="superpixel",
    )
    spots = np.stack(np.meshgrid(*[np.arange(56.0, 512, 100)] * 2), axis=-1).reshape(-1, 2)
    parts = replace(parts, share=disc_members(parts, spots, 3.4375))
    counts = rng.poisson(9, (25, 7))
    section = Section(
        "s",
        np.arange(25).astype(str),
        np.empty((25, 0)),
        spots,
        targets=Targets(counts, counts.sum(axis=1), tuple("ABCDEFG"), "counts"),
        parts=parts,
    )
    predicted = fitted(section, epochs=2, n_members=2, width=256).predict(section)
    assert predicted.mean.reshape(64, 64, 7).shape == (64, 64, 7)
    assert np.isfinite(predicted.mean).all()
    assert predicted.latent.shape == (64 * 64, 256)
