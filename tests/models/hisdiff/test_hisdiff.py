from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex import models
from hespotex.data.lattice import spot_pitch
from hespotex.data.section import Section
from hespotex.errors import DataValueError, HespotexWarning, ModelMismatchError
from hespotex.models import Recipe, Run
from hespotex.models import _samples as samples_module
from hespotex.models.hisdiff import HisDiff
from hespotex.models.hisdiff import model as model_module
from hespotex.models.hisdiff.diffusion import Schedule, denoising_terms, gaussian_log_likelihood, sample
from hespotex.models.hisdiff.expression import ExpressionSpace
from hespotex.models.hisdiff.neighbours import neighbour_index, neighbours_at_pitch
from hespotex.models.hisdiff.network import Context
from hespotex.models.hisdiff.noise import SpotNoise, spot_keys

CPU = Run(seed=1, device="cpu")
TINY = {
    "depth": 1,
    "width": 16,
    "heads": 2,
    "condition_width": 16,
    "components": 4,
    "max_updates": 6,
    "batch": 32,
    "steps": 4,
    "n_samples": 3,
    "stopping": "fixed",
}


def tiny(**options):
    return models.create("hisdiff", **{**TINY, **options})


@pytest.fixture(scope="module")
def sections(make_section):
    return [make_section(f"s{i}", seed=i, side=6, group=f"p{i}") for i in range(3)]


@pytest.fixture(scope="module")
def fitted(sections):
    return tiny().fit(sections[:2], CPU)


def gaussian_denoiser(mean, spread):
    """The exact noise estimate where clean values are normal."""
    left = Schedule.linear().alphas_cumprod

    def predict(x, time):
        signal, noise = np.sqrt(left[time]), 1 - left[time]
        shrunk = signal * spread**2 / (signal**2 * spread**2 + noise)
        clean = mean + shrunk * (x - signal * mean)
        return (x - signal * clean) / np.sqrt(noise), -torch.ones_like(x)

    return predict


@pytest.mark.parametrize(("method", "steps", "off"), [("ddpm", 1000, 0.02), ("ddim", 100, 0.06), ("dpm++", 20, 0.03)])
def test_samplers_draw_from_a_known_distribution(method, steps, off):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 2, generator=generator)
    schedule = Schedule.linear().for_sampler(method, steps)
    assert len(schedule) == steps
    drawn = sample(
        schedule, gaussian_denoiser(0.7, 0.5), start, lambda: torch.randn(4000, 2, generator=generator), method
    )
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(drawn.std()) == pytest.approx(0.5, rel=off + 0.01)


def test_twenty_steps_of_the_fast_solver_match_a_thousand(fitted, sections):
    fast = fitted.with_options(n_samples=1, clip=False, steps=20)
    slow = fast.with_options(steps=1000, sampler="ddim")
    a, b = fast.predict(sections[2]).mean, slow.predict(sections[2]).mean  # from the same noise
    r = [np.corrcoef(a[:, g], b[:, g])[0, 1] for g in range(a.shape[1])]
    assert min(r) > 0.99


def test_pairs_of_samples_have_a_steadier_mean(fitted, sections):
    model = fitted.with_options(clip=False, n_samples=6)
    exact = model.with_options(n_samples=200).predict(sections[2]).mean
    off = {
        paired: np.abs(model.with_options(paired=paired).predict(sections[2]).mean - exact).mean()
        for paired in (True, False)
    }
    assert off[True] < 0.3 * off[False]


def test_velocity_of_nothing_is_the_best_guess_for_values_of_unit_variance():
    tables, step = Schedule.linear().tables(), torch.tensor([0, 300, 999])
    noisy = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    estimate = tables.noise_of(torch.zeros(3, 5), noisy, step, "velocity")
    np.testing.assert_allclose(tables.clean(noisy, estimate, step), tables.signal[step] * noisy, atol=2e-4)


