"""Files that appear under their name only when whole."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

__all__ = ["check_writable", "clear_staged", "exchange", "publish", "replacing", "staged"]

_SYNCS = 16
_IN_USE = ".in_use"


def check_writable(place: Path, named: str) -> None:
    """Raise before the work if nothing could be written beside `place`; nothing is left there.

    A folder is made and removed, as permissions alone do not tell: root passes them, and a drive may be read-only.

    Parameters
    ----------
    place
        What is to be written; folders above it that are missing are not made.
    named
        The argument, for the message.

    Raises
    ------
    OutputError
        Naming it and the folder.
    """
    folder = place.absolute().parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"{named}: nothing can be written to the folder {folder} ({error.strerror or error}); name a place in a folder that can "
            "be written to"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a name beside `path` to write a file to; it becomes `path` when the block ends without an error.

    The content is on the disk before the name is, so neither a kill nor a power cut leaves a part of a file under
    `path`. What was there before stays until then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        _sync_file(part)
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give the block a folder beside `path`, and so on the same disk, to prepare `path` in; it is gone afterwards.

    Folders that killed runs have left there are deleted. They are known by their lock, which ends with its process.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    clear_staged(path.parent, glob.escape(path.name))
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    lock = FileLock(folder / _IN_USE, timeout=0)
    try:
        with suppress(NotImplementedError):  # a file system without locks: nobody can take it for left behind
            lock.acquire()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def clear_staged(folder: Path, names: str) -> None:
    """Delete what killed processes were preparing in `folder`, under names that fit the pattern `names`."""
    from filelock import FileLock, Timeout

    for file in folder.glob(f".{names}-*/{_IN_USE}"):
        with suppress(Timeout, OSError, NotImplementedError), FileLock(file, timeout=0):
            shutil.rmtree(file.parent, ignore_errors=True)


def publish(part: Path, path: Path) -> None:
    """Rename a finished file or folder `part` to `path`, on the same disk, once all of it is on the disk.

    What is at `path` is deleted afterwards. Where the system cannot exchange two folders at once (other than Linux), the old
    one lies beside `path` for an instant, and stays there if a kill falls into it; an error then puts it back.
    """
    tree = list(os.walk(part))
    with ThreadPoolExecutor(_SYNCS) as pool:  # a disk takes many at once as it takes one
        list(pool.map(_sync_file, (Path(folder, name) for folder, _, names in tree for name in names)))
    for folder, _, _ in tree:
        _sync_folder(Path(folder))
    if not part.is_dir():
        _sync_file(part)
        part.replace(path)
    elif not path.exists():
        part.rename(path)
    elif exchange(part, path):
        shutil.rmtree(part, ignore_errors=True)
    else:
        _replace_in_two_steps(part, path)
    _sync_folder(path.parent)


def _replace_in_two_steps(part: Path, path: Path) -> None:
    before = path.with_name(f".{path.name}.{uuid.uuid4().hex}.before")
    path.rename(before)
    try:
        part.rename(path)
    except OSError:
        before.rename(path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step, where the system can."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return function(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot open a folder, and then need no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
