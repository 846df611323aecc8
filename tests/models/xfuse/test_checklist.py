"""The statements of the published method, numbered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.models import Run, create
from hespotex.models.xfuse import XFuse
from hespotex.models.xfuse import model as model_module
from hespotex.models.xfuse.baselines import Start
from hespotex.models.xfuse.config import XFuseConfig
from hespotex.models.xfuse.likelihood import nb_log_prob, nb_mean, normal_log_ratio, total_counts
from hespotex.models.xfuse.metagenes import Change, Metagenes, drop_and_split
from hespotex.models.xfuse.network import Network
from hespotex.models.xfuse.objective import Drawn, Generative
from hespotex.models.xfuse.slides import Colours, Raster, Slide, View, draw_patches, take
from hespotex.models.xfuse.training import (
    batches,
    fit_generative,
    parameter_groups,
    patches_per_level,
    scores_without_each,
    useful_of,
)

RUN = Run(seed=0, device="cpu")
TINY = {
    "depth": 2,
    "width": 4,
    "patch": 32,
    "batch": 2,
    "epochs": 3,
    "n_samples": 2,
    "purge_interval": 1,
    "metagenes": 1,
    "max_metagenes": 4,
}


def paper(**options):
    return create("xfuse", preset="paper", **{**TINY, **options})


def generative(n_genes=3, *, metagenes=2, slots=4, depth=2, width=4, norm="batch", levels=0, scale=2.0):
    torch.manual_seed(0)
    start = Start(scale, np.zeros(n_genes, np.float32), np.zeros(n_genes, np.float32))
    return Generative(Network(depth, width, norm), Metagenes(slots, width, n_genes, metagenes), start, levels)


def slide_of(side=20, spots=((5, 5), (5, 13), (14, 9)), n_genes=3, radius=2, margin=3, seed=0, **options):
    """A square raster with discs for spots, and off-tissue pixels around a square tissue."""
    rng = np.random.default_rng(seed)
    row, column = (np.argwhere(np.ones((side - 2 * margin,) * 2)) + margin).T
    raster = Raster(rng.uniform(-0.9, 0.9, size=(3, side, side)).astype(np.float32), row, column)
    near = [(row - r) ** 2 + (column - c) ** 2 <= radius**2 for r, c in spots]
    share = sparse.csr_array(np.array(near, dtype=float).reshape(len(spots), len(row)))
    counts = rng.poisson(5, size=(len(spots), n_genes)).astype(float) + 1
    return Slide.of(raster, share, counts, **options)


def whole(slide):
    size = slide.raster.shape
    return take(slide, View(np.eye(2), (np.array(size) - 1) / 2, size))


def window(slide, top, left, size):
    return take(slide, View(np.eye(2), np.array([top, left]) + (np.array(size) - 1) / 2, size))


@pytest.mark.parametrize(("depth", "size"), [(3, (13, 18)), (3, (4, 4)), (4, (8, 11)), (2, (2, 3)), (1, (1, 1))])
def test_checklist_01_level_sizes_and_output(depth, size):
    network = Network(depth, 4, "batch").eval()
    features = network.features(torch.zeros(1, 3, *size))
    for level, y in enumerate(features):
        assert y.shape == (1, 4 * 2**level, *(-(-n // 2**level) for n in size))
    assert network.decode(features).shape == (1, 4, *size)


def test_checklist_02_parameter_counts():
    network = Network(6, 16, "batch")

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(network.enc_in, network.enc_block, network.enc_down) == 10_664_224
    assert count(network.z_mean, network.z_sd) == 1_405_824
    assert count(network.dec_block, network.dec_up, network.dec_combine) == 12_235_072


def test_checklist_03_image_heads_start_at_mean_and_sd():
    image = torch.rand(2, 3, 8, 8) * 1.8 - 0.9
    colours = image.transpose(0, 1).flatten(1)
    network = Network(2, 4, "batch").eval()
    network.start_at(colours.mean(dim=1), colours.std(dim=1), 0.1)
    mu, sd = network.image(torch.randn(1, 4, 8, 8))
    torch.testing.assert_close(mu, colours.mean(dim=1)[None, :, None, None].expand_as(mu))
    torch.testing.assert_close(sd, colours.std(dim=1)[None, :, None, None].expand_as(sd))


@pytest.mark.parametrize("published", [True, False])
def test_checklist_04_scale_starts_at_that_of_a_spot_over_its_pixels(published, monkeypatch):
    zeros = np.zeros(3, np.float32)
    monkeypatch.setattr(model_module, "fit_start", lambda *_, **__: Start(2.5, zeros, zeros))
    slide = slide_of()
    model = XFuse(XFuseConfig(**TINY, background_in_size=published))
    model._levels = ()
    started = model._start([slide], 0).eval()
    pixels = 3 * 13  # three discs of radius 2
    background = 400 - 14**2
    size = (pixels + background) / 4 if published else pixels / 3
    assert slide.label_size(background=published) == pytest.approx(size)
    with torch.no_grad():
        a = started.network.scale(torch.randn(1, 4, 20, 20))
        np.testing.assert_allclose(a.numpy(), 2.5 / size, rtol=1e-3)
        if not published:
            patch = whole(slide)
            pooled = patch.bags.sum(a[0].flatten(1).T[patch.bags.part])
            np.testing.assert_allclose(pooled[:-1].numpy(), 2.5, rtol=1e-3)


def test_checklist_05_activities_sum_to_one_and_a_single_profile_has_no_gradient():
    patches = [whole(slide_of())]
    for count in (1, 3):
        model = generative(metagenes=count)
        drawn = model.draw(patches, model.noise(patches), [1])
        activity = torch.softmax(drawn.logits, dim=1)
        torch.testing.assert_close(activity.sum(dim=1), torch.ones(1, 20, 20))
        model.bound(patches, model.noise(patches), [1])["elbo"].backward()
        assert (model.metagenes.mean[0].grad is None) == (count == 1)
        if count == 1:
            assert (activity == 1).all()


def test_checklist_06_mean_and_variance():
    total, logits = torch.tensor(3.7), torch.tensor(-0.4)
    x = torch.arange(400.0)
    p = nb_log_prob(x, total, logits).exp()
    mean = (p * x).sum()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert float(mean) == pytest.approx(float(nb_mean(total, logits)), rel=1e-4)
    variance = (p * (x - mean) ** 2).sum()
    assert float(variance) == pytest.approx(float(mean * (1 + logits.exp())), rel=1e-3)


def test_checklist_07_sizes_of_disjoint_regions_add():
    patch = whole(slide_of())
    values = torch.rand(400, 2)
    log_rates = torch.randn(2, 3)
    parts = total_counts(patch.bags.sum(values[patch.bags.part]), log_rates)
    joined = replace(patch.bags, bag=torch.zeros_like(patch.bags.bag), n=1)
    union = total_counts(joined.sum(values[joined.part]), log_rates)
    torch.testing.assert_close(union[0], parts.sum(dim=0))


def test_checklist_08_cut_spots_do_not_teach_and_the_background_does():
    slide = slide_of(spots=((6, 6), (12, 10)))

    def labels(top, left, size):
        return window(slide, top, left, size).counts.sum(dim=1).tolist()

    first, second, background = slide.counts.sum(axis=1).tolist()
    assert background == 0
    assert labels(0, 0, (20, 20)) == [first, second, 0]
    assert labels(3, 3, (17, 17)) == [first, second, 0]  # one row of pixels around the disc
    assert labels(4, 3, (16, 17)) == [second, 0]  # the first touches the border
    assert labels(6, 6, (8, 8)) == []  # both are cut, nothing is off tissue
    assert whole(slide).bags.size().tolist() == [13, 13, 204]


def test_checklist_09_pixels_of_no_label_never_count():
    slide = slide_of()
    patch = whole(slide)
    values = torch.rand(400, 1)
    changed = values.clone()
    free = (slide.cells.ravel() < 196) & (np.asarray(slide.labels.sum(axis=1)).ravel()[slide.cells.ravel()] == 0)
    changed[free] = 100.0
    torch.testing.assert_close(patch.bags.sum(values[patch.bags.part]), patch.bags.sum(changed[patch.bags.part]))
    assert free.sum() == 196 - 39


def test_checklist_10_global_terms_are_scaled_and_latent_ones_are_not():
    patches = [whole(slide_of(level=0)), whole(slide_of(level=1, seed=1))]
    model = generative(levels=2).eval()
    noise = model.noise(patches)
    once, thrice = model.draw(patches, noise, [1, 1]), model.draw(patches, noise, [3, 3])
    torch.testing.assert_close(once.profile_terms, 3 * thrice.profile_terms)
    torch.testing.assert_close(once.effect, 3 * thrice.effect)
    torch.testing.assert_close(once.latent, thrice.latent)
    # Two patches of two are all of them, with each section in one of one.
    mean, sd = model.metagenes.profiles()
    whole_term = normal_log_ratio(noise.profiles, mean, sd, model.baselines.tau()).sum(dim=1)
    torch.testing.assert_close(once.profile_terms, whole_term)
    effects = [
        normal_log_ratio(noise.effects[level], *model.baselines.effects(level), model.baselines.effect_width()).sum()
        for level in (0, 1)
    ]
    torch.testing.assert_close(once.effect, sum(effects))


def test_checklist_11_a_split_pair_is_the_same_twice():
    model = generative(metagenes=2).eval()
    model.metagenes.apply_change(Change(copies=[(1, 3)], forest=[0, (1, 3)]))
    assert model.metagenes.slots == [0, 1, 3]
    assert model.metagenes.forest == [0, (1, 3)]
    logits = model.metagenes.logits(torch.randn(1, 4, 5, 5))
    assert torch.equal(logits[:, 1], logits[:, 2])
    assert torch.equal(model.metagenes.mean[1], model.metagenes.mean[3])


def test_checklist_12_what_does_not_lower_the_bound_is_useless_and_the_last_one_stays():
    assert useful_of([0, 2, 5], np.array([-10.0, -11.0, -10.0, -9.0])) == [0]
    assert useful_of([3], np.array([-10.0])) == [3]
    assert drop_and_split([3], [3], [3], 1).dropped == []
    assert drop_and_split([0, 1], [0, 1], [], 4).dropped == [1]


def test_checklist_12_each_is_left_out_by_the_softmax_over_the_rest():
    slide = slide_of()
    patches = [whole(slide)]
    model = generative(metagenes=3).eval()
    noise = model.noise(patches)
    with torch.no_grad():
        scores = model.bound_without_each(patches, noise, [1])
        assert float(scores[0]) == pytest.approx(float(model.bound(patches, noise, [1])["elbo"]), rel=1e-6)
        model.metagenes.active[1] = False
        rest = replace(noise, profiles=noise.profiles[[0, 2]])
        assert float(scores[2]) == pytest.approx(float(model.bound(patches, rest, [1])["elbo"]), rel=1e-6)


def test_checklist_12_a_large_image_does_not_round_the_differences_off(monkeypatch):
    patches = [whole(slide_of())]
    model = generative(metagenes=3).eval()
    noise = model.noise(patches)
    with torch.no_grad():
        plain = model.bound_without_each(patches, noise, [1])
        rest = float(model.draw(patches, noise, [1]).rest())
        monkeypatch.setattr(Drawn, "rest", lambda _: torch.tensor(2.0**30))
        large = model.bound_without_each(patches, noise, [1])
    torch.testing.assert_close(large - 2.0**30, plain - rest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_checklist_13_splits_double_and_collapse(n):
    slots = list(range(n))
    first = drop_and_split(slots, slots, slots, 50)
    assert len(first.copies) == n
    both = slots + [new for _, new in first.copies]
    assert len(both) == 2 * n
    second = drop_and_split(first.forest, both, slots, 50)
    assert second.dropped == [new for _, new in first.copies]
    assert (second.copies, second.forest) == ([], slots)


def test_checklist_14_colours_fill_the_range(make_parts):
    section, _ = make_parts(side=10)
    image = Raster.of(section, Colours(), 0.1).image
    assert image.min(axis=(1, 2)) == pytest.approx([-0.9] * 3)
    assert image.max(axis=(1, 2)) == pytest.approx([0.9] * 3)
    robust = Raster.of(section, Colours.fit([section]), 0.1).image
    assert np.abs(robust).max() <= 0.9 + 1e-6


def test_checklist_15_learning_rates():
    model = generative(levels=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    of = {names[id(p)]: group["lr"] / 0.1 for group in groups for p in group["params"]}
    assert set(of) == set(names.values())
    for name, times in of.items():
        if name in ("baselines.rho", "baselines.logits"):
            assert times == pytest.approx(5)
        elif name.startswith(
            ("metagenes.mean", "metagenes.log_sd", "baselines.effect_mean", "baselines.effect_log_sd")
        ):
            assert times == pytest.approx(2)
        else:
            assert times == pytest.approx(1)


@pytest.fixture(scope="module")
def pair(make_parts):
    return [make_parts(f"s{seed}", side=20, seed=seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def fitted(pair):
    return paper().fit(pair[:1], RUN)


def test_checklist_16_scale_one_leaves_the_scale_head_out(fitted, pair):
    one = fitted.with_options(scale="one")
    before, plain = one.predict(pair[0]).mean, fitted.predict(pair[0]).mean
    bias = fitted._generative.network.scale_head[-1].bias
    with torch.no_grad():
        bias += 1.0
    try:
        assert np.array_equal(one.predict(pair[0]).mean, before)
        assert not np.allclose(fitted.predict(pair[0]).mean, plain)
    finally:
        with torch.no_grad():
            bias -= 1.0
    np.testing.assert_allclose(one.predict(pair[0]).latent.sum(axis=1), 1, rtol=1e-5)


def toy(seed=0):
    """100 × 100 pixels, 10 genes, 3 metagenes that the colours show."""
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(100 * 100), 100)
    field = np.stack([np.sin(row / 9 + k) + np.cos(column / 11 - 2 * k) for k in range(3)])
    activity = np.exp(2 * field) / np.exp(2 * field).sum(axis=0)
    image = (0.8 * (2 * activity - 1) + 0.05 * rng.normal(size=activity.shape)).clip(-0.9, 0.9)
    raster = Raster(image.reshape(3, 100, 100).astype(np.float32), row, column)
    ticks = np.arange(6, 96, 8)
    near = [(row - r) ** 2 + (column - c) ** 2 <= 9 for r in ticks for c in ticks]
    share = sparse.csr_array(np.array(near, dtype=float))
    profiles = rng.gamma(2.0, 0.15, size=(3, 10))
    return Slide.of(raster, share, rng.poisson(share @ (activity.T @ profiles)).astype(float))


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-4, 3e-3])
def test_checklist_17_toy_problem(lr):
    slide = toy()
    config = replace(
        XFuse.preset("paper"),
        **{"depth": 2, "width": 4, "patch": 100, "batch": 1, "epochs": 100, "lr": lr, "metagenes": 3},
        expansion="none",
        final_purge="none",
    )
    model = XFuse(config)
    model._levels = ()
    fit = fit_generative(model._start([slide], 0), [slide], config, RUN)
    assert fit.history[-1]["rmse"] < 6.0
    assert fit.history[-1]["rmse"] < fit.history[0]["rmse"]
    # At the published rate a hundred steps hardly move, and the error of the mean of all spots is below 6, too.
    if lr > 1e-3:
        counts = slide.counts[:-1]
        assert fit.history[-1]["rmse"] < 0.9 * np.sqrt(np.square(counts - counts.mean(axis=0)).mean(axis=1)).mean()


def test_checklist_18_a_subset_of_the_genes_is_predicted_the_same(fitted, pair):
    full = fitted.with_options(keep_samples=True).predict(pair[0])
    draws = fitted._drawn_profiles("elsewhere")
    subset = [2, 0]
    latent = full.latent  # mean over draws of the activities; a subset of the genes shares them
    from hespotex.models.xfuse.inference import activities

    raster = Raster.of(pair[0], fitted._colours, 0.12)
    drawn = activities(fitted._generative, raster, 2, 0, tile=512)
    np.testing.assert_array_equal(latent, drawn.mean(axis=0))
    alone = np.mean([a @ profile[:, subset] for a, profile in zip(drawn, draws, strict=True)], axis=0)
    np.testing.assert_allclose(full.mean[:, subset], alone, rtol=1e-5)


def test_checklist_19_a_section_with_only_an_image_trains_and_is_predicted(pair):
    targets = pair[1].require_targets()
    blind = replace(pair[1], targets=replace(targets, counts=np.full(targets.shape, np.nan)))
    model = paper(epochs=2).fit([pair[0], blind], RUN)
    prediction = model.predict(blind)
    assert prediction.mean.shape == (400, 4)
    assert np.isfinite(prediction.mean).all()
    slide = Slide.of(Raster.of(blind, Colours(), 0.1), blind.parts.share, np.full((16, 4), np.nan))
    assert slide.n_spots == 0
    assert whole(slide).counts.tolist() == [[0.0] * 4]  # the background teaches all the same


@pytest.mark.parametrize("missing", ["mask", "zero"])
def test_checklist_20_a_missing_gene(missing):
    full = slide_of()
    counts = full.counts[:-1].astype(float)
    absent = counts.copy()
    absent[:, 1] = np.nan
    spots = full.labels[:-1, :-1].T.tocsr()
    lacking = whole(Slide.of(full.raster, spots, absent, missing=missing))
    model = generative(metagenes=2).eval()
    patches = [lacking]
    drawn = model.draw(patches, model.noise(patches), [1])
    term = model.counts_term(patches, drawn)[0]
    gradient = torch.autograd.grad(term, model.baselines.rho)[0]
    assert (float(gradient[1]) == 0) == (missing == "mask")
    zeros = np.nan_to_num(absent)
    as_zeros = model.counts_term([whole(Slide.of(full.raster, spots, zeros))], drawn)[0]
    assert (float(term.detach()) == pytest.approx(float(as_zeros.detach()))) == (missing == "zero")


def test_paper_preset_has_the_published_settings():
    config = XFuse.preset("paper")
    published = {
        "depth": 6,
        "width": 16,
        "norm": "batch",
        "metagenes": 1,
        "max_metagenes": 50,
        "expansion": "split",
        "purge_interval": 1000,
        "purge_samples": 3,
        "patch": 768,
        "batch": 4,
        "epochs": 20_000,
        "lr": 3e-4,
        "augmentation": "affine",
        "colour_jitter": 0.05,
        "start_profiles": "equal",
        "final_purge": "extra",
        "margin": 0.12,
        "latent_sd": None,
        "warm_up": 0.0,
        "anneal": False,
        "freeze_norm": 1.0,
        "steps_per_epoch": 1,
        "colour_range": "extremes",
        "background_in_size": True,
        "missing_genes": "zero",
        "activation_checkpoints": True,
        "n_samples": 10,
    }
    assert {name: getattr(config, name) for name in published} == published


def test_metagenes_grow_by_the_schedule(pair):
    model = paper(epochs=4, final_purge="none").fit(pair[:1], RUN)
    counts = [row["metagenes"] for row in model.history]
    assert counts[0] == 1
    assert counts[1] == 2  # a single metagene is always split
    assert model._generative.metagenes.slots == list(range(len(model._generative.metagenes.slots)))


def test_scores_average_over_patches_and_draws():
    slide, config = slide_of(), XFuseConfig(**TINY, augmentation="none", colour_jitter=0.0)
    model = generative(metagenes=2)
    steps = batches([slide], config, 0)
    torch.manual_seed(0)
    scores = scores_without_each(model, [slide], config, steps, 2, np.random.default_rng(0))
    assert scores.shape == (3,)
    assert model.training  # as it was
    torch.manual_seed(0)
    model.eval()
    patches = draw_patches([slide], steps[0], config, np.random.default_rng(0))
    sizes = patches_per_level([slide], config)
    with torch.no_grad():
        each = [model.bound_without_each(patches, model.noise(patches), sizes).numpy() for _ in range(2)]
    np.testing.assert_allclose(scores, np.mean(each, axis=0), rtol=1e-6)