def test_expression_space_round_trip_and_what_components_leave():
    rng = np.random.default_rng(0)
    expression = (rng.normal(size=(3000, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(3000, 5)) + 4).astype(
        np.float32
    )
    expression[:, 3] = 7.0
    plain = ExpressionSpace.fit(expression, scale_genes=False, components=None)
    np.testing.assert_array_equal(plain.decode(plain.encode(expression)), expression)
    scaled = ExpressionSpace.fit(expression, scale_genes=True, components=None)
    values = scaled.encode(expression)
    np.testing.assert_allclose(values.std(axis=0), [1, 1, 1, 0, 1], atol=1e-3)
    np.testing.assert_allclose(scaled.decode(values), expression, atol=1e-4)
    space = ExpressionSpace.fit(expression, scale_genes=True, components=2)
    values = space.encode(expression)
    np.testing.assert_allclose(np.cov(values.T), np.eye(2), atol=2e-3)
    drawn = space.decode(rng.normal(size=(3000, 2)).astype(np.float32), rng.normal(size=(3000, 5)).astype(np.float32))
    np.testing.assert_allclose(drawn.std(axis=0), expression.std(axis=0), rtol=0.1, atol=1e-4)
    np.testing.assert_allclose(drawn.mean(axis=0), expression.mean(axis=0), atol=0.1)
    other = ExpressionSpace.from_state(space.state())
    np.testing.assert_array_equal(other.encode(expression), values)


def test_neighbours_stay_within_radius_and_region_whatever_the_order():
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(64), 8)
    place, region = np.column_stack([column, row]) * 100.0, (np.arange(64) >= 32).astype(int)
    place[63] += 5000.0
    index, absent = neighbour_index(place, 9, region=region, radius_um=150.0)
    assert (index[:, 0] == np.arange(64)).all()
    assert not absent[:, 0].any()
    distance = np.linalg.norm(place[index] - place[:, None], axis=2)
    assert (distance[~absent] <= 150).all()
    assert (region[index] == region[:, None])[~absent].all()
    assert absent[63].sum() == 8
    assert (~absent[9]).sum() == 9
    order = rng.permutation(64)
    turned, gone = neighbour_index(place[order], 9, region=region[order], radius_um=150.0)
    assert np.array_equal(order[turned], index[order])
    assert np.array_equal(gone, absent[order])
    with pytest.raises(DataValueError, match="not finite"):
        neighbour_index(np.array([[0.0, np.nan]]), 2, region=np.zeros(1))


def test_noise_belongs_to_the_spot():
    keys = spot_keys(["a", "b", "c"])
    together = SpotNoise(3, keys, 0)
    alone = SpotNoise(3, keys[1:2], 0)
    for _ in range(2):
        np.testing.assert_array_equal(together(5)[1], alone(5)[0])
    assert not np.array_equal(SpotNoise(3, keys, 1)(5), SpotNoise(3, keys, 0)(5))
    first, second, third = (SpotNoise(3, keys, draw, paired=True)(5) for draw in range(3))
    np.testing.assert_array_equal(second, -first)
    assert not np.array_equal(np.abs(third), np.abs(first))
    wide = SpotNoise(0, spot_keys(range(2000)), 0)(20)
    assert wide.std() == pytest.approx(1, abs=0.02)


def test_neighbours_in_training_are_those_of_prediction_and_no_other_section_s(sections, monkeypatch):
    """Sections lie on the same coordinates, and one has two regions on the same coordinates, too."""
    first, second = sections[:2]
    doubled = replace(
        first,
        ids=np.concatenate([first.ids, [f"{name}-b" for name in first.ids]]),
        features=np.concatenate([first.features, first.features + 1]),
        coordinates=np.tile(first.coordinates, (2, 1)),
        region=np.repeat([0, 1], first.n_obs),
        edges=None,
        targets=replace(
            first.targets,
            counts=np.tile(first.targets.counts, (2, 1)),
            library_size=np.tile(first.targets.library_size, 2),
        ),
        extras={},
    )
    seen = []
    original = model_module.fit_lightning

    def watched(module, *args, **options):
        seen.append(module)
        return original(module, *args, **options)

    monkeypatch.setattr(model_module, "fit_lightning", watched)
    model = tiny().fit([doubled, second], CPU)
    (module,), start = seen, 0
    for section in (doubled, second):
        rows = np.arange(section.n_obs)
        around, centre = model._neighbours(section), model._embedding.centre(section)
        expected = model._context(section, centre, rows, around, torch.device("cpu"))
        for one, other in zip(module.context(torch.from_numpy(rows + start)), expected, strict=True):
            assert torch.equal(one, other)
        for index, _ in around:
            assert (section.region[index] == section.region[:, None]).all()
        start += section.n_obs


