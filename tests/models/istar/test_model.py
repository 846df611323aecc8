from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex import models
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import Run
from hespotex.models.istar import model as istar_model
from hespotex.models.istar.features import HIPT_BOXES, SmoothedRows, shift_ensemble, smoothed

CPU = Run(seed=1, device="cpu")
TINY = {"epochs": 2, "n_members": 2, "width": 16, "n_layers": 2}


def correlation(a, b):
    return [np.corrcoef(a[:, g], b[:, g])[0, 1] for g in range(a.shape[1])]


def chosen(section, rows):
    """The section with only some of its spots."""
    targets = section.targets
    return replace(
        section,
        ids=section.ids[rows],
        features=section.features[rows],
        coordinates=section.coordinates[rows],
        region=section.region[rows],
        targets=replace(targets, counts=targets.counts[rows], library_size=targets.library_size[rows]),
        parts=replace(section.parts, share=section.parts.share[rows]),
    )


@pytest.fixture(scope="module")
def learnt(make_parts):
    section, truth = make_parts(side=32)
    model = models.create("istar", n_members=2, width=64, n_layers=2, epochs=25).fit([section], CPU)
    return model, section, truth


def test_finds_the_truth_below_the_spots(learnt, make_parts):
    model, section, truth = learnt
    predicted = model.predict(section)
    assert min(correlation(predicted.mean, truth)) > 0.8
    assert (predicted.level, predicted.unit) == ("superpixel", "counts")
    assert predicted.latent is None
    assert (predicted.std >= 0).all()
    other, truth = make_parts("other", side=32, seed=4)
    assert min(correlation(model.predict(other).mean, truth)) > 0.7
    assert [row["epoch"] for row in model.history] == list(range(1, 26))
    assert model.history[-1]["loss"] < model.history[0]["loss"]


def test_sums_over_spots_are_the_counts_expected(learnt):
    model, section, _ = learnt
    expected = section.parts.share @ model.predict(section).mean
    assert expected.sum() == pytest.approx(section.targets.counts.sum(), rel=0.05)
    assert min(correlation(expected, section.targets.counts)) > 0.9


def test_nuclei_are_parts_too(make_parts):
    section, truth = make_parts(side=40, level="nucleus", radius_um=18)
    model = models.create("istar", n_members=2, width=64, n_layers=2, epochs=25).fit([section], CPU)
    predicted = model.predict(section)
    assert predicted.level == "nucleus"
    assert min(correlation(predicted.mean, truth)) > 0.6
    with pytest.raises(DataValueError, match="no grid"):
        models.create("istar", preset="paper").fit([section], CPU)


def test_blocks_latents_and_aggregates(make_parts):
    section, _ = make_parts(side=20)
    model = models.create("istar", **{**TINY, "n_members": 3}).fit([section], CPU)
    whole = model.predict(section)
    np.testing.assert_allclose(model.predict(section, block_rows=37).mean, whole.mean, rtol=1e-5)
    for latent, width in (("first", 16), ("concatenate", 48), ("median", 16)):
        assert model.with_options(latent=latent).predict(section).latent.shape == (400, width)
    median = model.with_options(aggregate="median").predict(section)
    assert not np.array_equal(median.mean, whole.mean)
    np.testing.assert_allclose(median.mean, whole.mean, rtol=0.5)
    alone = models.create("istar", **{**TINY, "n_members": 1}).fit([section], CPU).predict(section)
    assert alone.std is None
    with pytest.raises(DataValueError, match="epochs"):
        model.with_options(epochs=3)


@pytest.mark.parametrize(
    "options", [{}, {"loss": "nb", "standardize": "global"}, {"loss": "mse", "pooling": "disc", "standardize": "none"}]
)
def test_saved_and_loaded_it_predicts_the_same_bits(make_parts, tmp_path, options):
    section, _ = make_parts(side=20)
    model = models.create("istar", **{**TINY, **options}).fit([section], CPU)
    again = models.load(model.save(tmp_path / "model"))
    first, second = model.predict(section), again.predict(section)
    np.testing.assert_array_equal(first.mean, second.mean)
    np.testing.assert_array_equal(first.std, second.std)
    assert again.seeds == model.seeds
    assert again.unit == "counts"


