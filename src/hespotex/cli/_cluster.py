"""The dask cluster that ``--scheduler`` or ``--workers`` asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..errors import DataValueError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["cluster"]

# Ctrl-C reaches all processes of a terminal; the one that started the others answers it, and ends them.
_DEAF = "import signal\n\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"


@contextmanager
def cluster(scheduler: str | None, workers: int | None) -> Iterator[Client | None]:
    """A client of the scheduler, or of processes on this machine that share its CPUs; ``None`` without both."""
    if scheduler is None and workers is None:
        yield None
        return
    if scheduler is not None and workers is not None:
        raise DataValueError("--scheduler names a cluster that runs, --workers starts one; give one of them")
    from .._optional import optional_import
    from .._settings import settings

    distributed = optional_import("distributed", feature="--scheduler and --workers", extra="cluster")
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout="30s")
        except (OSError, ValueError) as error:
            raise WorkerError(f"no scheduler answers at --scheduler {scheduler} ({error})") from error
        with client:
            yield client
        return
    assert workers is not None
    threads = str(max(1, settings.n_jobs // workers))
    started = distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,  # a slide has its own threads
        processes=True,
        memory_limit=0,  # none: a slide is streamed, and what is large of it is not dask's to move to disk
        silence_logs=logging.ERROR,
        dashboard_address=":0",  # a port that is free
        preload=[_DEAF],
        env={"HESPOTEX_N_JOBS": threads, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads},
    )
    client = distributed.Client(started)
    try:
        yield client
    finally:
        with suppress(TimeoutError):  # workers that are slow to end do not change what they did
            client.close()
            started.close()
