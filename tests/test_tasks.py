from __future__ import annotations

import threading
import time

import pytest

from hespotex._tasks import check_client, iter_tasks
from hespotex.errors import DataTypeError


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