def test_same_seed_same_bits_whatever_the_order_of_spots(make_parts):
    section, _ = make_parts(side=20)
    torch.manual_seed(123)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def predicted(section, seed=1):
        return models.create("istar", **TINY).fit([section], Run(seed=seed, device="cpu")).predict(section).mean

    first = predicted(section)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(first, predicted(section))
    order = np.random.default_rng(0).permutation(section.n_obs)
    np.testing.assert_array_equal(first, predicted(chosen(section, order)))
    assert not np.array_equal(first, predicted(section, seed=2))


def test_the_unit_asked_for_does_not_matter(make_parts):
    section, _ = make_parts(side=20)
    logs = replace(section, targets=section.targets.in_unit("log1p_cp10k"))
    first, second = (models.create("istar", **TINY).fit([each], CPU) for each in (section, logs))
    assert second.unit == "counts"
    np.testing.assert_array_equal(first.predict(section).mean, second.predict(section).mean)


def test_units_of_features_do_not_matter_once_standardised(make_parts):
    section, _ = make_parts(side=20)
    shifted = replace(section, parts=replace(section.parts, features=4 * section.parts.features + 8))
    for standardize in ("section", "global"):
        first, second = (
            models.create("istar", **TINY, standardize=standardize).fit([each], CPU).predict(each).mean
            for each in (section, shifted)
        )
        np.testing.assert_allclose(first, second, rtol=1e-3)
    model = models.create("istar", **TINY).fit([section], CPU)
    np.testing.assert_allclose(model.predict(shifted).mean, model.predict(section).mean, rtol=1e-3)


def test_sections_of_unequal_depth(make_parts):
    shallow, truth = make_parts("shallow", side=24)
    deep, _ = make_parts("deep", side=24, seed=2, depth=300)
    model = models.create("istar", n_members=1, width=32, n_layers=2, epochs=20).fit([shallow, deep], CPU)
    predicted = model.predict(shallow)
    assert min(correlation(predicted.mean, truth)) > 0.6
    total = (shallow.parts.share @ predicted.mean).sum() / shallow.targets.counts.sum()
    assert 2 < total < 5  # at the mean depth, the root of 10 above that of the shallow one
    empty = replace(
        deep, targets=replace(deep.targets, counts=deep.targets.counts * 0, library_size=np.zeros(deep.n_obs))
    )
    with pytest.raises(DataValueError, match="'deep'|of deep"):
        models.create("istar", **TINY).fit([shallow, empty], CPU)


