"""Weights files: found, identified by hash, and read without running any code in them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from .._logging import logger
from .._settings import settings
from ..errors import CheckpointError, MissingWeightsError, ModelMismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["identify", "load_into", "read_state_dict", "recall"]


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: Any
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"weights {path.name!r} are damaged or hold more than tensors, and hespotex runs no code of a file: {error}"
        ) from error
    # The last four: a damaged pickle may end in almost anything.
    except (
        *(SafetensorError, RuntimeError, EOFError, OSError, ValueError),
        *(LookupError, TypeError, AttributeError, struct.error),
    ) as error:
        raise CheckpointError(f"weights {path.name!r} cannot be read: {error}") from error
    for wrapper in wrappers:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"weights {path.name!r} do not hold a mapping of names to tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_into(module: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Load all parameters of `module`, or say what does not fit.

    Raises
    ------
    CheckpointError
        If a tensor is missing, left over or of another shape.
    """
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            f"the weights do not fit {what}: {' '.join(line.strip() for line in lines[1:4])}"
            f"{' …' if len(lines) > 4 else ''}"
        ) from error


def _link(sha256: str) -> Path:
    return settings.cache_dir / "weights" / sha256


def _remember(path: Path, sha256: str) -> None:
    link = _link(sha256)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_file():
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    except OSError as error:  # a convenience only: the file system may have no links, or be read-only
        logger.debug("weights %s are not remembered: %s", path.name, error)
