"""Independent pieces of work, done in threads of this process or on a dask cluster, with results in order.

Scheduling, moving of data and recovery from dead workers are dask's; here is only a window, so that neither tasks nor
results pile up.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DataTypeError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["check_client", "iter_tasks"]

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # tasks in flight per thread of the cluster: one is worked on while the next one travels


def iter_tasks(
    function: Callable[..., R],
    tasks: Iterable[T],
    *,
    shared: Mapping[str, Any] | None = None,
    client: Client | None = None,
    n_jobs: int = 1,
) -> Iterator[R]:
    """Yield ``function(task, **shared)`` for each task, in the order of the tasks.

    Leaving the loop early cancels what has not begun.

    Parameters
    ----------
    function
        For a cluster it must be importable there: a function of a module, not a lambda.
    tasks
        Taken one by one, when there is room for them.
    shared
        Arguments that are the same for all tasks; they travel to a worker once.
    client
        ``dask.distributed.Client``; threads of this process without it.
    n_jobs
        Threads of this process; of no meaning with a client.

    Raises
    ------
    WorkerError
        If workers die repeatedly, or the cluster is gone.
    """
    shared = shared or {}
    if client is not None:
        yield from _on_cluster(function, tasks, shared, client)
    elif n_jobs == 1:
        for task in tasks:
            yield function(task, **shared)
    else:
        yield from _in_threads(function, tasks, shared, n_jobs)


def check_client(client: Any) -> None:
    """Raise unless `client` is one of dask, or ``None``.

    Raises
    ------
    DataTypeError
        Saying how to make one.
    """
    if client is None or all(hasattr(client, name) for name in ("submit", "scheduler_info", "cancel")):
        return
    raise DataTypeError(
        f"client must be a dask.distributed.Client, got {type(client).__name__}; make one with "
        f"distributed.Client(), or distributed.Client('tcp://<scheduler>:8786') for a cluster that runs already"
    )


def _in_threads(function: Callable[..., R], tasks: Iterable[T], shared: Mapping[str, Any], n_jobs: int) -> Iterator[R]:
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(n_jobs, thread_name_prefix="hespotex") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task, **shared))
                if len(waiting) > n_jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _on_cluster(
    function: Callable[..., R], tasks: Iterable[T], shared: Mapping[str, Any], client: Client
) -> Iterator[R]:
    from concurrent.futures import CancelledError

    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    with warnings.catch_warnings():
        # As results of tasks and not scattered, however large: dask makes them again where their worker has died.
        warnings.filterwarnings("ignore", "Sending large graph")
        common = {name: client.submit(_itself, value, pure=False) for name, value in shared.items()}
    room = _AHEAD * max(sum(client.nthreads().values()), 1)
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            waiting.append(client.submit(function, task, **common, pure=False))
            if len(waiting) >= room:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (KilledWorker, CommClosedError, CancelledError) as error:
        raise WorkerError(
            f"the workers of client={client!r} are lost ({type(error).__name__}: {error}); they may have run out of memory. "
            f"Start them with more of it or with fewer threads each, and call again: what is finished is not done twice"
        ) from error
    finally:
        if client.status == "running":
            client.cancel([*waiting, *common.values()])


def _itself(value: Any) -> Any:
    return value
