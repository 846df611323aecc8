"""The same results on a cluster that was started from the command line, as on a batch system: scheduler and workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import tifffile

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.encoders import _base, morphology
from hespotex.pp import _nuclei_source

pytestmark = pytest.mark.slow
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "HESPOTEX_N_JOBS"), "1")
START_S, RUN_S = 120.0, 300.0


class Processes:
    """``dask scheduler`` and ``dask worker`` as processes of their own, all of which :meth:`end` ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        self.start("dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")

    def start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        """Start ``distributed.cli.<program>``."""
        environment = os.environ | ONE_THREAD | {"HESPOTEX_CACHE_DIR": str(self.folder / "cache")}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{program}", *options],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,  # with all that it starts
            )
        self.started.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        """One more worker with one thread; it has no nanny that would start it again."""
        here = ("--host", "127.0.0.1", "--no-dashboard", "--no-nanny", "--memory-limit", "0")
        return self.start("dask_worker", self.address, "--nthreads", "1", *here, "--death-timeout", f"{START_S:g}")

    def client(self, n_workers: int) -> Any:
        """A client, as soon as so many workers are there."""
        import distributed

        client = None
        try:
            client = distributed.Client(self.address, timeout=f"{START_S:g}s", set_as_default=False)
            client.wait_for_workers(n_workers, timeout=START_S)
        except (OSError, TimeoutError):
            if client is not None:
                client.close()
            pytest.fail(f"the cluster did not start:\n{(self.folder / 'log').read_text()[-3000:]}")
        return client

    def end(self) -> None:
        """Kill what still runs."""
        for process in reversed(self.started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[Processes]:
    """A scheduler and two workers."""
    pytest.importorskip("distributed")
    processes = Processes(tmp_path_factory.mktemp("cluster"))
    try:
        processes.worker()
        processes.worker()
        yield processes
    finally:
        processes.end()


@pytest.fixture
def client(processes) -> Iterator[Any]:
    with processes.client(2) as client:
        yield client


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As many threads here as on a worker, of torch and of hespotex."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with hx.settings.override(n_jobs=1):
        yield
    torch.set_num_threads(before)


@contextmanager
def worked(client: Any, *, at_least: int) -> Iterator[None]:
    """So many tasks are done by the workers, which are asked themselves."""

    def count() -> int:
        return sum(client.run(lambda dask_worker: dask_worker.state.executed_count).values())

    before = count()
    yield
    assert count() - before >= at_least


def test_a_network_from_a_file_gives_the_same(section, client, tmp_path, monkeypatch) -> None:
    from hespotex._optional import ensure_torchvision

    ensure_torchvision()
    timm = pytest.importorskip("timm")
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", pretrained=False, num_classes=0).state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(_base, "_TILES_PER_RUN", 8)
    options = {"weights": tmp_path / "w.safetensors", "tile_px": 64, "tile_um": 32.0, "batch_size": 8, "device": "cpu"}
    local = hx.pp.embed(section, "timm:resnet10t", copy=True, **options)
    with worked(client, at_least=8):
        remote = hx.pp.embed(section, "timm:resnet10t", copy=True, client=client, **options)
    assert local.std(axis=0).max() > 0
    np.testing.assert_allclose(remote, local, rtol=1e-5, atol=1e-6)


def test_morphology_is_the_same_to_the_bit(section, client, monkeypatch) -> None:
    monkeypatch.setattr(morphology, "_PART_PX", 150)
    local = hx.pp.embed(section, copy=True)
    with worked(client, at_least=3):
        remote = hx.pp.embed(section, copy=True, client=client)
    np.testing.assert_array_equal(remote, local)


def test_nuclei_are_the_same_to_the_bit(section, client, monkeypatch) -> None:
    monkeypatch.setattr(_nuclei_source, "BLOCK_PX", 128)
    hx.pp.segment_nuclei(section, key_added="here")
    with worked(client, at_least=5):
        hx.pp.segment_nuclei(section, key_added="there", client=client)
    here, there = section["here_features"], section["there_features"]
    assert here.n_obs > 100
    np.testing.assert_array_equal(there.X, here.X)
    np.testing.assert_array_equal(there.obsm["spatial"], here.obsm["spatial"])
    assert section["there"].to_wkb().equals(section["here"].to_wkb())
    np.testing.assert_array_equal(section["there_labels"].values, section["here_labels"].values)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, Path, dict[str, list[np.ndarray]]]:
    """Folder of three slides, a model, and what the program makes of them without a cluster."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "slides").mkdir()
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    for number in range(3):
        sdata = hx.datasets.synthetic(size_px=700, with_expression=False, first_patient=number, seed=number)
        pixels = resolve_slide(sdata).levels[0].array.compute().transpose(1, 2, 0)
        path = folder / "slides" / f"biopsy_{number}.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), compression="deflate", **scale)
    section = hx.datasets.synthetic(size_px=600, pitch_um=40.0, diameter_um=40.0, n_genes=40, seed=2)
    hx.pp.embed(section)
    hx.tl.train(section, "ridge", n_top_genes=10).save(folder / "ridge.hx")
    program = predict(folder / "slides", folder / "ridge.hx", folder / "out")
    _, said = program.communicate(timeout=RUN_S)
    assert program.returncode == 0, said
    return folder / "slides", folder / "ridge.hx", results(folder / "out")


def predict(slides: Path, model: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The program, which is begun."""
    command = [sys.executable, "-m", "hespotex", "predict", str(slides), "--model", str(model), "--out", str(out)]
    environment = os.environ | ONE_THREAD | {"HESPOTEX_CACHE_DIR": str(out.parent / "cache")}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def results(out: Path) -> dict[str, list[np.ndarray]]:
    """Everything computed that is in the results of a folder."""
    found = {}
    for path in sorted(out.glob("*.zarr")):
        sdata = sd.read_zarr(path)
        arrays = [np.array([*sdata.tables, *sdata.shapes])]
        for table in sdata.tables.values():
            arrays += [table.X, np.array(table.obs_names), np.array(table.var_names), *table.obsm.values()]
        arrays += [np.array(shapes.geometry.to_wkt()) for shapes in sdata.shapes.values()]
        found[path.name] = arrays
    return found


