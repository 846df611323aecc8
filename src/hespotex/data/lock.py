"""One run at a time on a folder of results."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ..errors import DataValueError, OutputError

__all__ = ["locked"]

_LOCK = ".hespotex.lock"
_HOLDER = ".hespotex.run"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` during the block.

    It is the operating system's (``flock``): it ends with the process that holds it, so that nothing is left to clean up
    after a kill or a power cut, and it holds between machines on file systems that share locks.

    Raises
    ------
    DataValueError
        If another run holds it, saying which.
    OutputError
        If nothing can be written to the folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataValueError(
            f"out={str(folder)!r} is in use by another run ({_holder(folder)}); wait for it or end it, or name another folder"
        ) from None
    except OSError as error:
        raise OutputError(f"out={str(folder)!r} cannot be written to ({error}); name another folder") from error
    holder = folder / _HOLDER
    try:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
        try:
            holder.write_text(json.dumps(about))
        except OSError as error:
            raise OutputError(f"out={str(folder)!r} cannot be written to ({error}); make room there") from error
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who holds the lock, in words."""
    try:
        about = json.loads((folder / _HOLDER).read_text())
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just begun"
