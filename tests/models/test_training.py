from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hespotex._optional import ensure_torchvision
from hespotex.errors import DataValueError, HespotexWarning
from hespotex.models import Run
from hespotex.models._training import fit_lightning, forget_checkpoints

ensure_torchvision()
import lightning.pytorch as pl  # noqa: E402

CPU = Run(seed=3, device="cpu")


class Regression(pl.LightningModule):
    """Linear regression with dropout, so that random numbers matter; can be told to stop in an epoch."""

    interrupt_in: int | None = None

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(4, 2))
        self.steps: list[tuple[int, float]] = []

    def training_step(self, item: Any, batch_idx: int) -> Any:
        if self.current_epoch == type(self).interrupt_in and batch_idx == 1:
            raise KeyboardInterrupt
        self.steps.append((self.current_epoch, float(item[0][0, 0])))
        loss = ((self.net(item[0]) - item[1]) ** 2).mean()
        return {"loss": loss, "twice": 2 * loss}

    def validation_step(self, item: Any, batch_idx: int) -> Any:
        return {"loss": ((self.net(item[0]) - item[1]) ** 2).mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.fixture
def items() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 2, generator=generator)
    xs = [torch.randn(12, 4, generator=generator) for _ in range(4)]
    return [(x, x @ weights + 0.5 * torch.randn(12, 2, generator=generator)) for x in xs]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_learns_and_reports(items):
    module = Regression()
    fit = fit_lightning(module, items, CPU, max_epochs=40)
    assert [row["epoch"] for row in fit.history] == list(range(1, 41))
    assert fit.history[-1]["loss"] < 0.5 * fit.history[0]["loss"]
    assert fit.history[0]["twice"] == pytest.approx(2 * fit.history[0]["loss"])
    assert fit.best_epoch == 40
    assert np.isnan(fit.best_score)
    assert not module.training


def test_best_weights_are_restored_and_training_stops(items):
    module = Regression(lr=0.5)
    fit = fit_lightning(module, items[:2], CPU, max_epochs=60, validation=items[2:], monitor="val_loss", patience=5)
    values = [row["val_loss"] for row in fit.history]
    assert fit.best_epoch == int(np.argmin(values)) + 1
    assert fit.best_score == min(values)
    assert len(values) == min(fit.best_epoch + 5, 60)
    with torch.no_grad():
        again = float(np.mean([((module.net(x) - y) ** 2).mean() for x, y in items[2:]]))
    assert again == pytest.approx(fit.best_score, rel=1e-6)


def test_high_values_can_be_good_and_validation_can_be_rare(items):
    fit = fit_lightning(
        Regression(),
        items[:2],
        CPU,
        max_epochs=6,
        validation=items[2:],
        monitor="val_loss",
        mode="max",
        validate_every=3,
    )
    assert [("val_loss" in row) for row in fit.history] == [False, False, True, False, False, True]
    assert fit.best_epoch in (3, 6)
    assert fit.best_score == max(row["val_loss"] for row in fit.history if "val_loss" in row)


