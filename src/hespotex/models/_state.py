"""The state of a fit on disk, from which it goes on after an interruption."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .._files import staged
from .._version import __version__
from ..errors import HespotexWarning

__all__ = ["read_state", "state_key", "write_state"]


def write_state(trainer: Any, path: Path) -> None:
    """Save all that the fit needs to go on, so that a kill leaves the state before or this one."""
    with staged(path) as folder:
        part = folder / path.name
        trainer.save_checkpoint(part)  # of several processes the first writes
        if trainer.is_global_zero:
            part.replace(path)


def read_state(path: Path) -> dict[str, Any] | None:
    """The saved state, without unpickling objects; ``None`` if there is none or it is damaged.

    A damaged one is set aside as ``<name>.damaged``. What may pass, such as too many open files, too little memory or a
    drive that is away, is raised: hours of training may lie there.
    """
    import torch

    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # torch raises whatever a damaged archive provokes
        aside = path.with_suffix(".damaged")
        warnings.warn(
            f"the state of an interrupted fit in {path} cannot be read ({error}); it is kept as {aside.name}, and training "
            "starts anew",
            HespotexWarning,
            stacklevel=3,
        )
        with suppress(FileNotFoundError):  # another process of this fit may have moved it
            path.replace(aside)
        return None


def state_key(module: Any, items: Sequence[Any], validation: Sequence[Any], settings: tuple[Any, ...]) -> str:
    """Digest of all that determines a fit: what is kept of another must not be gone on with."""
    # The words of network and optimiser hold what their tensors do not: dropout, learning rate, weight decay. Those of a
    # scheduler hold its address, which differs from run to run.
    words = re.sub(r" at 0x[0-9a-f]+", "", repr((__version__, settings, module, module.configure_optimizers())))
    digest = hashlib.sha256(words.encode())
    digest.update(repr(sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str))).encode())
    _absorb(digest, module.state_dict())
    for sequence in (items, validation):
        digest.update(f"|{len(sequence)}".encode())
        for index in range(len(sequence)):
            _absorb(digest, sequence[index])
    return digest.hexdigest()


def _absorb(digest: Any, value: Any) -> None:
    """Feed the content of an item into a hash."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            value = value.to_sparse_coo().coalesce()
            _absorb(digest, (value.indices(), value.values(), tuple(value.shape)))
            return
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _absorb(digest, value[key])
    elif is_dataclass(value):
        for part in fields(value):
            _absorb(digest, getattr(value, part.name))
    elif isinstance(value, tuple | list):
        for part in value:
            _absorb(digest, part)
    elif hasattr(value, "to_dict"):  # torch_geometric's Data
        _absorb(digest, value.to_dict())
    else:
        digest.update(repr(value).encode())
