"""Compute the next items of an iterator in a thread while the caller works on the last one."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")
_POLL_S = 0.1  # how often a waiting thread looks whether it should stop


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield the items of `source` in order, at most `depth` of them computed ahead.

    An error in `source` is raised here, in the caller's thread. Leaving the loop early, by ``break`` or Ctrl-C, stops
    the thread before control returns.
    """
    queue: Queue[tuple[str, Any]] = Queue(maxsize=depth)
    stop = Event()

    def put(kind: str, value: Any = None) -> bool:
        while not stop.is_set():
            try:
                queue.put((kind, value), timeout=_POLL_S)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in source:
                if not put("item", item):
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller's thread raises it
            put("error", error)
        else:
            put("end")

    thread = Thread(target=work, name="hespotex-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = queue.get(timeout=_POLL_S)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
