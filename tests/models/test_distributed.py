from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

import hespotex as hx
from hespotex import models
from hespotex._optional import ensure_torchvision
from hespotex._settings import available_cpus
from hespotex.data.section import Section, Targets
from hespotex.errors import DataValueError, HespotexWarning, ModelMismatchError, WorkerError
from hespotex.models import Run, _distributed
from hespotex.models._distributed import Group
from hespotex.models._order import Order
from hespotex.models._store import recall, remember
from hespotex.models._training import _check_group, _means, fit_lightning
from hespotex.models.mlp import MLP

ensure_torchvision()
import lightning.pytorch as pl  # noqa: E402

CPU = Run(seed=3, device="cpu")
ACCUMULATED = Run(seed=3, device="cpu", accumulate_grad_batches=2)
SHARED = Run(seed=3, device="cpu", devices=2)
QUICK = {"hidden": [8], "max_epochs": 4, "batch": 16, "patience": 10}  # with dropout, and an odd number of batches

two_cores = pytest.mark.skipif(available_cpus() < 2, reason="one core")


def made(name: str, seed: int, n: int = 49) -> Section:
    """Spots on a lattice whose counts follow from their features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 5)).astype(np.float32)
    counts = rng.poisson(np.exp(1 + features @ np.linspace(-0.5, 0.5, 15).reshape(5, 3)))
    pixel = np.stack(np.divmod(np.arange(n), 7), axis=1) * 100.0
    distance = np.abs(pixel[:, None] - pixel[None]).sum(axis=2)
    edges = sparse.csr_array((distance <= 100).astype(np.float32))
    return Section(
        name,
        np.arange(n).astype(str),
        features,
        pixel,
        edges=edges,
        targets=Targets(counts, np.full(n, 50.0), ("A", "B", "C")),
        extras={"pixel": pixel},
    )


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    return [made(f"s{seed}", seed) for seed in range(3)]


@pytest.fixture
def no_children_left() -> Iterator[None]:
    """Fails if the test takes minutes or leaves processes behind; trackers of resources, which end with us, aside."""
    psutil = pytest.importorskip("psutil")

    def too_long(*_: Any) -> None:
        raise TimeoutError("processes wait for each other")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    left = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [words for words in left if "loky" in " ".join(words) and "resource_tracker" not in " ".join(words)]


class Linear(pl.LightningModule):
    """Least squares by plain gradient descent."""

    def __init__(self, *, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [torch.nn.Dropout(dropout), torch.nn.Linear(3, 1)]
            self.net = torch.nn.Sequential(*layers, *([torch.nn.BatchNorm1d(1)] if norm else []))

    def training_step(self, item: Any, batch_idx: int) -> torch.Tensor:
        return ((self.net(item[0]) - item[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def items() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, generator=generator), torch.randn(6, 1, generator=generator)) for _ in range(5)]


# What a step sees


@pytest.mark.parametrize("n_items", [1, 4, 5, 7, 8])
@pytest.mark.parametrize(("n_processes", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (4, 1)])
def test_processes_share_each_step_of_one_that_accumulates(n_items, n_processes, accumulate):
    def steps(size: int, accumulate: int) -> list[dict[int, float]]:
        """Weight of each item in the mean of each step."""
        found: list[dict[int, float]] = []
        for rank in range(size):
            order = Order(range(n_items), 5, shuffle=True, group=Group(rank, size), accumulate=accumulate)
            assert len(order) == -(-n_items // size)
            for batch, item in enumerate(order):
                step = batch // accumulate
                found += [{} for _ in range(step + 1 - len(found))]
                if order.counts(batch):
                    assert item not in found[step]
                    found[step][item] = order.weight(batch) / (size * accumulate)
                else:
                    assert order.weight(batch) == 0
        return found

    shared, alone = steps(n_processes, accumulate), steps(1, n_processes * accumulate)
    assert shared == alone
    assert sorted(item for step in shared for item in step) == list(range(n_items))
    for step in shared:
        assert list(step.values()) == pytest.approx([1 / len(step)] * len(step))


def test_a_step_follows_the_mean_gradient(items):
    module, reference = Linear(), Linear()
    fit = fit_lightning(module, items, ACCUMULATED, max_epochs=2, shuffle=False)
    losses = []
    for _ in range(2):
        for step in (items[:2], items[2:4], items[4:]):  # the last has one item, which counts in full
            each = [reference.training_step(item, 0) for item in step]
            losses += [float(loss.detach()) for loss in each]
            reference.zero_grad()
            torch.stack(each).mean().backward()
            with torch.no_grad():
                for weight in reference.parameters():
                    weight -= 0.1 * weight.grad
    for found, expected in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert [row["loss"] for row in fit.history] == pytest.approx([np.mean(losses[:5]), np.mean(losses[5:])], rel=1e-5)
    assert set(fit.history[0]) == {"epoch", "loss"}
    assert "training_step" not in vars(module)


def test_random_numbers_belong_to_the_item(items):
    """Not to the process: what it has done before does not matter."""
    order = [0, 1, 2, 3]

    def losses(numbers: list[int], run: Run) -> list[float]:
        found = []

        class Recording(Linear):
            def training_step(self, item: Any, batch_idx: int) -> torch.Tensor:
                loss = super().training_step(item, batch_idx)
                found.append(float(loss.detach()))
                return 0.0 * loss

        module = Recording(dropout=0.5)
        fit_lightning(module, [items[i] for i in numbers], run, max_epochs=1, shuffle=False)
        return found

    # With weights that stay, a changed first item changes nothing in the others.
    assert losses(order, ACCUMULATED)[1:] == losses([4, *order[1:]], ACCUMULATED)[1:]
    assert losses(order, ACCUMULATED) != losses(order, CPU)


@pytest.mark.parametrize(("run", "steps"), [(CPU, 8), (ACCUMULATED, 4)])
def test_a_running_mean_of_weights_follows_steps(run, steps):
    from hespotex.models._rows import RowBatches
    from hespotex.models.hisdiff.config import HisDiffConfig
    from hespotex.models.hisdiff.network import Denoiser
    from hespotex.models.hisdiff.training import Spots, make_step

    config = HisDiffConfig(condition="spot", width=8, depth=1, heads=2, average=0.9)
    spots = Spots(torch.randn(40, 4), torch.randn(40, 3), None, None, None, None)
    module = make_step(config, Denoiser(3, 4, config), spots, 0)
    batches = RowBatches(np.arange(40), 10, 2, 0)
    fit_lightning(module, batches, run, max_epochs=2, visit=batches.visit)
    assert int(module.updates) == steps


def test_means_over_processes():
    sums = [{"loss": 3.0, "val_r": 0.5}, {"loss": 5.0, "val_r": 0.7}, {}]
    counts = [{"loss": 2, "val_r": 1}, {"loss": 1, "val_r": 1}, {}]
    assert _means(sums, counts) == {"loss": pytest.approx(8 / 3), "val_r": 0.5}


# What cannot be


def test_numbers_are_checked():
    for name in ("devices", "num_nodes", "accumulate_grad_batches"):
        for value in (0, -1, 1.5, True, "all"):
            with pytest.raises(DataValueError, match=f"{name}={value!r} must be a whole number"):
                Run(**{name: value})


def test_more_devices_than_there_are(sections):
    with pytest.raises(DataValueError, match=r"devices=4096: there are only \d+ CPU cores"):
        models.create("mlp").fit(sections, Run(device="cpu", devices=4096))


def test_auto_on_the_cpu_is_one(sections):
    alone = models.create("mlp", **QUICK).fit(sections, CPU)
    auto = models.create("mlp", **QUICK).fit(sections, Run(seed=3, device="cpu", devices="auto"))
    assert auto.history == alone.history
    assert models.create("mean").fit(sections, Run(device="cpu", devices="auto")).is_fitted


def test_auto_takes_all_cuda_devices_for_models_that_can_use_them(monkeypatch):
    monkeypatch.setattr(_distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def devices(name: str, **options: Any) -> Any:
        return _distributed.sized(Run(**options), models.create(name)).devices

    assert devices("mlp", device="cuda", devices="auto") == 3
    assert devices("mlp", device="cuda:1", devices="auto") == 1
    assert devices("mlp", device="cpu", devices="auto") == 1
    assert devices("ridge", device="cuda", devices="auto") == 1
    assert devices("mlp", device="cuda", devices=2) == 2
    with pytest.raises(DataValueError, match="devices=4: there are only 3 CUDA devices"):
        devices("mlp", device="cuda", devices=4)
    with pytest.raises(DataValueError, match="devices=2 and device='cuda:1', which is one; give device='cuda'"):
        devices("mlp", device="cuda:1", devices=2)


@pytest.mark.parametrize("name", ["mean", "ridge", "knn", "stage", "tesla", "xfuse"])
def test_a_model_that_cannot_be_shared_out(sections, name):
    assert not models.available().loc[name, "distributed"]
    with pytest.raises(DataValueError, match=rf"devices=2: '{name}' is fitted on one device.*bleep.*mlp"):
        models.create(name).fit(sections, SHARED)
    with pytest.raises(DataValueError, match=f"accumulate_grad_batches=2: '{name}'"):
        models.create(name).fit(sections, ACCUMULATED)


def test_several_machines_need_torchrun(sections):
    with pytest.raises(DataValueError, match="num_nodes=2.*torchrun --nnodes=2 --nproc-per-node=1"):
        models.create("mlp").fit(sections, Run(device="cpu", num_nodes=2))


def test_torchrun_must_have_started_as_many(sections, monkeypatch):
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataValueError, match="devices=1, num_nodes=2, but 3 processes were started"):
        models.create("mlp").fit(sections, Run(device="cpu", num_nodes=2))


@two_cores
def test_sections_that_cannot_be_sent(sections):
    class OnDisk:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape = array, array.shape

        def __getitem__(self, rows: Any) -> Any:
            return self.array[rows]

        def __reduce__(self) -> Any:
            raise TypeError("an open file")

    first = sections[0]
    bound = Section(first.name, first.ids, OnDisk(first.features), first.coordinates, targets=first.targets)
    with pytest.raises(DataValueError, match="cannot be sent to other processes .an open file.*torchrun"):
        models.create("mlp", **QUICK).fit([bound], SHARED)


class Differing(Group):
    """Two processes of which the other has answered already."""

    def __init__(self, **other: Any) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def gather(self, value: Any) -> list[Any]:
        return [value, {**value, **self.other}]


def test_processes_that_differ_are_told_so(items):
    order = Order(items, 3, shuffle=True, group=Group(0, 2))
    _check_group(Differing(), Linear(), order, 0, None, None, "fit")
    with pytest.raises(ModelMismatchError, match="differ in batches; give all of them the same sections"):
        _check_group(Differing(batches=(7, 7, 0)), Linear(), order, 0, None, None, "fit")
    with pytest.raises(ModelMismatchError, match="differ in epochs kept"):
        _check_group(Differing(**{"epochs kept in checkpoint_dir": 4}), Linear(), order, 0, None, None, "fit")
    with pytest.raises(DataValueError, match="normalises by batch"):
        _check_group(Differing(), Linear(norm=True), order, 0, None, None, "fit")
    with pytest.warns(HespotexWarning, match="has 1 batches, so that only as many of 2"):
        _check_group(Differing(), Linear(), Order(items[:1], 3, shuffle=True), 0, None, None, "fit")


def test_train_takes_the_numbers(section):
    hx.pp.embed(section, "morphology", progress_bar=False)
    genes = list(section["table"].var_names[:5])

    def curve(**options: Any) -> list[float]:
        model = hx.tl.train(section, "mlp", config=QUICK, genes=genes, device="cpu", seed=1, **options)
        return [row["loss"] for row in model.history]

    assert curve() == curve(devices="auto")
    assert curve() != curve(accumulate_grad_batches=2)
    with pytest.raises(DataValueError, match="devices=4096"):
        curve(devices=4096)
    with pytest.raises(DataValueError, match="num_nodes=0"):
        curve(num_nodes=0)


def test_processes_may_keep_the_same_model_at_once(sections, tmp_path, monkeypatch):
    model = models.create("mean").fit(sections)
    save = model.save

    def second(path: Any) -> Any:
        save(path)  # the other process, in between
        return save(path)

    monkeypatch.setattr(model, "save", second)
    with hx.settings.override(cache_dir=tmp_path):
        assert recall(remember(model)).genes == model.genes


# Two processes


def compare(one: models.Model, other: models.Model, test: Section, tolerance: float = 1e-5) -> None:
    """Equal loss curves and predictions."""
    assert len(one.history) == len(other.history)
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert set(mine) == set(theirs)
        for key, value in mine.items():
            assert value == pytest.approx(theirs[key], rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(one.predict(test).mean, other.predict(test).mean, rtol=1e-4, atol=1e-4)
    assert one.scores == pytest.approx(other.scores, rel=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": QUICK,
    "hespotex": {"nuclei": "none", "gate_epochs": 3, "epochs": 4, "width": 8},
    "bleep": {"width": 8, "max_epochs": 3, "batch": 16},
    "hisdiff": {"condition": "spot", "width": 8, "depth": 1, "heads": 2, "batch": 16, "epochs": 3},
}


@two_cores
@pytest.mark.slow
@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_give_the_curve_of_one_with_accumulation(sections, name):
    alone, accumulated, shared = (
        models.create(name, **OPTIONS[name]).fit(sections, run) for run in (CPU, ACCUMULATED, SHARED)
    )
    compare(shared, accumulated, sections[0])
    assert shared.is_fitted
    curves = [[value for row in model.history for value in row.values()] for model in (alone, shared)]
    assert curves[0] != pytest.approx(curves[1], rel=1e-4)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCH_CPP_LOG_LEVEL"} & set(os.environ)


@two_cores
@pytest.mark.slow
@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_process_that_fails_ends_all(sections, how):
    class Failing(MLP):
        def _fit(self, sections: Any, run: Any) -> None:
            if os.environ["RANK"] == "1":
                if how == "dies":
                    os._exit(3)
                raise DataValueError("a bad section")
            super()._fit(sections, run)  # waits for the other

    model = Failing(**QUICK)
    start = time.monotonic()
    if how == "raises":
        with pytest.raises(DataValueError, match="a bad section") as caught:
            model.fit(sections, SHARED)
        assert "in process 1 of 2" in "".join(caught.value.__notes__)
    else:
        with pytest.raises(WorkerError, match="one of 2 processes that fitted 'mlp' died"):
            model.fit(sections, SHARED)
    assert time.monotonic() - start < 200
    assert not model.is_fitted


@two_cores
@pytest.mark.slow
@pytest.mark.usefixtures("interruptible", "no_children_left")
def test_interrupted_processes_go_on_where_they_were(sections, tmp_path):
    options = {**QUICK, "max_epochs": 30, "patience": 30}
    run = Run(seed=3, device="cpu", devices=2, checkpoint_dir=tmp_path / "states")

    def interrupt() -> None:
        while not list(tmp_path.glob("states/mlp-choice-*.ckpt")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="mlp was interrupted.*the same call goes on"):
        models.create("mlp", **options).fit(sections, run)
    thread.join()
    assert [path.suffix for path in (tmp_path / "states").iterdir()] == [".ckpt"]
    resumed = models.create("mlp", **options).fit(sections, run)
    compare(resumed, models.create("mlp", **options).fit(sections, ACCUMULATED), sections[0])
    assert not list((tmp_path / "states").iterdir())


SCRIPT = """
import json, os, sys
from pathlib import Path
import numpy as np
from hespotex import models
from hespotex.data.section import Section, Targets
from hespotex.models import Run