def test_what_lies_in_another_region_or_beyond_the_radius_changes_nothing(sections):
    model = tiny(standardize="global", wide_um=450.0, lr=1e-2, max_updates=12).fit(sections[:2], CPU)
    test = replace(sections[2], region=(np.arange(36) >= 30).astype(int))  # the last row of the lattice
    before = model.predict(test).mean
    features = test.features.copy()
    features[30:] += 5.0
    features[0] += 5.0
    after = model.predict(replace(test, features=features)).mean
    far = np.linalg.norm(test.coordinates - test.coordinates[0], axis=1) > 450
    np.testing.assert_allclose(after[:30][far[:30]], before[:30][far[:30]], atol=1e-5)
    assert (np.abs(after - before).max(axis=1)[~far & (np.arange(36) < 30)] > 1e-4).all()


def test_absent_neighbours_are_not_attended_to(fitted):
    network, generator = fitted._network, torch.Generator().manual_seed(0)
    around = torch.randn(4, 49, 12, generator=generator)
    absent = torch.arange(49).expand(4, -1) >= 5
    given = Context(around[:, 0], around[:, :9], around, absent[:, :9], absent)
    other = around + 10 * absent[:, :, None]
    changed = given._replace(near=other[:, :9], wide=other)
    fewer = Context(around[:, 0], around[:, :5], around[:, :5], absent[:, :5], absent[:, :5])
    with torch.no_grad():
        expected = network.condition(given)
        np.testing.assert_allclose(network.condition(changed), expected, atol=1e-6)
        np.testing.assert_allclose(network.condition(fewer), expected, atol=1e-6)
        assert not np.allclose(network.condition(changed._replace(near_absent=None, wide_absent=None)), expected)


def test_gaussian_likelihood_is_the_normal_density_and_blames_both_sides_alike():
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    x, mean, log_scale = rng.normal(size=(3, 50)) * [[4], [4], [1]]
    found = gaussian_log_likelihood(*map(torch.from_numpy, (x, mean, log_scale)))
    np.testing.assert_allclose(found, norm.logpdf(x, mean, np.exp(log_scale)), rtol=1e-9)
    tables, step = Schedule.linear().tables(), torch.zeros(2, dtype=torch.int64)
    clean, noise = torch.full((2, 1), 3.0), torch.zeros(2, 1)
    noisy, off = tables.noisy(clean, noise, step), torch.tensor([[8.0], [-8.0]])  # clean values too low, too high

    def bits(likelihood):
        return denoising_terms(tables, clean, noisy, noise, step, noise + off, torch.zeros(2, 1), likelihood)[1]

    low, high = bits("gaussian").tolist()
    assert low == pytest.approx(high, rel=1e-3)
    estimate = float(tables.clean(noisy[:1], off[:1], 0))
    scale = np.exp(tables.learned_log_variance(torch.zeros(1, 1), 0).item() / 2)
    assert low == pytest.approx(-norm.logpdf(3.0, estimate, scale) / np.log(2), rel=1e-4)
    low, high = bits("discrete").tolist()
    assert low > 30
    assert high == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("likelihood", ["gaussian", "none"])
def test_the_ancestral_sampler_reads_a_variance_only_where_one_is_trained(likelihood, sections):
    model = tiny(likelihood=likelihood, sampler="ddpm", clip=False).fit(sections[:2], CPU)
    assert ("bits" in model.history[-1]) == (likelihood == "gaussian")
    before = model.predict(sections[2]).mean
    model._network.last.bias[1] += 2.0
    assert np.array_equal(model.predict(sections[2]).mean, before) == (likelihood == "none")


