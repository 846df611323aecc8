from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hespotex import _tasks
from hespotex._tasks import check_client, iter_tasks
from hespotex.errors import DataTypeError, WorkerError


def scaled(task: int, factor: int = 1) -> int:
    time.sleep(0.002 * (task % 3))  # so that they do not finish in order
    return factor * task


def failing(task: int) -> int:
    if task == 5:
        raise ValueError("task 5")
    return task


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_results_come_in_order(n_jobs):
    assert list(iter_tasks(scaled, range(20), shared={"factor": 2}, n_jobs=n_jobs)) == [2 * i for i in range(20)]


def test_results_of_a_cluster_come_in_order(cluster):
    assert list(iter_tasks(scaled, range(20), shared={"factor": 2}, client=cluster)) == [2 * i for i in range(20)]


def test_tasks_are_taken_as_there_is_room():
    taken = []

    def tasks():
        for task in range(50):
            taken.append(task)
            yield task

    results = iter_tasks(scaled, tasks(), n_jobs=2)
    next(results)
    assert len(taken) <= 4
    results.close()
    assert len(taken) <= 4


def test_threads_are_used():
    names = set(iter_tasks(lambda _: (time.sleep(0.01), threading.current_thread().name)[1], range(12), n_jobs=3))
    assert len(names) == 3


@pytest.mark.parametrize("n_jobs", [1, 2, None])
def test_an_error_is_that_of_the_task(n_jobs, request):
    where = {"client": request.getfixturevalue("cluster")} if n_jobs is None else {"n_jobs": n_jobs}
    results = iter_tasks(failing, range(9), **where)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="task 5"):
        next(results)


def test_a_client_is_one_of_dask(cluster):
    check_client(None)
    check_client(cluster)
    with pytest.raises(DataTypeError, match=r"client must be a dask.distributed.Client, got str.*Client\('tcp"):
        check_client("tcp://localhost:8786")


class Heavy:
    """What tasks share; all that are alive are counted."""

    alive = 0

    def __init__(self) -> None:
        Heavy.alive += 1

    def __reduce__(self):
        return Heavy, ()

    def __del__(self) -> None:
        Heavy.alive -= 1


def alive(_: int, heavy: Heavy) -> int:
    time.sleep(0.01)
    return type(heavy).alive


def alive_now() -> int:
    return Heavy.alive


def test_what_is_shared_is_unpickled_once_and_not_kept(cluster):
    for _ in range(3):
        # 2 for a moment, where dask has dropped the copy of a worker that still works on a task and needs it again.
        assert set(iter_tasks(alive, range(12), shared={"heavy": Heavy()}, client=cluster)) <= {1, 2}
        deadline = time.monotonic() + 20
        while any(cluster.run(alive_now).values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(cluster.run(alive_now).values()) == {0}


def slow(task: int) -> int:
    time.sleep(0.02)
    return task


def timing_out(task: int) -> int:
    raise TimeoutError("of the task")


def test_to_look_after_workers_loses_no_result(cluster, monkeypatch):
    """A result may come at the moment in which waiting for it ends."""
    monkeypatch.setattr(_tasks, "_POLL_S", 0.001)
    assert list(iter_tasks(slow, range(60), client=cluster)) == list(range(60))
    with pytest.raises(TimeoutError, match="of the task"):
        list(iter_tasks(timing_out, range(2), client=cluster))


def dying_once(folder: str, factor: int) -> int:
    mark = Path(folder) / "died"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return factor


def dying(_: int) -> None:
    os._exit(1)


@pytest.fixture
def one_worker():
    """A cluster of its own, whose worker may be killed."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1", memory_limit=0
        ) as workers,
        distributed.Client(workers, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_task_whose_worker_died_is_done_again(one_worker, tmp_path):
    assert list(iter_tasks(dying_once, [str(tmp_path)] * 2, shared={"factor": 3}, client=one_worker)) == [3, 3]


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_given_up(one_worker, monkeypatch):
    monkeypatch.setattr(_tasks, "_NO_WORKER_S", 15.0)  # dask gives up the task or the worker
    with pytest.raises(WorkerError, match="workers of client=.* are lost"):
        list(iter_tasks(dying, range(2), client=one_worker))


@pytest.mark.slow
def test_a_cluster_without_workers_is_not_waited_for(one_worker, monkeypatch):
    monkeypatch.setattr(_tasks, "_NO_WORKER_S", 1.0)
    monkeypatch.setattr(_tasks, "_POLL_S", 0.2)
    one_worker.cluster.scale(0)
    deadline = time.monotonic() + 30
    while one_worker.nthreads() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(WorkerError, match="no worker for 1 s"):
        list(iter_tasks(scaled, range(2), client=one_worker))