stored = np.load(sys.argv[1])
sections = [
    Section(f"s{i}", np.arange(49).astype(str), stored[f"x{i}"], stored["xy"],
            targets=Targets(stored[f"y{i}"], np.full(49, 50.0), ("A", "B", "C")))
    for i in range(3)
]
model = models.create("mlp", **json.loads(sys.argv[2]))
model.fit(sections, Run(seed=3, device="cpu", num_nodes=2))
result = {"history": model.history, "mean": model.predict(sections[0]).mean.tolist()}
Path(sys.argv[3], os.environ["RANK"] + ".json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_machines_by_torchrun(sections, tmp_path):
    """Both are this one."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    arrays = {f"x{i}": each.features for i, each in enumerate(sections)}
    arrays |= {f"y{i}": each.require_targets().counts for i, each in enumerate(sections)}
    np.savez(tmp_path / "data.npz", xy=sections[0].coordinates, **arrays)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    command += [str(tmp_path / "fit.py"), str(tmp_path / "data.npz"), json.dumps(QUICK), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        errors = [each.communicate(timeout=400)[1] for each in both]
    finally:
        for each in both:
            each.kill()
    assert [each.returncode for each in both] == [0, 0], errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    expected = models.create("mlp", **QUICK).fit(sections, ACCUMULATED)
    np.testing.assert_allclose(found[0]["mean"], expected.predict(sections[0]).mean, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in history] for history in (found[0]["history"], expected.history)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
