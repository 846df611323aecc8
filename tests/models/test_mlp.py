from __future__ import annotations

import numpy as np
import pytest

from hespotex import models
from hespotex.errors import DataValueError
from hespotex.models import Run

CPU = Run(seed=1, device="cpu")


def test_learns_what_no_line_can(make_planted):
    from dataclasses import replace

    def squared(section):
        return replace(section, targets=replace(section.targets, counts=section.features[:, :4] ** 2))

    sections = [squared(make_planted(f"s{i}", 300, seed=i, group=f"p{i}")) for i in range(3)]
    test = squared(make_planted("new", 200, seed=9))
    model = models.create("mlp", hidden=[64], dropout=0.0, lr=1e-2, max_epochs=40).fit(sections, CPU)
    predicted, measured = model.predict(test).mean, test.targets[:]
    r = [np.corrcoef(predicted[:, g], measured[:, g])[0, 1] for g in range(4)]
    assert min(r) > 0.8
    assert 1 <= model.epochs <= 40
    assert [row["epoch"] for row in model.history] == list(range(1, len(model.history) + 1))
    assert {"loss", "val_loss", "val_pearson"} <= set(model.history[0])
    best = max(model.history, key=lambda row: row["val_pearson"])
    assert model.epochs == best["epoch"]


def test_same_seed_same_bits_and_global_state_untouched(trio):
    import torch

    def fitted(seed):
        return (
            models.create("mlp", hidden=[8], max_epochs=3).fit(trio, Run(seed=seed, device="cpu")).predict(trio[0]).mean
        )

    torch.manual_seed(123)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = fitted(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(first, fitted(1))
    assert not np.array_equal(first, fitted(2))


def test_too_few_observations_to_stop_by(make_planted):
    model = models.create("mlp", max_epochs=2).fit([make_planted(n=3)], CPU)
    assert model.epochs == 2
    assert np.isfinite(model.predict(make_planted(n=1)).mean).all()


def test_interrupted_fit_goes_on_and_cleans_up(trio, tmp_path, monkeypatch):
    from hespotex.models import mlp

    reference = models.create("mlp", hidden=[8], max_epochs=6).fit(trio, CPU)
    run = Run(seed=1, device="cpu", checkpoint_dir=tmp_path)
    original = mlp.fit_lightning

    def interrupted(*args, name, **options):
        if name == "mlp-final":
            raise KeyboardInterrupt
        return original(*args, name=name, **options)

    monkeypatch.setattr(mlp, "fit_lightning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.create("mlp", hidden=[8], max_epochs=6).fit(trio, run)
    assert list(tmp_path.glob("*.ckpt"))
    monkeypatch.setattr(mlp, "fit_lightning", original)
    resumed = models.create("mlp", hidden=[8], max_epochs=6).fit(trio, run)
    np.testing.assert_array_equal(resumed.predict(trio[0]).mean, reference.predict(trio[0]).mean)
    assert resumed.history == reference.history
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": [0]},
        {"dropout": 1.0},
        {"lr": 0},
        {"weight_decay": -1},
        {"batch": 0},
        {"max_epochs": 0},
        {"patience": 0},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("mlp", **options)
