"""Package-wide settings: validated on assignment, read from ``HESPOTEX_*``, overridable for a block."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._logging import set_verbosity
from .errors import DataValueError

__all__ = ["Settings", "available_cpus", "settings"]


def _positive(value: Any) -> int:
    number = int(value)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _not_negative(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError("must not be negative")
    return number


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _device(value: Any) -> str:
    device = str(value)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError("must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps'")
    return device


def _verbosity(value: Any) -> str:
    if value not in {"error", "warning", "info", "debug"}:
        raise ValueError("must be 'error', 'warning', 'info' or 'debug'")
    return str(value)


def _path(value: Any) -> Path:
    return Path(value).expanduser()


def _optional_path(value: Any) -> Path | None:
    return None if value in (None, "") else _path(value)


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hespotex"


def available_cpus() -> int:
    """CPUs this process may use, which a container or a scheduler limits; not those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_FIELDS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "device": (_device, lambda: "auto"),
    "batch_size": (_positive, lambda: 64),
    "n_jobs": (_positive, available_cpus),
    "progress_bar": (_flag, lambda: True),
    "cache_dir": (_path, _default_cache),
    "work_dir": (_optional_path, lambda: None),
    "seed": (_not_negative, lambda: 0),
    "verbosity": (_verbosity, lambda: "warning"),
    "default_model": (_optional_path, lambda: None),
}


class Settings:
    """Package-wide settings.

    Attributes
    ----------
    device
        ``"auto"`` (CUDA, then MPS, then CPU), ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"``.
    batch_size
        Tiles per forward pass of an encoder.
    n_jobs
        Threads of work that runs in threads; by default the CPUs this process may use.
    progress_bar
        Whether long work shows progress.
    cache_dir
        Folder of the content-addressed cache; it may be deleted at any time.
    work_dir
        Folder of partial results of interrupted work, by default in `cache_dir`. In a folder named here they stay until
        you delete it, also when the work is done.
    seed
        Seed used where a call gives none.
    verbosity
        Level of the logger ``"hespotex"``: ``"error"``, ``"warning"``, ``"info"`` or ``"debug"``. To see its messages,
        give logging a handler: ``logging.basicConfig()``. What must not be missed is a Python warning instead.
    default_model
        Model folder that answers ``hx.tl.predict(sdata)`` where the object names none.

    Each is first read from the environment variable ``HESPOTEX_<NAME>``, unless that is empty.

    Examples
    --------
    >>> import hespotex as hx
    >>> with hx.settings.override(device="cpu", seed=1):
    ...     hx.settings.seed
    1
    """

    device: str
    batch_size: int
    n_jobs: int
    progress_bar: bool
    cache_dir: Path
    work_dir: Path | None
    seed: int
    verbosity: str
    default_model: Path | None

    def __init__(self) -> None:
        for name, (_, default) in _FIELDS.items():
            setattr(self, name, os.environ.get(f"HESPOTEX_{name.upper()}") or default())

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            raise AttributeError(f"settings have no {name!r}; there are {', '.join(_FIELDS)}")
        try:
            checked = _FIELDS[name][0](value)
        except (TypeError, ValueError) as error:
            raise DataValueError(f"settings.{name}={value!r}: {error}") from None
        object.__setattr__(self, name, checked)
        if name == "verbosity":
            set_verbosity(checked)

    def __repr__(self) -> str:
        return "\n".join(f"{name} = {getattr(self, name)!r}" for name in _FIELDS)

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block."""
        before = {name: getattr(self, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


settings = Settings()
