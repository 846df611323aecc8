"""One fit by several processes: each sees its share of the batches, and all take the same optimiser steps.

Processes are started here (on this machine, for the length of one fit) or by torchrun (also on several machines, where
every process runs the whole script). Either way each of them runs the model's own fit, and
:func:`~hespotex.models._training.fit_lightning` shares out the batches among them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._device import resolve_device
from .._files import clear_staged
from .._settings import available_cpus, settings
from ..errors import DataValueError, HespotexWarning, WorkerError

if TYPE_CHECKING:
    from ..data.section import Section
    from ._base import Model, Run

__all__ = ["ALONE", "Group", "fit_together", "group_of", "sized"]

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes
_PATIENCE = timedelta(hours=2)  # of a process with others, which may have the larger sections to prepare


@dataclass(frozen=True)
class Group:
    """Processes that fit together, and which of them this one is.

    Attributes
    ----------
    rank, size
        Number of this process, from 0, and of all of them.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Group()


def group_of(run: Run) -> Group:
    """The processes that take part in `run`; they are together already."""
    import torch.distributed

    if run.n_processes == 1:
        return ALONE
    return Group(torch.distributed.get_rank(), torch.distributed.get_world_size())


def sized(run: Run, model: Model) -> Run:
    """`run` with a number of devices, if `model` can be fitted like that.

    Raises
    ------
    DataValueError
        If there are not so many devices, or the fit of the model cannot be shared out.
    """
    if run.devices == 1 == run.num_nodes == run.accumulate_grad_batches:
        return run
    device = resolve_device(run.device)
    n_devices: int
    if run.devices == "auto":
        several = device.type == "cuda" and device.index is None and model.info.distributed
        n_devices = _n_there(device.type) if several else 1
    else:
        n_devices = run.devices
    run = replace(run, devices=n_devices)
    if run.per_step == 1:
        return run
    if not model.info.distributed:
        from ._registry import distributed_names

        asked = ", ".join(
            f"{name}={getattr(run, name)}"
            for name in ("devices", "num_nodes", "accumulate_grad_batches")
            if getattr(run, name) != 1
        )
        raise DataValueError(
            f"{asked}: {model.info.name!r} is fitted on one device, as a whole; leave it out, or take one of "
            f"{', '.join(distributed_names())}"
        )
    if run.n_processes == 1:
        return run
    if n_devices > 1 and device.index is not None:
        raise DataValueError(
            f"devices={n_devices} and device={run.device!r}, which is one; give device={device.type!r}"
        )
    if n_devices > (there := _n_there(device.type)):
        kind = {"cpu": "CPU cores that this process may use", "cuda": "CUDA devices"}.get(device.type, "device")
        raise DataValueError(f"devices={n_devices}: there are only {there} {kind}")
    return run


def _n_there(kind: str) -> int:
    """Number of processes that a machine has devices for."""
    import torch

    return {"cuda": torch.cuda.device_count, "cpu": available_cpus}.get(kind, lambda: 1)()


def fit_together(model: Model, sections: Sequence[Section], run: Run) -> None:
    """Fit `model` on checked `sections` in as many processes as `run` says; it is fitted in each that called this.

    Raises
    ------
    DataValueError
        If the processes that `run` asks for are not there and cannot be started from here.
    WorkerError
        If a process died.
    """
    if run.n_processes == 1:
        model._fit(sections, run)
    elif all(name in os.environ for name in _LAUNCHED):
        if int(os.environ["WORLD_SIZE"]) != run.n_processes:
            raise DataValueError(
                f"devices={run.devices}, num_nodes={run.num_nodes}, but {os.environ['WORLD_SIZE']} processes were started; "
                "devices= times num_nodes= must be --nproc-per-node times --nnodes of torchrun"
            )
        run = _join(run)
        with settings.override(device=run.device):
            model._fit(sections, run)
    elif run.num_nodes > 1:
        raise DataValueError(
            f"num_nodes={run.num_nodes}: the processes of several machines are started by torchrun; run on each of them "
            f"torchrun --nnodes={run.num_nodes} --nproc-per-node={run.devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=HOST:29500 script.py, where HOST is one of them"
        )
    else:
        _fit_in_workers(model, sections, run)


