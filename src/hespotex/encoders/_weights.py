"""Weights files: found, identified by hash, and read without running any code in them."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from .._keys import sanitize
from .._logging import logger
from .._settings import settings
from ..errors import CheckpointError, MissingWeightsError, ModelMismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["identify", "known_as", "load_into", "read_state_dict", "recall", "remember_as"]

# What a pickle is read by is a stack machine that the file drives: a damaged one makes it pop from an empty stack, look
# up what is not there, or call with the wrong arguments. Nothing of ours runs where these are caught.
_STACK_MACHINE = (LookupError, TypeError, AttributeError, ValueError, AssertionError, struct.error)
_SHOWN_MISFITS = 3


def identify(path: str | Path, *, expected: str | None = None) -> tuple[Path, str]:
    """The weights file and its SHA-256, which is remembered so that a model saved with it finds it again.

    Raises
    ------
    MissingWeightsError
        If there is no such file.
    ModelMismatchError
        If it is not the file that is expected.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingWeightsError(f"weights={str(path)!r} is not a file")
    sha256 = hash_file(path)
    if expected is not None and sha256 != expected:
        raise ModelMismatchError(
            f"weights={str(path)!r} has SHA-256 {sha256[:12]}…, but the embedding was made with {expected[:12]}…: "
            f"features of other weights cannot be mixed with it"
        )
    _remember(path, sha256)
    return path, sha256


def recall(sha256: str) -> Path | None:
    """A file of this hash that was used before on this machine, if it is still there and unchanged."""
    link = _link(sha256)
    if not link.is_file() or hash_file(link) != sha256:
        return None
    return link.resolve()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, read once in a process while its size and time of change stay."""
    path = path.resolve()
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, mtime_ns: int) -> str:  # size and time are there to tell files apart
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state_dict(path: Path, wrappers: Sequence[str] = ("state_dict", "model")) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file or a PyTorch checkpoint; the latter is unpickled as data only.

    Checkpoints of whole trainings hold them under one of the names `wrappers`.

    Raises
    ------
    CheckpointError
        If the file is damaged, or holds more than tensors.
    """
    import torch

    state = _read_safetensors(path) if _is_safetensors(path) else _read_checkpoint(path)
    for wrapper in wrappers:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"weights {path.name!r} do not hold a mapping of names to tensors")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes; the hub's cache holds files whose name is a hash.

    Such a file begins with the length of a header, eight bytes, and the header with a brace.
    """
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {path.name!r} cannot be read: {error}") from error


def _read_checkpoint(path: Path) -> Any:
    import torch

    is_archive = zipfile.is_zipfile(path)  # as all since PyTorch 1.6; the tensors of one can stay in the file
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except UnpicklingError as error:
        raise CheckpointError(
            f"weights {path.name!r} are damaged or hold more than tensors, and hespotex runs no code of a file: {_core(error)}"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(f"weights {path.name!r} cannot be read: {error}") from error
    except _STACK_MACHINE as error:
        raise CheckpointError(f"weights {path.name!r} are damaged: {type(error).__name__}: {error}") from error


def _core(error: Exception) -> str:
    """What torch found, without its advice to trust the file or to report it."""
    found = re.search(r"^.*(?:\bGLOBAL\b|Unsupported|unsupported).*$", str(error), re.MULTILINE)
    return found[0].strip().rstrip(".") if found else type(error).__name__


def load_into(module: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str, *, assign: bool = False) -> None:
    """Load all parameters of `module`, or say what does not fit.

    Parameters
    ----------
    module
        The network.
    state
        Its tensors by name.
    what
        The network in words.
    assign
        Put the tensors in place of the parameters and not into them, which a network on the ``meta`` device needs.

    Raises
    ------
    CheckpointError
        If a tensor is missing, left over or of another shape.
    """
    try:
        module.load_state_dict(dict(state), strict=True, assign=assign)
    except RuntimeError as error:
        lines = str(error).splitlines()[1:]
        shown = " ".join(_short(line.strip()) for line in lines[:_SHOWN_MISFITS])
        more = " …" if len(lines) > _SHOWN_MISFITS else ""
        raise CheckpointError(f"the weights do not fit {what}: {shown}{more}") from error


def _short(line: str, longest: int = 300) -> str:
    """A line of the message; that of missing tensors names hundreds in one."""
    return line if len(line) <= longest else line[: longest - 1].rstrip(' ",') + " …"


def remember_as(name: str, path: Path) -> None:
    """Remember that `path` was given as the weights of encoder `name`, which finds it without being told again."""
    _put_link(_named(name), path)


def known_as(name: str) -> Path | None:
    """The file last given as the weights of encoder `name` on this machine, if it is still there."""
    link = _named(name)
    return link.resolve() if link.is_file() else None


def _named(name: str) -> Path:
    key = sanitize(name)
    if key != name:  # others may come to the same
        key = f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return settings.cache_dir / "weights" / "by_name" / key


def _link(sha256: str) -> Path:
    return settings.cache_dir / "weights" / sha256


def _remember(path: Path, sha256: str) -> None:
    link = _link(sha256)
    if not link.is_file():
        _put_link(link, path)


def _put_link(link: Path, path: Path) -> None:
    beside = link.with_name(f"{link.name}.{os.getpid()}")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.resolve())
        beside.replace(link)  # at once: another process may look it up
    except OSError as error:  # a convenience only: the file system may have no links, or be read-only
        logger.debug("weights %s are not remembered: %s", path.name, error)