def test_interrupted_fit_goes_on(make_parts, tmp_path, monkeypatch):
    section, _ = make_parts(side=20)
    reference = models.create("istar", **TINY).fit([section], CPU)
    run, original = Run(seed=1, device="cpu", checkpoint_dir=tmp_path), istar_model.fit_lightning

    def interrupted(*args, name, **options):
        if name == "istar-2":
            raise KeyboardInterrupt
        return original(*args, name=name, **options)

    monkeypatch.setattr(istar_model, "fit_lightning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.create("istar", **TINY).fit([section], run)
    assert list(tmp_path.glob("*.ckpt"))
    monkeypatch.setattr(istar_model, "fit_lightning", original)
    resumed = models.create("istar", **TINY).fit([section], run)
    np.testing.assert_array_equal(resumed.predict(section).mean, reference.predict(section).mean)
    assert not list(tmp_path.iterdir())


def test_features_of_hipt_are_smoothed_over_what_is_there(make_parts):
    section, _ = make_parts(side=20)
    grid = section.parts.grid
    values = np.random.default_rng(0).normal(size=(400, 579)).astype(np.float32)
    rows = smoothed(values, grid, "centred")
    assert isinstance(rows, SmoothedRows)
    assert rows.boxes == HIPT_BOXES
    whole = rows[:]
    np.testing.assert_array_equal(whole[:, 576:], values[:, 576:])
    at = 20 * 10 + 10
    local = values.reshape(20, 20, 579)[8:13, 8:13, 192:576].mean(axis=(0, 1))
    np.testing.assert_allclose(whole[at, 192:576], local, atol=1e-5)
    np.testing.assert_allclose(rows[slice(100, 137)], whole[100:137], atol=1e-5)
    np.testing.assert_allclose(rows[np.array([399, 0])], whole[[399, 0]], atol=1e-5)
    assert rows[slice(0, 0)].shape == (0, 579)
    kept = np.random.default_rng(1).random(400) > 0.3
    ones = SmoothedRows(np.ones((kept.sum(), 579)), grid[kept] + [4, -9])
    np.testing.assert_allclose(ones[:], 1, rtol=1e-5)
    for other in (values[:, :40], values[:, :576]):  # as wide as the last map of MobileNetV3
        assert smoothed(other, grid, "centred") is other
    assert smoothed(values, None, "centred") is values
    assert smoothed(values, grid, "none") is values


def test_few_spots_empty_genes_and_spots_without_parts(make_parts):
    section, _ = make_parts(side=20)
    one = chosen(section, np.array([5]))
    assert np.isfinite(models.create("istar", **TINY).fit([one], CPU).predict(one).mean).all()
    paper = models.create("istar", preset="paper", **TINY).fit([one], CPU)
    assert np.isfinite(paper.predict(one).mean).all()
    counts = np.array(section.targets.counts)
    counts[:, 0] = 0
    empty = replace(section, targets=replace(section.targets, counts=counts))
    for loss in ("poisson", "nb", "mse"):
        predicted = models.create("istar", **TINY, loss=loss).fit([empty], CPU).predict(empty).mean
        assert (predicted[:, 0] == 0).all()
        assert (predicted[:, 1:] > 0).any()
    share = section.parts.share.tolil()
    share[:3] = 0
    bare = replace(section, parts=replace(section.parts, share=share.tocsr()))
    rest = chosen(bare, np.arange(3, bare.n_obs))
    first, second = (models.create("istar", **TINY).fit([each], CPU).predict(section).mean for each in (bare, rest))
    np.testing.assert_array_equal(first, second)
    nowhere = replace(bare.parts, share=sparse.csr_array(bare.parts.share.shape))
    with pytest.raises(DataValueError, match="no spot holds any"):
        models.create("istar", **TINY).fit([replace(bare, parts=nowhere)], CPU)


def test_bad_input(make_parts, make_section):
    section, _ = make_parts(side=20)
    features = section.parts.features.copy()
    features[7, 2] = np.nan
    holed = replace(section, parts=replace(section.parts, features=features))
    with pytest.raises(DataValueError, match="NaN or infinite"):
        models.create("istar", **TINY).fit([holed], CPU)
    model = models.create("istar", **TINY).fit([section], CPU)
    with pytest.raises(DataValueError, match="NaN or infinite"):
        model.predict(holed)
    with pytest.raises(DataValueError, match="no parts"):
        models.create("istar").fit([make_section()], CPU)
    with pytest.raises(ModelMismatchError, match="3 features per part"):
        model.predict(replace(section, parts=replace(section.parts, features=features[:, :3])))
    line = replace(section.parts, coordinates=section.parts.coordinates * [1, 0], grid=section.parts.grid)
    with pytest.raises(DataValueError, match="one row"):
        models.create("istar", preset="paper", **TINY).fit([replace(section, parts=line)], CPU)
    with pytest.raises(DataValueError, match="more than 256"):
        shift_ensemble(np.zeros((256, 512, 3), np.uint8), lambda part: [], legacy=True)
    with pytest.raises(DataValueError, match="pad_white"):
        shift_ensemble(np.zeros((250, 512, 3), np.uint8), lambda part: [])


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "log1p_cp10k"},
        {"standardize": "yes"},
        {"smooth": "odd"},
        {"pooling": "max"},
        {"loss": "mae"},
        {"depth": "spot"},
        {"aggregate": "max"},
        {"latent": "all"},
        {"width": 0},
        {"n_layers": 0},
        {"epochs": 0},
        {"lr": 0},
        {"n_members": 0},
        {"batch": 0},
        {"weight_decay": -1},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("istar", **options)
    with pytest.raises(DataValueError, match="'small'"):
        models.create("istar", preset="small")
