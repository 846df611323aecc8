from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex import models
from hespotex.errors import DataValueError, HespotexWarning
from hespotex.models import Recipe, Run
from hespotex.models.bleep import BLEEP, contrastive_loss, retrieve

CPU = Run(seed=1, device="cpu")
QUICK = {"width": 16, "max_epochs": 3}


def test_paper_preset_has_the_published_settings():
    config = BLEEP.preset("paper")
    published = {
        "width": 256,
        "dropout": 0.1,
        "temperature": 1.0,
        "lr": 1e-3,
        "weight_decay": 1e-3,
        "batch": 256,
        "max_epochs": 4,
        "stopping": "random",
        "retrieved": 50,
        "answer": "average",
        "standardize": "none",
        "scale_genes": False,
    }
    assert {name: getattr(config, name) for name in published} == published
    assert config.gene_selection == {"method": "hvg", "n_top": 1000, "min_spots_fraction": 0.0}
    with pytest.raises(DataValueError, match="'default', 'paper'"):
        BLEEP.preset("small")


def test_loss_is_the_soft_cross_entropy_by_hand():
    rng = np.random.default_rng(0)
    image, expression = rng.normal(size=(2, 5, 3)).astype(np.float32)

    def log_softmax(values):
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    logits = expression @ image.T / 2
    targets = np.exp(log_softmax((image @ image.T + expression @ expression.T) / 4))
    both = -(targets * log_softmax(logits)).sum(axis=1) - (targets.T * log_softmax(logits.T)).sum(axis=1)
    found = contrastive_loss(torch.from_numpy(image), torch.from_numpy(expression), 2.0)
    np.testing.assert_allclose(found, both.mean() / 2, rtol=1e-5)


@pytest.mark.parametrize("block", [3, 7, 100])
def test_retrieval_is_exact_in_any_blocks(block, monkeypatch):
    monkeypatch.setattr("hespotex.models.bleep._BANK_ROWS", block)
    rng = np.random.default_rng(0)
    query, keys = rng.normal(size=(11, 4)).astype(np.float32), rng.normal(size=(40, 4)).astype(np.float32)
    cosine = (query @ keys.T) / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(keys, axis=1)
    expected = np.argsort(-cosine, axis=1)[:, :6]
    found, weights = retrieve(torch.from_numpy(query), torch.from_numpy(keys), 6, "average")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(weights, 1 / 6)
    found, weights = retrieve(torch.from_numpy(query), torch.from_numpy(keys), 6, "simple")
    np.testing.assert_array_equal(found, expected[:, :1])
    assert (weights == 1).all()
    found, weights = retrieve(torch.from_numpy(query), torch.from_numpy(keys), 6, "weighted")
    squared = ((query[:, None] - keys[expected]) ** 2).sum(axis=2)
    by_hand = np.exp(-(squared - squared.min(axis=1, keepdims=True) + 1))
    np.testing.assert_allclose(weights, by_hand / by_hand.sum(axis=1, keepdims=True), rtol=1e-4)


def test_equal_keys_are_taken_in_order_and_few_keys_all():
    keys = torch.ones(5, 2)
    assert retrieve(torch.ones(1, 2), keys, 3, "average")[0].tolist() == [[0, 1, 2]]
    assert retrieve(torch.ones(1, 2), keys, 50, "average")[0].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_each_epoch_contrasts_other_spots(preset, trio, monkeypatch):
    from hespotex.models import bleep

    seen, original = [], bleep.fit_lightning

    def watched(module, items, run, **options):
        seen.append((items, options["visit"]))
        return original(module, items, run, **options)

    monkeypatch.setattr(bleep, "fit_lightning", watched)
    models.create("bleep", preset=preset, **QUICK, batch=32).fit(trio, CPU)
    for items, visit in seen:
        epochs = [[frozenset(items[number].tolist()) for number in visit(epoch)] for epoch in range(2)]
        assert frozenset().union(*epochs[0]) == frozenset().union(*epochs[1])
        assert not set(epochs[0]) & set(epochs[1])


@pytest.mark.parametrize("stopping", ["inner", "random"])
def test_epochs_are_judged_in_blocks_of_queries(stopping, trio, monkeypatch):
    from hespotex.models import bleep

    reference = models.create("bleep", **QUICK, stopping=stopping, batch=32).fit(trio, CPU)
    sizes = []

    def watched(query, *args):
        sizes.append(len(query))
        return retrieve(query, *args)

    monkeypatch.setattr(bleep, "retrieve", watched)
    monkeypatch.setattr(bleep, "_QUERY_ROWS", 7)
    blocks = models.create("bleep", **QUICK, stopping=stopping, batch=32).fit(trio, CPU)
    assert max(sizes) == 7
    for name in ("val_loss", "val_pearson"):
        curves = [[row[name] for row in model.history] for model in (reference, blocks)]
        np.testing.assert_allclose(*curves, rtol=1e-3)


def test_few_spots_are_warned_about(trio, make_planted):
    model = models.create("bleep", **QUICK).fit(trio, CPU)
    with pytest.warns(HespotexWarning, match="relative to their mean"):
        assert np.isfinite(model.predict(make_planted("few", n=3)).mean).all()


