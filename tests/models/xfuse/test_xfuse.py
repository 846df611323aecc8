"""What XFuse promises beyond the published statements: shapes, round trips, invariances and clear errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts
from hespotex.errors import CheckpointError, DataValueError, ModelMismatchError
from hespotex.models import Run, create, load
from hespotex.models.xfuse import XFuse
from hespotex.models.xfuse import training as training_module
from hespotex.models.xfuse.baselines import cluster_profiles, fit_start
from hespotex.models.xfuse.config import XFuseConfig
from hespotex.models.xfuse.inference import activities, field_noise, mean_and_std, tiles
from hespotex.models.xfuse.metagenes import Change, Metagenes, drop_and_split, extra, spare
from hespotex.models.xfuse.network import Network, reach
from hespotex.models.xfuse.objective import Generative
from hespotex.models.xfuse.slides import (
    Colours,
    Raster,
    Slide,
    View,
    draw_matrix,
    draw_view,
    fitting_size,
    jittered,
    take,
)

RUN = Run(seed=0, device="cpu")
TINY = {"depth": 2, "width": 4, "patch": 32, "epochs": 2, "steps_per_epoch": 1, "n_samples": 3, "metagenes": 3}


def tiny(**options):
    return create("xfuse", preset="small", **{**TINY, **options})


@pytest.fixture(scope="module")
def sections(make_parts):
    return [make_parts(f"s{seed}", side=20, seed=seed)[0] for seed in range(2)]


@pytest.fixture(scope="module")
def fitted(sections):
    return tiny().fit(sections, RUN)


def test_prediction_has_the_shapes_and_words_of_the_contract(fitted, sections):
    section = sections[0]
    prediction = fitted.with_options(keep_samples=True).predict(section)
    assert prediction.level == "superpixel"
    assert prediction.unit == fitted.unit == "counts"
    assert prediction.ids.tolist() == section.parts.ids.tolist()
    assert prediction.mean.shape == prediction.std.shape == (400, 4)
    assert prediction.samples.shape == (400, 4, 3)
    assert prediction.latent.shape == (400, len(fitted.profiles))
    np.testing.assert_allclose(prediction.samples.mean(axis=2), prediction.mean, rtol=1e-5)
    np.testing.assert_allclose(prediction.samples.std(axis=2, ddof=1), prediction.std, rtol=1e-3, atol=1e-6)
    assert (prediction.mean > 0).all()
    assert fitted.predict(section).samples is None


def test_metagene_maps_times_profiles_is_the_prediction(sections):
    model = tiny(final_purge="none").fit(sections[:1], RUN)
    prediction = model.with_options(n_samples=200).predict(sections[0])
    np.testing.assert_allclose(prediction.latent @ model.profiles, prediction.mean, rtol=0.05)


def test_blocks_do_not_change_the_numbers(fitted, sections):
    whole = fitted.predict(sections[0])
    blocks = fitted.predict(sections[0], block_rows=61)
    np.testing.assert_allclose(blocks.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(blocks.std, whole.std, rtol=1e-3, atol=1e-5)


def test_same_seed_same_bits_and_the_global_state_is_left_alone(sections, fitted):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = tiny().fit(sections, RUN)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert np.array_equal(again.predict(sections[0]).mean, fitted.predict(sections[0]).mean)
    other = tiny().fit(sections, Run(seed=1, device="cpu"))
    assert not np.array_equal(other.predict(sections[0]).mean, fitted.predict(sections[0]).mean)


def test_round_trip(fitted, sections, tmp_path):
    loaded = load(fitted.save(tmp_path / "model"))
    for section in sections:
        ours, theirs = fitted.predict(section), loaded.predict(section)
        for name in ("mean", "std", "latent"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert np.array_equal(fitted.profiles, loaded.profiles)
    arrays, values = fitted.state()
    broken = tiny()
    broken.genes = ("a", "b")
    with pytest.raises(CheckpointError, match="rho"):
        broken.load_state(arrays, values)


def test_interrupted_fit_resumes_to_the_same_bits(sections, tmp_path, monkeypatch, interruptible):
    options = {"epochs": 4, "metagenes": 1, "max_metagenes": 4, "expansion": "split", "purge_interval": 2}
    straight = tiny(**options).fit(sections[:1], RUN)
    bound, calls = Generative.bound, []

    def stops(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return bound(self, *arguments, **keywords)

    run = replace(RUN, checkpoint_dir=tmp_path)
    monkeypatch.setattr(Generative, "bound", stops)
    with pytest.raises(KeyboardInterrupt, match="kept in"):
        tiny(**options).fit(sections[:1], run)
    monkeypatch.setattr(Generative, "bound", bound)
    resumed = tiny(**options).fit(sections[:1], run)
    assert np.array_equal(resumed.predict(sections[0]).mean, straight.predict(sections[0]).mean)
    assert not list(tmp_path.iterdir())


def test_batch_statistics_are_frozen_even_after_tests_of_the_metagenes(sections):
    def batches_seen(**options):
        model = tiny(epochs=4, expansion="split", purge_interval=1, **options).fit(sections[:1], RUN)
        norms = [m for m in model._generative.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) > 10
        return {int(norm.num_batches_tracked) for norm in norms}

    assert batches_seen(freeze_norm=0.5) == {2}
    assert batches_seen(freeze_norm=1.0) == {4}


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates_fall_along_half_a_cosine(sections, monkeypatch, anneal):
    step, seen = torch.optim.Adam.step, []

    def noted(self, *arguments, **keywords):
        if len(self.param_groups) == 3:  # not the fit that training starts from
            seen.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    tiny(epochs=4, lr=0.01, anneal=anneal).fit(sections[:1], RUN)
    share = 0.02 + 0.98 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2 if anneal else np.ones(4)
    np.testing.assert_allclose(seen, 0.01 * share[:, None] * [1, 2, 5], rtol=1e-6)


def test_order_of_the_cells_does_not_matter(fitted, sections):
    parts = sections[0].parts
    order = np.random.default_rng(0).permutation(parts.n_parts)
    shuffled = Parts(
        parts.ids[order],
        parts.coordinates[order],
        parts.share[:, order],
        colour=parts.colour[order],
        grid=parts.grid[order],
        size_um=parts.size_um,
        level=parts.level,
    )
    ours = fitted.predict(sections[0]).mean[order]
    np.testing.assert_allclose(fitted.predict(replace(sections[0], parts=shuffled)).mean, ours, rtol=1e-5)


def test_another_section_needs_no_counts_and_takes_no_effect(fitted, sections, make_parts):
    other = replace(make_parts("new", side=20, seed=9)[0], targets=None)
    assert np.isfinite(fitted.predict(other).mean).all()
    assert len(fitted._levels) == 2
    baselines = fitted._generative.baselines
    with torch.no_grad():
        baselines.effect_mean[0, 0] += 1.0
    try:
        changed = [fitted.predict(section).mean for section in (*sections, other)]
    finally:
        with torch.no_grad():
            baselines.effect_mean[0, 0] -= 1.0
    plain = [fitted.predict(section).mean for section in (*sections, other)]
    np.testing.assert_allclose(changed[0], plain[0] * np.e, rtol=1e-4)
    assert np.array_equal(changed[1], plain[1])
    assert np.array_equal(changed[2], plain[2])


def test_a_section_without_counts_has_no_effects(sections, make_parts):
    third = make_parts("blind", side=20, seed=2)[0]
    targets = third.require_targets()
    blind = replace(third, targets=replace(targets, counts=np.full(targets.shape, np.nan)))
    model = tiny().fit([blind, *sections], RUN)
    baselines = model._generative.baselines
    assert baselines.n_levels == len(model._levels) == 2
    before = [model.predict(section).mean for section in (blind, *sections)]
    with torch.no_grad():
        baselines.effect_mean[0, 1] += 1.0
    after = [model.predict(section).mean for section in (blind, *sections)]
    assert np.array_equal(after[0], before[0])
    assert np.array_equal(after[1], before[1])
    np.testing.assert_allclose(after[2], before[2] * np.e, rtol=1e-4)
    alone = tiny().fit([sections[0], blind], RUN)
    assert alone._generative.baselines.n_levels == 0


@pytest.mark.slow
def test_learns_what_colours_tell(make_parts):
    section, truth = make_parts(side=48, depth=60.0, seed=0)
    model = tiny(depth=3, width=8, patch=64, metagenes=6, epochs=50, steps_per_epoch=10).fit([section], RUN)
    predicted = model.predict(section).mean
    r = [np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(4)]
    assert np.mean(r) > 0.4
    assert 0.7 < predicted.sum() / truth.sum() < 1.4


# Rasters and patches


def random_slide(side=(24, 30), seed=0, n=4):
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(np.prod(side)), side[1])
    kept = rng.random(len(row)) < 0.9
    raster = Raster(rng.uniform(-0.9, 0.9, (3, *side)).astype(np.float32), row[kept], column[kept])
    centres = rng.uniform(5, 19, size=(n, 2))
    distance = np.hypot(*(np.stack([row, column])[:, kept, None] - centres.T[:, None]))
    share = sparse.csr_array(np.clip(3.5 - distance, 0, 1).T)
    return Slide.of(raster, share, rng.poisson(4, size=(n, 3)) + 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_symmetries_of_the_grid_keep_every_share(seed):
    slide = random_slide()
    rng = np.random.default_rng(seed)
    matrix = draw_matrix("exact", rng)
    size = fitting_size(slide.raster.shape, matrix, 100)
    assert sorted(size) == [24, 30]
    patch = take(slide, draw_view(slide.raster.shape, matrix, size, rng))
    np.testing.assert_allclose(np.sort(patch.image.flatten()), np.sort(slide.raster.image.ravel()), atol=1e-6)
    values = {tuple(c): s for c, s in zip(patch.counts.tolist(), patch.bags.size().tolist(), strict=True)}
    expected = dict(zip(map(tuple, slide.counts.tolist()), np.asarray(slide.labels.sum(axis=0)), strict=True))
    off_tissue = int((slide.cells == slide.labels.shape[0] - 1).sum())
    for counts, size_of in values.items():
        assert size_of == pytest.approx(off_tissue if sum(counts) == 0 else expected[counts], rel=1e-5)
    assert len(values) >= 4


@pytest.mark.parametrize("seed", range(5))
def test_published_patches_are_filled_by_the_raster(seed):
    slide = random_slide((40, 52))
    rng = np.random.default_rng(seed)
    matrix = draw_matrix("affine", rng)
    for wanted in (12, 200):
        size = fitting_size(slide.raster.shape, matrix, wanted)
        view = draw_view(slide.raster.shape, matrix, size, rng)
        at = view.positions()
        assert at.min() >= -1e-6
        assert (at.reshape(-1, 2).max(axis=0) <= np.array([39, 51]) + 1e-6).all()
        assert (size == (12, 12)) == (wanted == 12)
        np.testing.assert_allclose(view.inverse(at.reshape(-1, 2)).reshape(at.shape)[1, 2], [1, 2], atol=1e-9)
    assert 0.8 < abs(np.linalg.det(matrix)) < 1.2


def test_a_window_shows_its_pixels():
    slide = random_slide()
    patch = take(slide, View(np.eye(2), np.array([9.5, 11.5]), (10, 12)))
    np.testing.assert_allclose(patch.image.numpy(), slide.raster.image[:, 5:15, 6:18], atol=1e-6)


def test_a_spot_whose_other_half_lies_beyond_a_hole_is_cut():
    row, column = np.array([5, 12]), np.array([8, 8])
    raster = Raster(np.zeros((3, 20, 20), np.float32), row, column)
    slide = Slide.of(raster, sparse.csr_array(np.ones((1, 2))), np.ones((1, 1)))
    assert take(slide, View(np.eye(2), np.array([4.5, 9.5]), (10, 20))).counts.tolist() == [[0.0]]
    assert take(slide, View(np.eye(2), np.array([9.5, 9.5]), (20, 20))).counts.tolist() == [[1.0], [0.0]]


def test_jitter_keeps_the_range_and_none_keeps_the_image():
    image = torch.rand(3, 6, 6) * 1.8 - 0.9
    assert jittered(image, 0.0, np.random.default_rng(0)) is image
    changed = jittered(image, 0.05, np.random.default_rng(0))
    assert changed.abs().max() <= 0.9 + 1e-6
    assert 1e-3 < (changed - image).abs().mean() < 0.2


def test_glass_is_no_tissue(sections):
    section = sections[0]
    raster = Raster.of(section, Colours.fit([section]), 0.1)
    assert raster.shape == (24, 24)
    cells = raster.cells()
    assert (cells == 400).sum() == 24**2 - 400
    assert np.allclose(raster.image[:, cells == 400], 0.9)


def test_colour_scale_of_training_is_kept(fitted, sections):
    darker = replace(
        sections[0], parts=replace(sections[0].parts, colour=(sections[0].parts.colour * 0.5).astype(np.float32))
    )
    one = Raster.of(sections[0], fitted._colours, 0.0).image
    two = Raster.of(darker, fitted._colours, 0.0).image
    assert two.mean() < one.mean() - 0.1


# Tiles


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tiles_agree_with_the_whole(depth):
    torch.manual_seed(0)
    start = fit_start([np.ones((3, 2))], background=False, most_passes=1)
    model = Generative(Network(depth, 2, "batch"), Metagenes(2, 2, 2, 2), start, 0).eval()
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(90 * 83), 83)
    raster = Raster(rng.uniform(-0.9, 0.9, (3, 90, 83)).astype(np.float32), row, column)
    whole = activities(model, raster, 2, 0, tile=1000)
    assert len(list(tiles(raster.shape, 1000, depth))) == 1
    tiled = activities(model, raster, 2, 0, tile=20)
    assert len(list(tiles(raster.shape, 20, depth))) == 25
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-6)


def test_reach_bounds_the_receptive_field():
    torch.manual_seed(0)
    network = Network(3, 2, "batch").eval()
    image = torch.randn(1, 3, 161, 161, requires_grad=True)
    network.decode(network.features(image))[0, :, 80, 80].sum().backward()
    rows = torch.nonzero(image.grad.abs().sum(dim=(0, 1, 3))).flatten()
    assert 80 - reach(3) <= int(rows.min())
    assert int(rows.max()) <= 80 + reach(3)
    assert int(rows.max()) - int(rows.min()) > reach(3)  # and not a wasteful one


def test_noise_of_a_place_is_the_same_in_any_window():
    channels = [2, 4, 8]
    whole = field_noise(channels, (slice(0, 150), slice(0, 141)), 0, 1)
    part = field_noise(channels, (slice(40, 140), slice(64, 141)), 0, 1)
    assert [tuple(z.shape) for z in whole] == [(1, 2, 150, 141), (1, 4, 75, 71), (1, 8, 38, 36)]
    for level in range(3):
        top, left = 40 >> level, 64 >> level
        height, width = part[level].shape[-2:]
        assert torch.equal(part[level], whole[level][..., top : top + height, left : left + width])
    other = field_noise(channels, (slice(0, 150), slice(0, 141)), 0, 2)
    assert not torch.equal(other[0], whole[0])
    assert float(whole[0].std()) == pytest.approx(1, abs=0.02)


# Metagenes


def test_two_useless_copies_are_not_lost_together():
    change = drop_and_split([(0, 1)], [0, 1], [], 4)
    assert len(change.dropped) == 1
    assert change.forest == [1 - change.dropped[0]]


def test_forest_forgets_what_vanished_and_plants_what_is_new():
    change = drop_and_split([(0, (1, 2)), 3], [0, 1, 3, 4, 5], [0, 1, 4], 6)
    assert change.dropped == [3, 5]
    assert {0, 1, 4} <= {slot for tree in change.forest for slot in _leaves(tree)}


def _leaves(tree):
    return [tree] if isinstance(tree, int) else [slot for child in tree for slot in _leaves(child)]


def test_no_more_metagenes_than_slots():
    change = drop_and_split([0, 1, 2], [0, 1, 2], [0, 1, 2], 4)
    assert len(change.copies) == 1
    metagenes = Metagenes(4, 2, 3, 3)
    metagenes.apply_change(change)
    assert metagenes.slots == [0, 1, 2, 3]
    assert metagenes.forest == change.forest


def test_spares_are_kept_added_and_annealed():
    assert extra([0, 1, 2], [0], 6, 1) == Change(dropped=[2])
    assert extra([0], [0], 6, 2) == Change(added=[1, 2])
    assert extra([0, 1], [], 6, 0) == Change(dropped=[1])
    assert [spare(epoch, 4) for epoch in (0, 5000, 10_000, 20_000)] == [4, 2, 1, 1]
    assert [spare(epoch, 0) for epoch in (0, 5000, 5001, 10_000)] == [0, 0, 1, 1]


def test_useless_ones_go_until_all_are_useful(sections, monkeypatch):
    scores = {3: [0.0, 1.0, -1.0, 2.0], 2: [0.0, 1.0, -1.0], 1: [0.0]}
    monkeypatch.setattr(
        training_module, "scores_without_each", lambda model, *_: np.array(scores[len(model.metagenes.slots)])
    )
    model = tiny().fit(sections[:1], RUN)
    assert len(model.profiles) == 1
    scores[2] = [0.0, -1.0, -1.0]
    assert len(tiny().fit(sections[:1], RUN).profiles) == 2


def test_a_new_metagene_starts_anew_for_the_optimiser():
    metagenes = Metagenes(3, 2, 3, 2)
    optimizer = torch.optim.Adam(metagenes.parameters())
    (metagenes.logits(torch.randn(1, 2, 3, 3)).square().sum() + metagenes.profiles()[0].sum()).backward()
    optimizer.step()
    assert metagenes.mean[0] in optimizer.state
    metagenes.apply_change(Change(dropped=[0], copies=[(1, 0)]), optimizer)
    assert metagenes.mean[0] not in optimizer.state
    assert metagenes.mean[1] in optimizer.state
    assert torch.equal(metagenes.mean[0], metagenes.mean[1])


@pytest.mark.parametrize("strategy", ["split", "extra"])
def test_training_with_tests_of_the_metagenes_in_between(sections, strategy):
    options = {"expansion": strategy, "purge_interval": 1, "max_metagenes": 6, "final_purge": "extra"}
    model = tiny(epochs=4, **options).fit(sections[:1], RUN)
    assert 1 <= len(model.profiles) <= 6
    assert np.isfinite(model.predict(sections[0]).mean).all()


def test_group_norm(sections):
    model = tiny(norm="group").fit(sections[:1], RUN)
    mean = model.predict(sections[0]).mean
    assert np.isfinite(mean).all()
    assert np.array_equal(model.with_options(tile=4).predict(sections[0]).mean, mean)


def test_start_ignores_what_was_not_measured_and_genes_without_counts():
    counts = np.random.default_rng(0).poisson(6, size=(50, 3)).astype(float)
    counts[:, 2] = 0
    whole = fit_start([counts], background=False, most_passes=200)
    assert np.isfinite(whole.log_rate).all()
    half = counts.copy()
    half[:, 1] = np.nan
    known = fit_start([counts, half], background=False, most_passes=200)
    mean = known.scale * np.exp(known.log_rate + known.logits)
    assert mean[:2] == pytest.approx(counts[:, :2].mean(axis=0), rel=0.1)
    assert mean[2] < 0.5


# Bad input


def test_one_spot_and_genes_without_counts(make_parts):
    section = make_parts(side=12)[0]
    targets = section.require_targets()
    counts = targets.counts[:1].copy()
    counts[:, 0] = 0
    one = replace(
        section,
        ids=section.ids[:1],
        features=section.features[:1],
        coordinates=section.coordinates[:1],
        region=None,
        targets=replace(targets, counts=counts, library_size=targets.library_size[:1]),
        parts=replace(section.parts, share=section.parts.share[:1]),
    )
    assert np.isfinite(tiny().fit([one], RUN).predict(one).mean).all()


def test_spots_without_cells(make_parts):
    section = make_parts(side=12)[0]
    parts = section.parts
    half = parts.share.copy()
    half = sparse.csr_array(sparse.diags_array([0.0, *[1.0] * (half.shape[0] - 1)]) @ half)
    half.eliminate_zeros()
    model = tiny().fit([replace(section, parts=replace(parts, share=half))], RUN)
    assert np.isfinite(model.predict(section).mean).all()
    stored = parts.share.copy()
    stored.data[: stored.indptr[1]] = 0.0
    zero = tiny().fit([replace(section, parts=replace(parts, share=stored))], RUN)
    assert zero.history == model.history  # a share of 0 is none
    assert (stored.data == 0).sum() == stored.indptr[1]  # and the user's matrix is left alone
    none = replace(section, parts=replace(parts, share=sparse.csr_array(parts.share.shape)))
    with pytest.raises(DataValueError, match="no spot holds any"):
        tiny().fit([none], RUN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: np.where(np.arange(c.size).reshape(c.shape) == 3, np.nan, c), "some spots only"),
        (lambda c: c - 1000.0, "negative"),
        (lambda c: c * 0.0, "nothing to learn"),
    ],
)
def test_counts_that_cannot_be_used(sections, change, message):
    targets = sections[0].require_targets()
    bad = replace(sections[0], targets=replace(targets, counts=change(targets.counts.astype(float))))
    with pytest.raises(DataValueError, match=message):
        tiny().fit([bad], RUN)


def test_parts_that_cannot_be_used(sections, fitted, make_parts):
    section = sections[0]
    parts = section.parts

    def with_parts(**changes):
        return replace(section, parts=replace(parts, **changes))

    colour = parts.colour.copy()
    colour[3, 1] = np.nan
    with pytest.raises(DataValueError, match="NaN"):
        tiny().fit([with_parts(colour=colour)], RUN)
    with pytest.raises(DataValueError, match="rgb"):
        fitted.predict(with_parts(colour=None))
    with pytest.raises(DataValueError, match=r"pp\.superpixels"):
        fitted.predict(with_parts(grid=None))
    with pytest.raises(DataValueError, match="one place"):
        fitted.predict(with_parts(grid=np.zeros_like(parts.grid)))
    with pytest.raises(DataValueError, match="no parts"):
        fitted.predict(replace(section, parts=None))
    with pytest.raises(ModelMismatchError, match="size_um=8"):
        fitted.predict(with_parts(size_um=16.0))
    with pytest.raises(DataValueError, match="of one size"):
        tiny().fit([section, replace(with_parts(size_um=16.0), name="other")], RUN)
    with pytest.raises(ModelMismatchError, match="not fitted"):
        tiny().predict(section)
    with pytest.raises(DataValueError, match="lower depth"):
        tiny(depth=5).fit([section], RUN)
    nuclei = make_parts(side=12, level="nucleus")[0]
    with pytest.raises(DataValueError, match="grid"):
        tiny().fit([nuclei], RUN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"unit": "log1p_cp10k"}, "unit"),
        ({"lr": 0.0}, "lr"),
        ({"metagenes": 9, "max_metagenes": 8}, "max_metagenes"),
        ({"patch": 4, "depth": 5}, "patch=4"),
        ({"patch": 8, "depth": 4}, "at least 16"),
        ({"colour_jitter": 0.7}, "colour_jitter"),
        ({"latent_sd": 0.0}, "latent_sd"),
        ({"warm_up": 1.5}, "warm_up"),
        ({"freeze_norm": -0.1}, "freeze_norm"),
        ({"margin": -1.0}, "margin"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(DataValueError, match=message):
        XFuseConfig(**options)


def test_presets_and_options_of_prediction(fitted):
    for name in XFuse.info.presets:
        assert XFuse.preset(name).unit == "counts"
    with pytest.raises(DataValueError, match="'paper'"):
        XFuse.preset("large")
    with pytest.raises(DataValueError, match="depth"):
        fitted.with_options(depth=3)


def test_profiles_start_at_what_tells_clusters_of_spots_apart():
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1], 30)
    rate = np.array([[20.0, 5.0, 10.0, 10.0], [5.0, 20.0, 10.0, 10.0]])
    counts = rng.poisson(rate[kind]).astype(float)
    profiles = cluster_profiles([counts[:40], counts[40:]], 2, seed=0)
    overall = np.log(counts.sum(axis=0) / counts.sum())
    expected = np.log(rate / rate.sum(axis=1, keepdims=True)) - overall
    order = np.argsort(-profiles[:, 0])
    np.testing.assert_allclose(profiles[order], expected, atol=0.15)
    unmeasured = counts.copy()
    unmeasured[:, 3] = np.nan
    partly = cluster_profiles([counts, unmeasured], 2, seed=0)
    np.testing.assert_allclose(partly[np.argsort(-partly[:, 0])], expected, atol=0.2)
    assert cluster_profiles([counts[:1]], 3, seed=0).shape == (3, 4)
    alike = np.outer([1.0, 2.0, 5.0], counts[0])  # of one composition: one cluster, and no warning of another
    np.testing.assert_allclose(cluster_profiles([alike], 3, seed=0), 0, atol=1e-5)


def test_equal_start_is_that_of_the_published(sections):
    model = tiny(start_profiles="equal")
    model._levels, model._colours, model.genes = (), Colours.fit(sections), ("a", "b", "c", "d")
    started = model._start([model._slide(sections[0])], 0)
    mean, sd = started.metagenes.profiles()
    assert not mean.any()
    torch.testing.assert_close(sd, torch.full_like(sd, 0.01))
    assert not started.baselines.log_tau.any()


def test_more_samples_than_fit_are_refused_before_any_is_drawn(fitted, sections, monkeypatch):
    each = 4 * sections[0].parts.n_parts * len(fitted.genes)
    monkeypatch.setattr("hespotex.models._samples.available_bytes", lambda: 2 * 3 * each)
    kept = fitted.with_options(keep_samples=True, n_samples=4)
    with pytest.raises(DataValueError, match="memory allows n_samples=3"):
        kept.predict(sections[0])
    assert fitted.with_options(n_samples=4).predict(sections[0]).samples is None


def test_more_draws_than_fit_are_refused_before_any_is_drawn(fitted, sections, monkeypatch):
    each = 4 * sections[0].parts.n_parts * len(fitted.profiles)
    monkeypatch.setattr("hespotex.models.xfuse.inference.available_bytes", lambda: 3 * each)
    assert fitted.with_options(n_samples=3).predict(sections[0]).std is not None
    with pytest.raises(DataValueError, match="n_samples=4: .* memory allows n_samples=3"):
        fitted.with_options(n_samples=4).predict(sections[0])
    monkeypatch.setattr("hespotex.models.xfuse.inference.available_bytes", lambda: None)
    assert fitted.with_options(n_samples=4).predict(sections[0]).std is not None


def test_mean_and_spread_of_draws_seen_one_at_a_time():
    draws = np.random.default_rng(0).gamma(2.0, 1e3, size=(7, 5, 3)).astype(np.float32)
    mean, std = mean_and_std(iter(draws))
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, draws.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, draws.std(axis=0, ddof=1, dtype=np.float64), rtol=1e-6)


def test_a_single_draw_has_no_spread(fitted, sections):
    assert fitted.with_options(n_samples=1).predict(sections[0]).std is None