def same(found: dict[str, list[np.ndarray]], expected: dict[str, list[np.ndarray]]) -> None:
    assert list(found) == list(expected) == [f"biopsy_{number}.zarr" for number in range(3)]
    for name, arrays in expected.items():
        assert len(found[name]) == len(arrays) > 4
        for one, other in zip(found[name], arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_program_gives_the_same_with_a_scheduler(cohort, processes, client, tmp_path) -> None:
    slides, model, expected = cohort
    with worked(client, at_least=3):
        program = predict(slides, model, tmp_path / "out", "--scheduler", processes.address)
        try:
            _, said = program.communicate(timeout=RUN_S)
        finally:
            program.kill()
    assert program.returncode == 0, said
    same(results(tmp_path / "out"), expected)


def test_the_program_goes_on_where_a_worker_is_killed(cohort, processes, client, tmp_path) -> None:
    slides, model, expected = cohort
    log = tmp_path / "log.jsonl"
    program = predict(slides, model, tmp_path / "out", "--scheduler", processes.address, "--log", str(log))
    victim: int | None = None
    try:
        deadline = time.monotonic() + RUN_S
        while victim is None and program.poll() is None and time.monotonic() < deadline:
            working = client.run(lambda dask_worker: (os.getpid(), dask_worker.state.executing_count))
            victim = next((pid for pid, count in working.values() if count), None)
            time.sleep(0.02)
        assert victim is not None, "the program ended before a worker was seen at work"
        os.kill(victim, signal.SIGKILL)
        _, said = program.communicate(timeout=RUN_S)
    finally:
        program.kill()
        processes.worker()  # in its place
    assert program.returncode == 0, said
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "cohort_finished"
    same(results(tmp_path / "out"), expected)