def test_same_seed_same_weights_and_nothing_global_changes(items, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler, environment = signal.getsignal(signal.SIGINT), dict(os.environ)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    one, other, third = Regression(), Regression(), Regression()
    fit_lightning(one, items, CPU, max_epochs=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    assert signal.getsignal(signal.SIGINT) is handler
    assert dict(os.environ) == environment
    assert not list(tmp_path.iterdir())
    torch.manual_seed(12)
    fit_lightning(other, items, CPU, max_epochs=3)
    fit_lightning(third, items, Run(seed=4, device="cpu"), max_epochs=3)
    assert same(one, other)
    assert not same(one, third)


def test_order_changes_by_epoch_and_is_complete(items):
    module = Regression()
    fit_lightning(module, items, CPU, max_epochs=6)
    orders = [tuple(value for epoch, value in module.steps if epoch == e) for e in range(6)]
    assert len(set(orders)) > 1
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    fixed = Regression()
    fit_lightning(fixed, items, CPU, max_epochs=3, shuffle=False)
    assert [value for _, value in fixed.steps] == [float(x[0, 0]) for x, _ in items] * 3


@pytest.mark.parametrize("interrupt_in", [0, 1, 4, 7])
def test_interrupted_fit_ends_as_an_uninterrupted_one(items, tmp_path, monkeypatch, interrupt_in):
    options = {"max_epochs": 8, "validation": items[3:], "monitor": "val_loss"}
    reference = Regression()
    expected = fit_lightning(reference, items[:3], CPU, **options)
    monkeypatch.setattr("hespotex.models._training._SAVE_EVERY", 0)
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path / "states")
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Regression, "interrupt_in", interrupt_in)
    message = "not one epoch" if interrupt_in == 0 else "the same call goes on"
    with pytest.raises(KeyboardInterrupt, match=message):
        fit_lightning(Regression(), items[:3], run, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(Regression, "interrupt_in", None)
    resumed = Regression()
    fit = fit_lightning(resumed, items[:3], run, **options)
    assert min(epoch for epoch, _ in resumed.steps) == interrupt_in
    assert fit.history == expected.history
    assert (fit.best_epoch, fit.best_score) == (expected.best_epoch, expected.best_score)
    assert same(resumed, reference)
    finished = Regression()
    assert fit_lightning(finished, items[:3], run, **options).history == expected.history
    assert finished.steps == []
    assert same(finished, reference)
    forget_checkpoints(fit)
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.usefixtures("interruptible")
def test_a_real_ctrl_c(items, tmp_path):
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    timer = threading.Timer(0.0, lambda: None)

    class Slow(Regression):
        def training_step(self, item: Any, batch_idx: int) -> Any:
            nonlocal timer
            if self.current_epoch == 1 and batch_idx == 0:
                timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
            time.sleep(0.02)
            return super().training_step(item, batch_idx)

    try:
        with pytest.raises(KeyboardInterrupt, match="interrupted in epoch"):
            fit_lightning(Slow(), items, run, max_epochs=100)
    finally:
        timer.cancel()
    with pytest.raises(KeyboardInterrupt):  # the next one is not swallowed
        signal.raise_signal(signal.SIGINT)


def test_without_a_folder_the_message_says_what_would_have_helped(items, monkeypatch):
    monkeypatch.setattr(Regression, "interrupt_in", 1)
    with pytest.raises(KeyboardInterrupt, match="checkpoint_dir="):
        fit_lightning(Regression(), items, CPU, max_epochs=3)


@pytest.mark.parametrize("change", ["data", "weights", "option", "optimiser", "dropout", "precision", "seed"])
def test_a_state_of_another_fit_is_not_taken_up(items, tmp_path, monkeypatch, change):
    monkeypatch.setattr("hespotex.models._training._SAVE_EVERY", 0)
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    fit_lightning(Regression(), items, run, max_epochs=2)
    module, changed, epochs = Regression(), items, 2
    if change == "data":
        changed = [(x + 1e-6, y) for x, y in items]
    elif change == "weights":
        with torch.no_grad():
            module.net[1].weight[0, 0] += 1e-6
    elif change == "option":
        epochs = 3
    elif change == "optimiser":
        module = Regression(lr=0.2)
    elif change == "dropout":
        module.net[0].p = 0.1
    elif change == "precision":
        run = Run(seed=3, device="cpu", precision="bf16-mixed", checkpoint_dir=tmp_path)
    else:
        run = Run(seed=4, device="cpu", checkpoint_dir=tmp_path)
    fit_lightning(module, changed, run, max_epochs=epochs)
    assert len(module.steps) == epochs * len(items)


@pytest.mark.parametrize("content", [b"", b"not an archive"])
def test_unreadable_state_is_dropped_with_a_warning(items, tmp_path, content):
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    reference = Regression()
    fit_lightning(reference, items, run, max_epochs=2)
    (path,) = tmp_path.glob("*.ckpt")
    path.write_bytes(content)
    module = Regression()
    with pytest.warns(HespotexWarning, match="training starts anew"):
        fit_lightning(module, items, run, max_epochs=2)
    assert same(module, reference)
    assert path.with_suffix(".damaged").read_bytes() == content


def test_a_state_outlives_errors_that_pass(items, tmp_path, monkeypatch):
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    fit_lightning(Regression(), items, run, max_epochs=2)
    (path,) = tmp_path.glob("*.ckpt")
    for error in (OSError(24, "Too many open files"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                fit_lightning(Regression(), items, run, max_epochs=2)
    module = Regression()
    fit_lightning(module, items, run, max_epochs=2)
    assert not module.steps  # nothing was fitted again
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_of_a_state_goes_with_the_next(items, tmp_path):
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    name = fit_lightning(Regression(), items, run, max_epochs=2).checkpoint.name
    left = tmp_path / f".{name}-killed"
    left.mkdir()
    (left / ".in_use").touch()
    (left / name).write_bytes(b"half a state")
    (tmp_path / name).unlink()
    fit_lightning(Regression(), items, run, max_epochs=2)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_state_of_another_version_is_not_gone_on_with(items, tmp_path, monkeypatch):
    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    fit_lightning(Regression(), items, run, max_epochs=2)
    monkeypatch.setattr("hespotex.models._state.__version__", "0.0.1")
    module = Regression()
    fit_lightning(module, items, run, max_epochs=2)
    assert len(module.steps) == 2 * len(items)


def test_states_are_never_unpickled(items, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    run = Run(seed=3, device="cpu", checkpoint_dir=tmp_path)
    fit_lightning(Regression(), items, run, max_epochs=1)
    (path,) = tmp_path.glob("*.ckpt")
    torch.save({"state_dict": Bomb()}, path)
    with pytest.warns(HespotexWarning, match="cannot be read"):
        fit_lightning(Regression(), items, run, max_epochs=1)
    assert not (tmp_path / "exploded").exists()


def test_only_the_state_of_the_fit_given_is_forgotten(items, tmp_path):
    run = Run(device="cpu", checkpoint_dir=tmp_path)
    first = fit_lightning(Regression(), items, run, max_epochs=1)
    second = fit_lightning(Regression(), items, run, max_epochs=2)
    forget_checkpoints(first)
    assert list(tmp_path.iterdir()) == [second.checkpoint]
    forget_checkpoints(fit_lightning(Regression(), items, CPU, max_epochs=1))  # kept no state


def test_other_forms_of_items(items):
    from torch_geometric.data import Data

    @dataclass
    class Item:
        x: torch.Tensor
        y: torch.Tensor

    class Forms(Regression):
        def training_step(self, item: Any, batch_idx: int) -> Any:
            x, y = (item["x"], item["y"]) if isinstance(item, dict) else (item.x, item.y)
            return ((self.net(x) - y) ** 2).mean()

    x, y = items[0]
    fit = fit_lightning(Forms(), [{"x": x, "y": y}, Item(x, y), Data(x=x, y=y)], CPU, max_epochs=2)
    assert set(fit.history[0]) == {"epoch", "loss"}


def test_progress_is_shown_only_if_asked(items, capsys):
    fit_lightning(Regression(), items, CPU, max_epochs=2)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    fit_lightning(Regression(), items, Run(device="cpu", progress_bar=True), max_epochs=2, name="stage")
    assert "stage" in capsys.readouterr().err


def test_bad_input(items):
    with pytest.raises(DataValueError, match="items is empty"):
        fit_lightning(Regression(), [], CPU, max_epochs=1)
    with pytest.raises(DataValueError, match="max_epochs=0"):
        fit_lightning(Regression(), items, CPU, max_epochs=0)
    with pytest.raises(DataValueError, match="monitor='val_r' is not in the history"):
        fit_lightning(Regression(), items, CPU, max_epochs=1, validation=items, monitor="val_r")
    broken = [(x * float("inf"), y) for x, y in items]
    with pytest.raises(DataValueError, match="the loss of 'fit' became nan"):
        fit_lightning(Regression(), broken, CPU, max_epochs=1)


@pytest.mark.gpu
def test_on_the_accelerator(items):
    module = Regression()
    fit = fit_lightning(module, items, Run(device="cuda"), max_epochs=3)
    assert next(module.parameters()).device.type == "cpu"
    assert np.isfinite(fit.history[-1]["loss"])
