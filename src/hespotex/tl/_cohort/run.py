"""All slides of a cohort, one after the other in this process or one per worker of a cluster."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import WorkerError
from ...models import load
from .one import Job, Outcome, predict_slide

if TYPE_CHECKING:
    from distributed import Client

    from ...models import Model

__all__ = ["on_cluster", "one_by_one"]

_LOOK_S = 2.0  # how often the cluster is looked at while nothing comes
_NO_WORKERS_S = 120.0  # a cluster may need that long to replace its workers
_AT_A_TIME = threading.Lock()  # settings belong to a process, and a slide has its own threads


def one_by_one(
    queue: deque[Job], model: Model, tell: Callable[..., None], *, progress_bar: bool
) -> Generator[tuple[Job, Outcome], None, None]:
    """Do the jobs of `queue` here; the caller may add to it meanwhile."""
    while queue:
        job = queue.popleft()
        tell("slide_started", slide=job.slide)
        yield job, predict_slide(job, model, tell, progress_bar=progress_bar)


def on_cluster(
    queue: deque[Job], model: Path, tell: Callable[..., None], client: Client
) -> Generator[tuple[Job, Outcome], None, None]:
    """Do the jobs of `queue` on the workers, a slide per worker at a time, in the order in which they finish.

    Parameters
    ----------
    queue
        The caller may add to it meanwhile.
    model
        Folder of the saved model, which the workers see under the same path.
    tell
        Called with the events of the workers, too.
    client
        Of the cluster.

    Raises
    ------
    WorkerError
        If the cluster is gone. A worker that dies is the cluster's business: its slide is given to another one, and fails
        if that happens again and again.
    """
    topic = f"hespotex-{uuid.uuid4().hex}"
    client.subscribe_topic(topic, lambda event: tell(**event[1]))
    running: dict[Any, Job] = {}
    without_workers = 0.0
    try:
        while queue or running:
            n_workers = _n_workers(client)
            without_workers = 0.0 if n_workers else without_workers or time.monotonic()
            if without_workers and time.monotonic() - without_workers > _NO_WORKERS_S:
                raise WorkerError(
                    f"client={client!r} has had no worker for {_NO_WORKERS_S:.0f} s; start some and call again: what is "
                    "finished is not done twice"
                )
            while queue and len(running) < max(n_workers, 1):
                job = queue.popleft()
                running[client.submit(_on_worker, job, str(model), topic, pure=False)] = job
            for future in _finished(client, list(running)):
                yield running.pop(future), _outcome(future)
    finally:
        if client.status == "running":
            client.cancel(list(running))
            client.unsubscribe_topic(topic)


def _n_workers(client: Client) -> int:
    try:
        if client.status == "running":
            return len(client.nthreads())
        error: Exception | None = None
    except (OSError, ValueError) as problem:  # ValueError: a client that is closed meanwhile
        error = problem
    raise WorkerError(
        f"the cluster of client={client!r} is gone; start it and call again: what is finished is not done twice"
    ) from error


def _finished(client: Client, futures: list[Any]) -> list[Any]:
    from distributed import wait

    try:
        with client.as_current():
            return list(wait(futures, timeout=_LOOK_S, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return []


def _outcome(future: Any) -> Outcome:
    """What the worker returned, or why there is nothing."""
    if future.status == "finished":
        return future.result()
    if future.status in ("cancelled", "lost"):
        raise WorkerError("the cluster has lost the slides given to it; start it and call again")
    error = future.exception()
    return Outcome(
        error="WorkerError",
        message=f"the workers died or failed on this slide ({type(error).__name__}: {error}); they may have run out of "
        "memory: start them with more of it",
    )


def _on_worker(job: Job, model: str, topic: str) -> Outcome:
    from distributed import get_worker

    worker = get_worker()
    if not Path(model).is_dir():
        return Outcome(
            error="WorkerError",
            message=f"worker {worker.address} does not see {model}: out= must lie on a file system that all machines share",
            stops_all=True,
        )

    def tell(event: str, **about: Any) -> None:
        worker.log_event(topic, {"event": event, **about, "worker": worker.address})

    with _AT_A_TIME:
        tell("slide_started", slide=job.slide)
        return predict_slide(job, _loaded(model), tell, progress_bar=False)


@lru_cache(maxsize=1)
def _loaded(model: str) -> Model:
    return load(model)