def _join(run: Run, store: Any = None) -> Run:
    """Meet the other processes, unless that was done; the run as this process takes part in it."""
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = resolve_device(run.device).type
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not torch.distributed.is_initialized():
        arguments = {} if store is None else {"store": store, "rank": rank, "world_size": run.n_processes}
        backend = "nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE, **arguments)
        atexit.register(_part)
    if torch.distributed.get_world_size() != run.n_processes:
        raise DataValueError(
            f"devices={run.devices}, num_nodes={run.num_nodes}, but the process group has "
            f"{torch.distributed.get_world_size()} processes"
        )
    return replace(run, device=device, progress_bar=run.progress_bar and rank == 0)


def _part() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fit_in_workers(model: Model, sections: Sequence[Section], run: Run) -> None:
    """Fit in new processes, of which the first sends back what it learnt."""
    import cloudpickle
    import torch
    from joblib.externals.loky import FIRST_EXCEPTION, ProcessPoolExecutor, wait
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    n = run.n_processes
    values = {name: getattr(settings, name) for name in vars(settings)}
    try:
        task = cloudpickle.dumps((model, list(sections), run, values))
    except Exception as error:
        raise DataValueError(
            f"devices={n}: the model or its sections cannot be sent to other processes ({error}); load them in each "
            f"process instead, in a script that is started with torchrun --nproc-per-node={n}"
        ) from error
    threads = str(max(1, available_cpus() // n))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Not multiprocessing: its new processes run the main script again, which a notebook has not and scripts must guard.
    environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    # DistributedDataParallel looks for weights that a step leaves alone, and logs a warning where there are none.
    pool = ProcessPoolExecutor(n, env={**environment, "TORCH_CPP_LOG_LEVEL": "ERROR"})
    try:
        futures = [pool.submit(_work, task, rank, n, store.port, os.getpid()) for rank in range(n)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for rank, future in enumerate(futures):
            if future in done and (failure := future.exception()) is not None:
                if not isinstance(failure, TerminatedWorkerError):
                    failure.add_note(f"(in process {rank} of {n} that fitted {model.info.name!r})")
                raise failure
        learnt = futures[0].result()
    except TerminatedWorkerError as error:
        raise WorkerError(
            f"one of {n} processes that fitted {model.info.name!r} died, out of memory perhaps: {error}"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{model.info.name} was interrupted; {_advice(run.checkpoint_dir)}") from None
    finally:
        # Nobody waits for a process that waits for one which failed.
        pool.shutdown(wait=True, kill_workers=True)
        if run.checkpoint_dir is not None:
            clear_staged(Path(run.checkpoint_dir), "*.ckpt")
    learnt.hand_over(model)


def _advice(folder: Path | None) -> str:
    if folder is None:
        return "nothing was kept; give checkpoint_dir= to be able to go on"
    if any(folder.glob("*.ckpt")):
        return f"its last epochs are kept in {folder}: the same call goes on from there"
    return "not one epoch was finished"


@dataclass(frozen=True)
class _Learnt:
    """What a fit changed in a model: all that a saved one consists of."""

    arrays: dict[str, Any]
    values: str  # JSON, as in a file, so that what comes back is what loading gives
    unit: str
    history: list[dict[str, float]]
    scores: dict[str, float]
    warned: list[tuple[str, type[Warning]]]

    def hand_over(self, model: Model) -> None:
        """Make `model` the fitted one."""
        for text, category in self.warned:
            warnings.warn(text, category, stacklevel=5)
        model.unit, model.history, model.scores = self.unit, self.history, self.scores
        model.load_state(self.arrays, json.loads(self.values))


def _work(task: bytes, rank: int, size: int, port: int, parent: int) -> _Learnt | None:
    """What each new process does."""
    import cloudpickle
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one answers Ctrl-C
    _end_with(parent)
    address = ("127.0.0.1", str(port))
    names = (*_LAUNCHED, "LOCAL_WORLD_SIZE", "GROUP_RANK")
    os.environ.update(zip(names, (str(rank), str(rank), str(size), *address, str(size), "0"), strict=True))
    model, sections, run, values = cloudpickle.loads(task)
    for name, value in values.items():
        setattr(settings, name, value)
    settings.n_jobs = max(1, settings.n_jobs // size)
    run = _join(run, torch.distributed.TCPStore(address[0], port, is_master=False))
    settings.device = run.device
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", HespotexWarning)
        model._fit(sections, run)
    # Only after success: a failing process that parted would make the others fail too, perhaps earlier.
    torch.distributed.barrier()
    atexit.unregister(_part)
    _part()
    if rank > 0:
        return None
    arrays, plain = model.state()
    warned = [(str(each.message), each.category) for each in caught]
    return _Learnt(arrays, json.dumps(plain), model.unit, model.history, model.scores, warned)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
