"""Independent pieces of work, done in threads of this process or on a dask cluster, with results in order.

Scheduling, moving of data and recovery from dead workers are dask's; here is only a window, so that neither tasks nor
results pile up.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DataTypeError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["check_client", "iter_tasks"]

T = TypeVar("T")
R = TypeVar("R")
_POLL_S = 2.0
_NO_WORKER_S = 120.0  # a batch system may take a while to start one
_AHEAD = 2  # tasks in flight per thread of the cluster: one is worked on while the next one travels


def iter_tasks(
    function: Callable[..., R],
    tasks: Iterable[T],
    *,
    shared: Mapping[str, Any] | None = None,
    client: Client | None = None,
    n_jobs: int = 1,
) -> Generator[R]:
    """Yield ``function(task, **shared)`` for each task, in the order of the tasks.

    Leaving the loop early, or an error, cancels what has not begun, and closes `tasks` if it is a generator.

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
    try:
        if client is not None:
            yield from _on_cluster(function, tasks, shared, client)
        elif n_jobs == 1:
            for task in tasks:
                yield function(task, **shared)
        else:
            yield from _in_threads(function, tasks, shared, n_jobs)
    finally:
        # Who reads ahead for it must stop, too, also where a traceback, as in a notebook, keeps this frame alive.
        if isinstance(tasks, Generator):
            tasks.close()


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

    import cloudpickle
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    common = None
    waiting: deque[Any] = deque()
    try:
        with warnings.catch_warnings():
            # As the result of a task and not scattered, however large: dask makes it again where its worker has died.
            warnings.filterwarnings("ignore", "Sending large graph")
            common = client.submit(_itself, _Shared(cloudpickle.dumps(dict(shared))), pure=False)
        for task in tasks:
            waiting.append(client.submit(_call, function, task, common, pure=False))
            if len(waiting) >= _AHEAD * max(sum(client.nthreads().values()), 1):
                yield _result(waiting.popleft(), client)
        while waiting:
            yield _result(waiting.popleft(), client)
    except (KilledWorker, CommClosedError, CancelledError) as error:
        raise WorkerError(
            f"the workers of client={client!r} are lost ({type(error).__name__}: {error}); they may have run out of memory. "
            f"Start them with more of it or with fewer threads each, and call again: what is finished is not done twice"
        ) from error
    finally:
        if client.status == "running":
            client.cancel([*waiting, *([common] if common else [])])


def _result(future: Any, client: Client) -> Any:
    """The result of a task, unless there is no worker that could do it.

    Raises
    ------
    CancelledError
        If all workers have been gone for a while: dask itself would wait for new ones for ever.
    """
    from concurrent.futures import CancelledError

    from distributed import wait

    alone_since: float | None = None
    while not future.done():
        with suppress(TimeoutError), client.as_current():
            wait(future, timeout=_POLL_S)
        if client.nthreads():
            alone_since = None
        elif alone_since is None:
            alone_since = time.monotonic()
        elif time.monotonic() - alone_since > _NO_WORKER_S:
            raise CancelledError(f"there has been no worker for {_NO_WORKER_S:g} s")
    return future.result()


def _itself(value: Any) -> Any:
    return value


class _Shared:
    """What all tasks share, on its way to the workers and on them.

    It is unpickled by the first task, once, and not where messages arrive: what that imports may fail, which there would
    end the worker, and may need to be prepared, as torchvision. A worker holds it as long as dask holds the result that
    it is, and no longer: it may be gigabytes.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._lock = threading.Lock()
        self._values: dict[str, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, (self._content,)

    def values(self) -> dict[str, Any]:
        import pickle

        from ._optional import ensure_torchvision

        with self._lock:  # a worker may have several threads
            if self._values is None:
                ensure_torchvision()
                self._values = pickle.loads(self._content)
            return self._values


def _call(function: Callable[..., R], task: Any, common: _Shared) -> R:
    """One task, on the worker."""
    return function(task, **common.values())