def test_recovers_a_planted_signal_on_a_new_section(make_planted):
    sections = [make_planted(f"s{i}", 250, seed=i, group=f"p{i}") for i in range(3)]
    test = make_planted("new", 200, seed=9)
    model = models.create("bleep", width=32, max_epochs=12, lr=5e-3, batch=128, retrieved=10).fit(sections, CPU)
    predicted, measured = model.predict(test).mean, test.targets[:]
    r = [np.corrcoef(predicted[:, g], measured[:, g])[0, 1] for g in range(4)]
    assert min(r) > 0.7
    best = max(model.history, key=lambda row: row["val_pearson"])
    assert model.epochs == best["epoch"]
    assert model.scores["inner_pearson"] == pytest.approx(best["val_pearson"])


def test_answers_are_those_of_training_spots(trio, make_planted):
    test, bank = make_planted("new", seed=7), np.concatenate([section.targets[:] for section in trio])
    model = models.create("bleep", **QUICK).fit(trio, CPU)
    nearest = model.with_options(answer="simple").predict(test).mean
    assert {tuple(row) for row in nearest} <= {tuple(row) for row in bank}
    whole = model.with_options(retrieved=1000).predict(test).mean
    np.testing.assert_allclose(whole, np.broadcast_to(bank.mean(axis=0), whole.shape), rtol=1e-4)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_measured_expression_of_the_section_changes_nothing(preset, trio, make_planted):
    model = models.create("bleep", preset=preset, **QUICK).fit(trio, CPU)
    test = make_planted("new", seed=7)
    noise = np.random.default_rng(0).poisson(5, size=test.targets.shape)
    scrambled = replace(test, targets=replace(test.targets, counts=noise))
    np.testing.assert_array_equal(model.predict(test).mean, model.predict(scrambled).mean)
    np.testing.assert_array_equal(model.predict(test).mean, model.predict(replace(test, targets=None)).mean)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_saved_and_loaded_it_predicts_the_same_bits(preset, trio, make_planted, tmp_path):
    model = models.create("bleep", preset=preset, **QUICK).fit(trio, CPU)
    model.recipe = Recipe(genes=model.genes, unit=model.unit, n_features=model.n_features)
    model.save(tmp_path / "m")
    loaded, test = models.load(tmp_path / "m"), make_planted("new", seed=7)
    np.testing.assert_array_equal(loaded.predict(test).mean, model.predict(test).mean)
    assert loaded.epochs == model.epochs


def test_same_seed_same_bits_and_blocks_agree(trio, make_planted, reordered):
    test = make_planted("new", seed=7)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (models.create("bleep", **QUICK).fit(trio, CPU) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(first.predict(test).mean, second.predict(test).mean)
    other = models.create("bleep", **QUICK).fit(trio, Run(seed=2, device="cpu"))
    assert not np.array_equal(other.predict(test).mean, first.predict(test).mean)
    blocks = list(first.predict_blocks(test, block_rows=30))
    assert [len(block.ids) for block in blocks] == [30, 30, 20]
    np.testing.assert_allclose(np.concatenate([block.mean for block in blocks]), first.predict(test).mean, atol=1e-4)
    turned = reordered(test)
    by_id = dict(zip(turned.ids, first.predict(turned).mean, strict=True))
    np.testing.assert_allclose([by_id[name] for name in test.ids], first.predict(test).mean, atol=1e-4)


def test_few_spots_zero_genes_and_nan(make_planted, trio):
    one = make_planted(n=1)
    model = models.create("bleep", **QUICK).fit([one], CPU)
    np.testing.assert_allclose(model.predict(make_planted("new", seed=7)).mean, np.repeat(one.targets[:], 80, axis=0))
    silent = [replace(s, targets=replace(s.targets, counts=s.targets.counts * [1, 0, 1, 1])) for s in trio]
    predicted = models.create("bleep", **QUICK).fit(silent, CPU).predict(trio[0]).mean
    assert (predicted[:, 1] == 0).all()
    features = trio[0].features.copy()
    features[3, 2] = np.nan
    with pytest.raises(DataValueError, match=r"section 's0' has features that are NaN"):
        models.create("bleep", **QUICK).fit([replace(trio[0], features=features), *trio[1:]], CPU)
    counts = np.array(trio[0].targets.counts)
    counts[0, 0] = np.nan
    with pytest.raises(DataValueError, match="measured expression"):
        models.create("bleep", **QUICK).fit([replace(trio[0], targets=replace(trio[0].targets, counts=counts))], CPU)


def test_interrupted_fit_goes_on_and_cleans_up(trio, tmp_path, monkeypatch):
    from hespotex.models import bleep

    reference = models.create("bleep", **QUICK).fit(trio, CPU)
    run, original = replace(CPU, checkpoint_dir=tmp_path), bleep.fit_lightning

    def interrupted(*args, name, **options):
        if name == "bleep-final":
            raise KeyboardInterrupt
        return original(*args, name=name, **options)

    monkeypatch.setattr(bleep, "fit_lightning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.create("bleep", **QUICK).fit(trio, run)
    assert list(tmp_path.glob("*.ckpt"))
    monkeypatch.setattr(bleep, "fit_lightning", original)
    resumed = models.create("bleep", **QUICK).fit(trio, run)
    np.testing.assert_array_equal(resumed.predict(trio[0]).mean, reference.predict(trio[0]).mean)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"batch": 0},
        {"max_epochs": 0},
        {"retrieved": 0},
        {"dropout": 1.0},
        {"temperature": 0},
        {"lr": 0},
        {"weight_decay": -1},
        {"answer": "median"},
        {"stopping": "never"},
        {"standardize": "spot"},
        {"unit": "tpm"},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("bleep", **options)
