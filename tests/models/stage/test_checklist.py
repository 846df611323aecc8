"""The statements of STAGE's faithfulness checklist, by number."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.dense import between_sections, random_points, shifted_points
from hespotex.data.section import Parts, Section, Targets
from hespotex.errors import DataValueError
from hespotex.models import Run, create
from hespotex.models._inner import gene_correlation
from hespotex.models.stage import Stage
from hespotex.models.stage.config import PAPER
from hespotex.models.stage.losses import directions, latent_loss, reconstruction_loss, sliced_wasserstein, total_loss
from hespotex.models.stage.network import Autoencoder, Frame, decoder, encoder
from hespotex.models.stage.training import Batches, drawn_rows, fit_networks, stage_module

CPU = Run(seed=0, device="cpu")
VISIUM = [(0, 2 / 3), (1, 1 / 3), (1, -1 / 3)]  # columns, rows
ST = [(0, 0.5), (0.5, 0), (0.5, 0.5)]
QUICK = {"preset": "paper", "widths": [8, 4], "max_epochs": 3}


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_checklist_01_widths_and_parameters():
    networks = Autoencoder(3000, 2, PAPER)
    widths = [layer.out_features for layer in networks.encoder if isinstance(layer, torch.nn.Linear)]
    assert widths == [1000, 500, 50, 10, 2]
    widths = [layer.out_features for layer in networks.decoder if isinstance(layer, torch.nn.Linear)]
    assert widths == [10, 50, 500, 1000, 3000]
    assert sum(p.numel() for p in networks.encoder.parameters()) == 3_530_202
    assert sum(p.numel() for p in networks.decoder.parameters()) == 3_533_200


@pytest.mark.parametrize("make", [encoder, decoder])
def test_checklist_02_normalisation_behind_every_hidden_layer_only(make):
    kinds = [type(layer).__name__ for layer in make(7, 3, PAPER)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 4 + ["Linear", "ReLU"]
    assert [type(layer).__name__ for layer in make(7, 3, replace(PAPER, relu=False))] == kinds[:-1]


@pytest.mark.parametrize("relu", [True, False])
def test_checklist_03_outputs_are_not_negative(make_waves, relu):
    model = create("stage", **{**QUICK, "relu": relu, "max_epochs": 1}).fit([make_waves()[0]], CPU)
    with torch.no_grad():
        model._decoders[0][-2 if relu else -1].bias.fill_(-1.0)
        raw = model._decoders[0](torch.rand(9, 2))
    assert (raw.min() < 0) == (not relu)
    assert model.predict(make_waves()[0]).mean.min() == 0


def test_checklist_04_what_the_sliced_wasserstein_distance_does():
    z, c = some(30, 3), some(30, 3, seed=1)
    along = directions(1000, z, torch.Generator().manual_seed(2))
    shuffled = z[torch.randperm(30, generator=torch.Generator().manual_seed(3))]
    assert float(sliced_wasserstein(z, shuffled, along)) == 0
    torch.testing.assert_close(sliced_wasserstein(z, c, along), sliced_wasserstein(shuffled, c, along))
    shift = torch.tensor([0.3, -0.4, 1.2])
    assert float(sliced_wasserstein(z, z + shift, along)) == pytest.approx(1.3**2 / 3, rel=0.06)


def test_checklist_05_a_thousand_unit_vectors_power_two_mean_no_root():
    assert PAPER.n_projections == 1000
    along = directions(1000, some(5, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(along.norm(dim=1), torch.ones(1000))
    z, c = some(4, 2), some(4, 2, seed=1)
    expected = np.mean(
        [np.square(np.sort(z.numpy() @ u) - np.sort(c.numpy() @ u)).mean() for u in along.numpy().astype(float)]
    )
    assert float(sliced_wasserstein(z, c, along)) == pytest.approx(expected, rel=1e-5)


def test_checklist_06_weights_of_the_total():
    z, c, predicted, expression = some(6, 2), some(6, 2, seed=1), some(6, 5, seed=2), some(6, 5, seed=3)
    along = directions(1000, z)
    latent = latent_loss(z, c, along, PAPER.swd_weight)
    reconstruction = reconstruction_loss(predicted, expression, PAPER.l1_weight)
    expected = 0.1 * ((z - c).abs().mean() + 0.1 * sliced_wasserstein(z, c, along)) + 0.01 * (
        (predicted - expression).square().mean() + 0.1 * (predicted - expression).abs().mean()
    )
    torch.testing.assert_close(total_loss(latent, reconstruction, PAPER), expected)
    assert round(float(total_loss(torch.tensor(0.00384), torch.tensor(0.15718), PAPER)), 5) == 0.00196


def test_checklist_07_without_encoder_the_reconstruction_alone(make_waves):
    module = stage_module(replace(PAPER, vge=True), Autoencoder(5, 2, replace(PAPER, vge=True)))
    assert module.networks.encoder is None
    expression, coordinates = some(6, 5), some(6, 2, seed=1)
    found = module.eval().training_step((expression, coordinates), 0)
    error = module.networks.decoder(coordinates) - expression
    torch.testing.assert_close(found["loss"], 0.01 * (error.square().mean() + 0.1 * error.abs().mean()))
    assert "latent" not in found
    assert create("stage", **QUICK, vge=True).fit([make_waves()[0]], CPU).is_fitted


def test_checklist_08_the_learning_rate_stays(make_waves):
    module = stage_module(PAPER, Autoencoder(5, 2, PAPER))
    optimiser = module.configure_optimizers()
    assert isinstance(optimiser, torch.optim.Adam)  # alone: no scheduler beside it
    assert [group["lr"] for group in optimiser.param_groups] == [1e-3]
    assert {id(p) for p in optimiser.param_groups[0]["params"]} == set(map(id, module.networks.parameters()))


def test_checklist_09_prediction_by_the_decoder_whatever_else_is_predicted(make_waves):
    section, _ = make_waves()
    model = create("stage", **QUICK).fit([section], CPU)
    whole = model.predict(section)
    alone = replace(
        section,
        parts=replace(
            section.parts,
            ids=whole.ids[3:4],
            coordinates=section.parts.coordinates[3:4],
            share=section.parts.share[:, 3:4],
        ),
    )
    np.testing.assert_allclose(model.predict(alone).mean, whole.mean[3:4], atol=1e-6)
    assert not model._decoders[0].training


def test_checklist_10_visium_lattice():
    in_um = np.array(VISIUM) * [50, 50 * np.sqrt(3)]
    np.testing.assert_allclose(np.hypot(*in_um.T), 57.735, atol=1e-3)
    row, column = np.divmod(np.arange(78 * 64), 64)
    array = np.column_stack([2 * column + row % 2, row])
    assert len(shifted_points(array, VISIUM, 1e-6)[0]) == 15_079


def test_checklist_11_square_lattice():
    array = np.stack(np.meshgrid(np.arange(6), np.arange(5)), axis=-1).reshape(-1, 2)
    dense = shifted_points(array, ST, 1e-6)[0]
    assert len(dense) == len(np.unique(dense, axis=0)) == 4 * len(array)
    assert np.diff(np.unique(dense[:, 0])).tolist() == [0.5] * 11


def test_checklist_12_recovery(make_waves):
    section, _ = make_waves(n=25)
    rows = drawn_rows(section.n_obs, 0.5, np.random.default_rng(0))
    assert len(rows) == round(0.5 * 25)
    assert (np.diff(rows) > 0).all()
    targets = section.targets
    half = replace(
        section,
        ids=section.ids[rows],
        features=section.features[rows],
        coordinates=section.coordinates[rows],
        region=section.region[rows],
        targets=Targets(targets.counts[rows], targets.library_size[rows], targets.genes),
        parts=Parts(section.ids, section.coordinates, sparse.csr_array((len(rows), 25)), level="spot"),
    )
    prediction = create("stage", **QUICK).fit([half], CPU).predict(half)
    assert prediction.ids.tolist() == section.ids.tolist()


def test_checklist_13_three_dimensions():
    rng = np.random.default_rng(0)
    stack = np.column_stack([rng.uniform(0, 50, size=(40, 2)), np.repeat([0.0, 0.1], 20)])
    frame = Frame.fit(stack, replace(PAPER, coord_sf=60.0))
    np.testing.assert_allclose(frame(stack), stack / [60, 60, 1], rtol=1e-6)
    new = between_sections(stack, 0.05)
    np.testing.assert_allclose(new, stack[20:] - [0, 0, 0.05])
    section = Section(
        "stack",
        np.arange(40).astype(str),
        np.zeros((40, 0)),
        stack,
        targets=Targets(rng.poisson(3, size=(40, 4)), np.full(40, 100.0), tuple("abcd")),
        parts=Parts(np.arange(20), new, sparse.csr_array((40, 20)), level="spot"),
    )
    model = create("stage", **QUICK).fit([section], CPU)
    assert model._decoders[0][0].in_features == 3
    assert model.predict(section).mean.shape == (20, 4)


def test_checklist_14_random_points():
    measured = np.random.default_rng(0).uniform(0, 20, size=(50, 2))
    n_drawn = math.ceil(50 * 4 * 4 / np.pi)
    everything = random_points(measured, 5, 1e9, np.random.default_rng(1))
    assert len(everything) == 50 + n_drawn
    near = random_points(measured, 5, 1.0, np.random.default_rng(1))
    distance = np.linalg.norm(everything[50:, None] - measured, axis=2).min(axis=1)
    np.testing.assert_array_equal(near[50:], everything[50:][distance <= 1])


def test_checklist_15_a_last_batch_of_one_spot():
    batches = Batches(some(513, 3), some(513, 2), 512, seed=0)
    assert [len(batches[item][0]) for item in batches.of_epoch(0)] == [513]
    batches = Batches(some(514, 3), some(514, 2), 512, seed=0)
    assert [len(batches[item][0]) for item in batches.of_epoch(1)] == [512, 2]
    small = replace(PAPER, widths=(4,), batch=512)
    networks, _ = fit_networks(small, (some(513, 3).numpy(), some(513, 2).numpy()), CPU, epochs=1, name="stage")
    assert not networks.training


def test_checklist_16_integer_and_float_coordinates(make_waves):
    section, _ = make_waves()
    whole = replace(section, coordinates=np.round(section.coordinates))
    integers = replace(section, coordinates=whole.coordinates.astype(np.int64))
    first, second = (create("stage", **QUICK).fit([each], CPU).predict(each).mean for each in (whole, integers))
    np.testing.assert_array_equal(first, second)


def test_checklist_17_same_seed_same_bits(make_waves):
    section, _ = make_waves()

    def fitted(seed):
        return create("stage", **QUICK, batch=16).fit([section], Run(seed=seed, device="cpu")).predict(section).mean

    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = fitted(1)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(first, fitted(1))
    assert not np.array_equal(first, fitted(2))


def test_checklist_18_better_than_the_noisy_measurement(make_waves):
    noise = 1.0
    section, truth = make_waves(n=500, n_genes=12, between=100, noise=noise)
    model = create("stage", widths=[64, 32], lr=5e-3, n_projections=20, max_epochs=150, patience=30)
    predicted = model.fit([section], CPU).predict(section).mean
    measured = np.maximum(truth + noise * np.random.default_rng(9).normal(size=truth.shape), 0)
    by_model, by_measuring = gene_correlation(truth, predicted).mean(), gene_correlation(truth, measured).mean()
    assert by_model > by_measuring + 0.1
    assert by_model > 0.75


def test_paper_preset_has_the_published_settings():
    config = Stage.preset("paper")
    published = {
        "widths": (1000, 500, 50, 10),
        "relu": True,
        "vge": False,
        "swd_weight": 0.1,
        "l1_weight": 0.1,
        "recon_weight": 0.1,
        "n_projections": 1000,
        "lr": 1e-3,
        "batch": 512,
        "max_epochs": 10_000,
        "patience": None,
    }
    assert {name: getattr(config, name) for name in published} == published
    with pytest.raises(DataValueError, match="'default', 'paper'"):
        Stage.preset("small")


@pytest.mark.data
def test_recorded_coordinates(golden):
    recorded = golden("coordinates")

    def once(points):  # twins that differ by rounding are one place here
        _, first = np.unique(np.round(points, 6), axis=0, return_index=True)
        return points[np.sort(first)]

    for name, offsets in (("visium", VISIUM), ("visium_full", VISIUM), ("st", ST)):
        ours = shifted_points(recorded[f"{name}_measured"], offsets, 1e-6)[0]
        np.testing.assert_allclose(ours, once(recorded[f"{name}_generated"]), atol=1e-12)
    np.testing.assert_allclose(between_sections(recorded["d3_coord"], 0.05), recorded["d3_new"], atol=1e-12)
    legacy = np.random.RandomState(int(recorded["random_numpy_seed"]))
    ours = random_points(recorded["visium_measured"], 5, 1.0, legacy)
    np.testing.assert_allclose(ours, recorded["random_generated"], atol=1e-12)
    legacy = np.random.RandomState(int(recorded["recovery_numpy_seed"]))
    rows = drawn_rows(38, 0.5, legacy)
    np.testing.assert_array_equal(rows, recorded["recovery_sample_index"])
    np.testing.assert_array_equal(recorded["visium_measured"][rows], recorded["recovery_train"])
