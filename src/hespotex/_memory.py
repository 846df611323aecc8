"""Memory that can still be had, on the machine and within the limits of a container or a batch job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be had; ``None`` where the system does not say.

    That is what is free on the machine, or less if the process belongs to a control group whose limit is nearer: a
    container's, or that of a SLURM job.

    Parameters
    ----------
    root
        Folder that holds ``proc`` and ``sys``.
    """
    found = [_free_on_machine(root), *(_free_in_group(*group) for group in _groups(root))]
    return min((free for free in found if free is not None), default=None)


def _free_on_machine(root: Path) -> int | None:
    """By the kernel's own estimate; only Linux has it."""
    kilobytes = _entry(root / "proc/meminfo", "MemAvailable:")
    return None if kilobytes is None else 1024 * kilobytes


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the process's memory groups and of all above them, with the names of limit, usage and cache there."""
    cgroup = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            base, names = cgroup, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and absent here: what limits the container lies at the base then.
        folder = base.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for group in (folder, *folder.parents):
            yield group, *names
            if group == base:
                break


def _free_in_group(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """What the limit of a group leaves; pages of files that nobody has used lately are given up when memory is short."""
    allowed, used = _number(_text(group / limit)), _number(_text(group / usage))
    if allowed is None or used is None:
        return None
    return max(allowed - used + (_entry(group / "memory.stat", cache) or 0), 0)


def _entry(path: Path, name: str) -> int | None:
    """The number after `name` in a file of one entry a line."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((_number(words[1]) for words in lines if len(words) > 1 and words[0] == name), None)


def _number(text: str) -> int | None:
    """A number; ``None`` for ``max``, which is no limit, and for what is not there."""
    return int(text) if text.strip().isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
