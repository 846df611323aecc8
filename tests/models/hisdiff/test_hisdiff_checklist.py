"""The eighteen statements of HisDiff's faithfulness checklist, by number, on small input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.data.section import Targets
from hespotex.data.splits import Fold
from hespotex.data.units import normalize
from hespotex.models import Run, create
from hespotex.models.hisdiff import HisDiff, patch_half_width
from hespotex.models.hisdiff import model as model_module
from hespotex.models.hisdiff.config import PAPER, STEM
from hespotex.models.hisdiff.diffusion import Schedule, denoising_terms, sample
from hespotex.models.hisdiff.neighbours import neighbour_index
from hespotex.models.hisdiff.network import Context, Denoiser
from hespotex.tl._cross_validate import _choose
from hespotex.tl._protocol import cross_validate_sections

RUN = Run(seed=0, device="cpu")
TINY = {"depth": 1, "width": 12, "epochs": 2, "batch": 32, "steps": 4, "heads": 3}


def network_of(config=PAPER, n_genes=6, n_features=16, *, random=True, **options):
    """A small network; random weights in place of the zeros it starts with."""
    torch.manual_seed(0)
    network = Denoiser(n_genes, n_features, replace(config, **{"depth": 2, "width": 24, **options}))
    if random:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.3)
    return network.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def context(n=3, d=16, near=9, wide=49):
    around = torch.randn(n, wide, d)
    return Context(around[:, 0], around[:, :near], around)


def test_01_patch_is_112_px_to_each_side_or_half_a_large_spot():
    assert patch_half_width(75.8) == 112
    assert [patch_half_width(d) for d in (224, 225.9, 300)] == [112, 112, 150]


def test_02_neighbourhoods_are_9_and_49_with_the_spot_itself_first(make_section):
    section = make_section(side=10)
    model = create("hisdiff", preset="paper", **TINY).fit([section], RUN)
    around = model._neighbours(section)
    found = model._context(section, 0.0, np.arange(100), around, torch.device("cpu"))
    assert (found.near.shape[1], found.wide.shape[1]) == (9, 49)
    assert torch.equal(found.near[:, 0], found.local)
    assert torch.equal(found.wide[:, 0], found.local)
    assert torch.equal(found.local, torch.from_numpy(section.features))
    assert not found.near_absent.any()
    assert not found.wide_absent.any()


def test_03_three_counts_are_two():
    assert PAPER.unit == "log2_counts"
    assert normalize(np.array([[3, 0, 1]]), np.array([50.0]), "log2_counts").tolist() == [[2.0, 0.0, 1.0]]


@pytest.mark.parametrize("n_genes", [10, 200])
def test_04_number_of_parameters(n_genes):
    with torch.device("meta"):
        network = Denoiser(n_genes, 1024, PAPER)
    assert sum(parameter.numel() for parameter in network.parameters()) == 42_451_202 + 384 * n_genes


@pytest.mark.parametrize("config", [PAPER, STEM])
def test_05_untrained_output_is_zero(config):
    output = network_of(config, random=False)(torch.randn(3, 6), torch.tensor([0, 5, 999]), context())
    assert output.shape == (3, 2, 6)
    assert (output == 0).all()


def test_06_order_of_the_neighbours_does_not_matter():
    network, given, x, time = network_of(), context(), torch.randn(3, 6), torch.tensor([3, 500, 999])
    near, wide = torch.randperm(9), torch.randperm(49)
    turned = given._replace(near=given.near[:, near], wide=given.wide[:, wide])
    np.testing.assert_allclose(network(x, time, turned), network(x, time, given), rtol=1e-4, atol=1e-5)


def test_07_genes_are_known_by_their_vectors_alone():
    network, given, x, time = network_of(), context(), torch.randn(3, 6), torch.tensor([3, 500, 999])
    before, order = network(x, time, given), torch.randperm(6)
    network.gene.data = network.gene.data[order]
    np.testing.assert_allclose(network(x[:, order], time, given), before[:, :, order], rtol=1e-4, atol=1e-5)


def test_08_neighbours_like_the_spot_say_the_same_however_many():
    network, local = network_of(), torch.randn(3, 16)

    def around(k):
        return local[:, None].expand(-1, k, -1)

    few = network.condition.attend(Context(local, around(2), around(3)))
    many = network.condition.attend(Context(local, around(9), around(49)))
    for one, other in zip(few, many, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_09_schedule():
    schedule = Schedule.linear()
    assert (schedule.betas[0], schedule.betas[999]) == (1e-4, 0.02)
    assert schedule.alphas_cumprod[999] == pytest.approx(4.036e-5, rel=1e-3)


def test_10_interpolation_reaches_both_variances():
    schedule = Schedule.linear()
    tables, steps = schedule.tables(), torch.arange(1000)
    low = tables.learned_log_variance(torch.full((1000, 1), -1.0), steps)
    high = tables.learned_log_variance(torch.full((1000, 1), 1.0), steps)
    np.testing.assert_allclose(low[:, 0], schedule.posterior_log_variance, rtol=1e-6)
    np.testing.assert_allclose(high[:, 0], np.log(schedule.betas), rtol=1e-6)
    assert float(low[0, 0]) == pytest.approx(-9.82, abs=0.01)


@pytest.mark.parametrize("likelihood", ["discrete", "gaussian"])
@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_11_the_variational_term_does_not_move_the_noise_estimate(likelihood, kind):
    tables, step = Schedule.linear().tables(), torch.tensor([0, 1, 500, 999])
    clean, noise = torch.randn(4, 6), torch.randn(4, 6)
    output, value = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    noisy = tables.noisy(clean, noise, step)
    _, bits = denoising_terms(tables, clean, noisy, noise, step, output, value, likelihood, kind)
    bits.sum().backward()
    assert output.grad is None or (output.grad == 0).all()
    assert (value.grad != 0).any()


def test_12_all_steps_kept_are_the_plain_sampler_and_noise_is_added_in_all_but_the_last():
    schedule, start = Schedule.linear(), torch.randn(2, 3)
    noise = torch.randn(1000, 2, 3)

    def run(schedule, last=None):
        calls, given = [], iter(noise if last is None else torch.cat([noise[:-1], last[None]]))

        def predict(x, time):
            calls.append(time)
            return 0.1 * x, torch.zeros_like(x)

        return sample(schedule, predict, start, lambda: next(given), "ddpm"), calls

    plain, calls = run(schedule)
    assert calls == list(range(999, -1, -1))
    respaced = schedule.respaced(1000)
    np.testing.assert_allclose(respaced.betas, schedule.betas, rtol=1e-10)
    np.testing.assert_allclose(run(respaced)[0], plain, rtol=1e-4)
    assert schedule.for_sampler("ddpm", 1000) is schedule
    assert torch.equal(run(schedule, last=torch.full((2, 3), 1e6))[0], plain)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_13_condition_computed_once_gives_the_same_bits_as_at_every_step(preset):
    config = HisDiff.preset(preset)
    network, given = network_of(config, condition_width=None), context()
    schedule = Schedule.linear().respaced(5)
    sight = network.look(given)

    def once(x, time):
        output = network.denoise(x, torch.full((1,), time), sight)
        return output[:, 0], output[:, 1]

    def anew(x, time):
        output = network(x, torch.full((1,), time), given)
        return output[:, 0], output[:, 1]

    start, noise = torch.randn(3, 6), torch.randn(5, 3, 6)
    samples = []
    for predict in (once, anew):
        draws = iter(noise)
        samples.append(sample(schedule, predict, start, lambda draws=draws: next(draws), "ddpm"))
    assert torch.equal(*samples)


def test_13_prediction_looks_at_each_spot_once_whatever_the_steps_and_samples(make_section, monkeypatch):
    section = make_section(side=6, unit="log2_counts")
    model = create("hisdiff", preset="paper", **TINY).fit([section], RUN)
    looks, passes = [], []
    look, denoise = model._network.look, model._network.denoise
    monkeypatch.setattr(model._network, "look", lambda context: looks.append(len(context.local)) or look(context))
    monkeypatch.setattr(model._network, "denoise", lambda *given: passes.append(given[1]) or denoise(*given))
    model.with_options(n_samples=3, steps=7).predict(section, block_rows=20)
    assert looks == [20, 16]
    assert len(passes) == 2 * 3 * 7


def test_14_optimiser_of_the_published_settings(make_section, monkeypatch):
    seen = []
    original = model_module.fit_lightning

    def watched(module, items, run, **options):
        seen.append((module.configure_optimizers(), items))
        return original(module, items, run, **options)

    monkeypatch.setattr(model_module, "fit_lightning", watched)
    create("hisdiff", preset="paper", depth=1, width=12, epochs=1).fit([make_section(side=12, unit="log2_counts")], RUN)
    ((optimiser, items),) = seen
    assert isinstance(optimiser, torch.optim.AdamW)
    assert (optimiser.defaults["lr"], optimiser.defaults["weight_decay"]) == (1e-4, 0)
    assert [len(items[number]) for number in items.visit(0)] == [128, 16]
    assert (PAPER.epochs, PAPER.steps, PAPER.sampler, PAPER.n_samples, PAPER.average) == (2000, 1000, "ddpm", 1, 0)
    assert (STEM.epochs, STEM.batch, STEM.n_samples, STEM.average) == (4000, 256, 20, 0.9999)


def test_15_one_sample_is_the_published_prediction_and_means_of_n_vary_n_times_less(make_section):
    section = make_section(side=6, unit="log2_counts")
    model = create("hisdiff", preset="paper", **TINY).fit([section], RUN)
    single = model.predict(section)
    assert single.std is None
    many = model.with_options(n_samples=64, keep_samples=True).predict(section)
    np.testing.assert_array_equal(many.samples[:, :, 0], single.mean)
    np.testing.assert_allclose(many.mean, many.samples.mean(axis=2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(many.std, many.samples.std(axis=2, ddof=1), rtol=1e-3)
    means = many.samples.reshape(36, -1, 8, 8).mean(axis=3)
    ratio = many.samples.var(axis=2, ddof=1).mean() / means.var(axis=2, ddof=1).mean()
    assert 5 < ratio < 12.5


def test_16_the_gene_list_does_not_look_at_the_section_to_be_predicted(make_section):
    sections = [make_section(f"s{i}", seed=i, n_genes=24, unit="log2_counts") for i in range(3)]
    noise = np.random.default_rng(5).poisson(30, size=(64, 24))
    other = replace(sections[0], targets=Targets(noise, noise.sum(1) + 1.0, sections[0].targets.genes, "log2_counts"))
    method = HisDiff.preset("paper").gene_selection["method"]
    results = [
        cross_validate_sections(
            [first, *sections[1:]],
            {"hisdiff": lambda: create("hisdiff", preset="paper", **TINY)},
            [Fold("first", np.array([1, 2]), np.array([0]))],
            panel=lambda training: _choose(training, method, 8),
            unit="log2_counts",
            run=RUN,
            nulls=False,
        )
        for first in (sections[0], other)
    ]
    assert results[0].folds[0].genes == results[1].folds[0].genes
    assert len(results[0].folds[0].genes) == 8
    first, second = (result.predictions["hisdiff", 0].mean for result in results)
    np.testing.assert_array_equal(first, second)


def test_17_stem_and_hisdiff_share_all_but_the_condition():
    hisdiff, stem = network_of(PAPER), network_of(STEM)

    def shapes(network):
        named = network.named_parameters()
        return {name: tuple(p.shape) for name, p in named if not name.startswith("condition.")}

    assert shapes(hisdiff) == shapes(stem)
    assert (hisdiff.blocks[0].heads, stem.blocks[0].heads) == (12, 6)
    names = {name for name, _ in stem.named_parameters() if name.startswith("condition.")}
    assert names == {f"condition.{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")}


def test_18_spots_without_counts_are_left_out_of_training_and_predicted(make_section, monkeypatch):
    section = make_section(side=6, unit="log2_counts")
    counts = np.array(section.targets.counts)
    counts[[3, 17]] = 0
    section = replace(section, targets=replace(section.targets, counts=counts))
    seen = []
    original = model_module.fit_lightning

    def watched(module, items, run, **options):
        seen.extend(np.concatenate([items[number] for number in items.visit(0)]).tolist())
        return original(module, items, run, **options)

    monkeypatch.setattr(model_module, "fit_lightning", watched)
    model = create("hisdiff", preset="paper", **TINY).fit([section], RUN)
    assert sorted(seen) == [row for row in range(36) if row not in (3, 17)]
    assert model.predict(section).ids.tolist() == section.ids.tolist()


def test_neighbourhoods_by_number_take_all_where_there_are_fewer():
    index, absent = neighbour_index(np.random.default_rng(0).uniform(size=(5, 2)), 9, region=np.zeros(5))
    assert (~absent).sum(axis=1).tolist() == [5] * 5
    assert (index[absent] == np.repeat(np.arange(5), 4)).all()