def test_running_mean_of_the_weights(sections, monkeypatch):
    seen = []
    original = model_module.fit_lightning

    def watched(module, *args, **options):
        weights = [module.network.last.weight.clone()]
        first = module.on_train_batch_end

        def after(*given):
            first(*given)
            weights.append(module.network.last.weight.detach().clone())

        module.on_train_batch_end = after
        seen.append((module, weights))
        return original(module, *args, **options)

    monkeypatch.setattr(model_module, "fit_lightning", watched)
    model = tiny(average=0.2).fit(sections[:2], CPU)
    ((module, weights),) = seen
    expected = weights[0]
    for update, new in enumerate(weights[1:], start=1):
        decay = min(0.2, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * new
    assert len(weights) == 7
    assert model._network is module.average
    np.testing.assert_allclose(model._network.last.weight, expected.detach(), rtol=1e-4, atol=1e-7)
    assert not torch.equal(model._network.last.weight, module.network.last.weight)
    plain = tiny(average=0.0).fit(sections[:2], CPU)
    assert plain._network is seen[1][0].network


def test_no_more_updates_than_asked_for(sections):
    per_epoch = 3  # 72 spots in batches of 32
    for most, epochs in ((7, 2), (6, 2), (2, 1)):
        model = tiny(max_updates=most).fit(sections[:2], CPU)
        assert len(model.history) == epochs == max(1, most // per_epoch)


def test_spread_of_pairs_is_that_of_independent_samples(fitted, sections):
    model = fitted.with_options(clip=False)
    free = model.with_options(n_samples=200, paired=False).predict(sections[2]).std
    for n_samples in (2, 3, 8):
        drawn = [model.with_options(n_samples=n_samples, sample_seed=s).predict(sections[2]).std for s in range(12)]
        ratio = np.sqrt(np.mean(np.square(drawn)) / np.mean(np.square(free)))
        assert ratio == pytest.approx(1, abs=0.08)


def test_learns_a_planted_signal(make_planted):
    sections = [make_planted(f"s{i}", 200, seed=i, group=f"p{i}", noise=0.3) for i in range(2)]
    test = make_planted("new", 150, seed=9)
    options = {
        "components": None,
        "width": 32,
        "max_updates": 250,
        "lr": 3e-3,
        "batch": 128,
        "steps": 8,
        "dropout": 0.0,
    }
    model = tiny(**options, condition="spot", n_samples=4, average=0.95).fit(sections, CPU)
    predicted, measured = model.predict(test), test.targets[:]
    r = [np.corrcoef(predicted.mean[:, g], measured[:, g])[0, 1] for g in range(4)]
    assert min(r) > 0.7
    assert 0 < predicted.std.mean() < measured.std()


def test_inner_stopping_keeps_the_best_epoch_of_a_left_out_group(sections):
    model = tiny(stopping="inner", max_updates=12).fit(sections, CPU)
    best = min((row for row in model.history if "val_loss" in row), key=lambda row: row["val_loss"])
    assert model.scores == {"inner_denoising_error": pytest.approx(best["val_loss"])}


def test_blocks_order_and_number_of_samples_change_nothing_but_rounding(fitted, sections, reordered):
    test = sections[2]
    model = fitted.with_options(keep_samples=True)
    whole = model.predict(test)
    assert whole.samples.shape == (36, 6, 3)
    blocks = list(model.predict_blocks(test, block_rows=10))
    assert [len(block.ids) for block in blocks] == [10, 10, 10, 6]
    np.testing.assert_allclose(np.concatenate([block.samples for block in blocks]), whole.samples, atol=1e-3)
    turned = reordered(test)
    by_id = dict(zip(turned.ids, model.predict(turned).samples, strict=True))
    np.testing.assert_allclose([by_id[name] for name in test.ids], whole.samples, atol=1e-3)
    more = model.with_options(n_samples=5).predict(test)
    np.testing.assert_array_equal(more.samples[:, :, :3], whole.samples)
    np.testing.assert_allclose(whole.mean, whole.samples.mean(axis=2), atol=1e-5)
    np.testing.assert_allclose(whole.std, whole.samples.std(axis=2, ddof=1 / 3), atol=1e-4)  # one has no opposite
    free = model.with_options(paired=False).predict(test)
    np.testing.assert_allclose(free.std, free.samples.std(axis=2, ddof=1), atol=1e-4)


def test_seeds(sections):
    test = sections[2]
    state = torch.random.get_rng_state()
    first, second = (tiny().fit(sections[:2], CPU) for _ in range(2))
    mean = first.predict(test).mean
    np.testing.assert_array_equal(mean, second.predict(test).mean)
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(first.with_options(sample_seed=1).predict(test).mean, mean)
    assert not np.array_equal(first.with_options(sample_seed=2).predict(test).mean, mean)
    assert not np.array_equal(tiny().fit(sections[:2], Run(seed=2, device="cpu")).predict(test).mean, mean)


def test_samples_are_cut_off_at_zero_where_asked(sections):
    rare = replace(sections[0], targets=replace(sections[0].targets, counts=np.array(sections[0].targets.counts) % 2))
    model = tiny(keep_samples=True, n_samples=8).fit([rare], CPU)
    free, cut = model.with_options(clip=False).predict(sections[2]), model.predict(sections[2])
    assert free.samples.min() < 0
    np.testing.assert_array_equal(cut.samples, np.maximum(free.samples, 0))


@pytest.mark.parametrize("preset", ["default", "small", "paper", "stem"])
def test_saved_and_loaded_it_predicts_the_same_bits(preset, sections, tmp_path):
    options = {key: value for key, value in TINY.items() if key not in ("components", "condition_width", "stopping")}
    config = replace(HisDiff.preset(preset), **options)
    model = models.create("hisdiff", config=config).fit(sections[:2], CPU)
    model.recipe = Recipe(genes=model.genes, unit=model.unit, n_features=model.n_features)
    model.save(tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    before, after = model.predict(sections[2]), loaded.predict(sections[2])
    np.testing.assert_array_equal(after.mean, before.mean)
    np.testing.assert_array_equal(after.std, before.std)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_measured_expression_of_the_section_changes_nothing(preset, sections):
    options = {key: value for key, value in TINY.items() if key not in ("components", "condition_width", "stopping")}
    model = models.create("hisdiff", config=replace(HisDiff.preset(preset), **options)).fit(sections[:2], CPU)
    without = replace(sections[2], targets=None)
    np.testing.assert_array_equal(model.predict(sections[2]).mean, model.predict(without).mean)


def test_samples_that_do_not_fit_are_refused_with_the_number_that_does(fitted, sections, monkeypatch):
    monkeypatch.setattr(samples_module, "available_bytes", lambda: 2 * 4 * 36 * 6 * 100)
    with pytest.raises(DataValueError, match=r"n_samples=101: .* memory allows n_samples=100"):
        fitted.with_options(n_samples=101, keep_samples=True).predict(sections[2])
    assert fitted.with_options(n_samples=100, keep_samples=True, steps=2).predict(sections[2]).samples.shape[2] == 100
    assert fitted.with_options(n_samples=101, steps=2).predict(sections[2]).samples is None
    monkeypatch.setattr(samples_module, "available_bytes", lambda: 100)
    with pytest.raises(DataValueError, match="does not even hold one"):
        fitted.with_options(keep_samples=True).predict(sections[2])
    monkeypatch.setattr(samples_module, "available_bytes", lambda: None)  # a system that does not say
    assert fitted.with_options(keep_samples=True).predict(sections[2]).samples is not None


def test_only_settings_of_prediction_can_be_changed_afterwards(fitted):
    with pytest.raises(DataValueError, match="'width'.*n_samples"):
        fitted.with_options(width=8)


def test_few_spots_are_warned_about_and_predicted(make_section, fitted):
    few = make_section("few", side=3)
    one = replace(
        few,
        ids=few.ids[:1],
        features=few.features[:1],
        coordinates=few.coordinates[:1],
        region=few.region[:1],
        edges=None,
        targets=replace(few.targets, counts=few.targets.counts[:1], library_size=few.targets.library_size[:1]),
        extras={},
    )
    for section in (few, one):
        with pytest.warns(HespotexWarning, match="relative to their mean"):
            assert np.isfinite(fitted.predict(section).mean).all()
    for condition in ("spot", "neighbourhood"):
        model = tiny(condition=condition, standardize="global").fit([one], CPU)
        np.testing.assert_allclose(model.predict(one).mean, one.targets[:], rtol=1e-5)


def test_genes_and_sections_without_counts(sections):
    def silenced(section, genes):
        counts = np.array(section.targets.counts)
        counts[:, genes] = 0
        return replace(section, targets=replace(section.targets, counts=counts))

    model = tiny(components=None).fit([silenced(section, [1]) for section in sections], CPU)
    predicted = model.predict(sections[0])
    assert (predicted.mean[:, 1] == 0).all()
    assert (predicted.std[:, 1] == 0).all()
    with pytest.raises(DataValueError, match="no spot has a count"):
        tiny().fit([silenced(section, slice(None)) for section in sections], CPU)


def test_features_that_are_not_finite_or_of_another_width(sections, fitted):
    features = sections[2].features.copy()
    features[5, 1] = np.nan
    with pytest.raises(DataValueError, match="section 's2' has features that are NaN"):
        fitted.predict(replace(sections[2], features=features))
    with pytest.raises(ModelMismatchError, match="7 features"):
        fitted.predict(replace(sections[2], features=features[:, :7]))


def test_interrupted_fit_goes_on_and_cleans_up(sections, tmp_path, monkeypatch):
    options = {"stopping": "inner", "max_updates": 8}
    reference = tiny(**options).fit(sections, CPU)
    run, original = replace(CPU, checkpoint_dir=tmp_path), model_module.fit_lightning

    def interrupted(*args, name, **settings):
        if name == "hisdiff-final":
            raise KeyboardInterrupt
        return original(*args, name=name, **settings)

    monkeypatch.setattr(model_module, "fit_lightning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny(**options).fit(sections, run)
    assert list(tmp_path.glob("*.ckpt"))
    monkeypatch.setattr(model_module, "fit_lightning", original)
    resumed = tiny(**options).fit(sections, run)
    np.testing.assert_array_equal(resumed.predict(sections[0]).mean, reference.predict(sections[0]).mean)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"condition": "slide"},
        {"standardize": "spot"},
        {"output": "clean"},
        {"output": "noise"},
        {"likelihood": "poisson"},
        {"stopping": "never"},
        {"sampler": "euler"},
        {"near": 0},
        {"wide_um": 0},
        {"components": 0},
        {"width": 10, "heads": 4},
        {"lr": 0},
        {"weight_decay": -1},
        {"average": 1.0},
        {"dropout": -0.1},
        {"steps": 1},
        {"n_samples": 0},
        {"sample_seed": -1},
        {"unit": "tpm"},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("hisdiff", **options)
    with pytest.raises(DataValueError, match="'small', 'paper', 'stem'"):
        HisDiff.preset("large")


def test_neighbours_of_a_denser_lattice_keep_the_pitch():
    x, y = np.meshgrid(np.arange(21) * 50.0, np.arange(21) * 50.0)
    dense = np.column_stack([x.ravel(), y.ravel()])
    on = np.flatnonzero((dense % 200 == 0).all(axis=1))
    coarse, gone = neighbour_index(dense[on], 9, region=np.zeros(len(on)), radius_um=300.0)
    index, absent = neighbours_at_pitch(dense, 9, region=np.zeros(len(dense)), pitch_um=200.0, radius_um=300.0)
    middle = np.flatnonzero(((dense[on] > 200) & (dense[on] < 800)).all(axis=1))
    assert not gone[middle].any()
    assert not absent[on[middle]].any()
    np.testing.assert_array_equal(np.sort(index[on[middle]]), np.sort(on[coarse[middle]]))
    assert (index[:, 0] == np.arange(len(dense))).all()
    halves = dense[:, 0] > 500
    inside, _ = neighbours_at_pitch(dense, 9, region=halves, pitch_um=200.0)
    assert (halves[inside] == halves[:, None]).all()


def test_a_denser_grid_is_predicted_with_context_of_the_training_pitch(sections):
    model = tiny(standardize="none").fit(sections[:2], CPU)
    coarse = replace(sections[2], targets=None)
    aside = np.array([0.4 * spot_pitch(coarse.coordinates), 0.0])
    between = np.random.default_rng(0).normal(5, 3, size=coarse.features.shape).astype(np.float32)
    ids = np.concatenate([coarse.ids, [f"{each} aside" for each in coarse.ids]])
    places = np.concatenate([coarse.coordinates, coarse.coordinates + aside])
    own, other = (
        model.predict(Section("dense", ids, np.concatenate([coarse.features, each]), places)).mean[: coarse.n_obs]
        for each in (coarse.features, between)
    )
    np.testing.assert_array_equal(own, other)  # what lies between the sites is not looked at
