"""What a result in the folder says of itself: it is known by this alone, whatever became of the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._keys import Keys

__all__ = ["Written", "written"]

_COHORT = "cohort"  # uns["hespotex"] or attrs["hespotex"] of a result: of what it is the result
_SLIDE = "slide"  # beside it: the slide it belongs to


@dataclass(frozen=True)
class Written:
    """Of what something is the result, which is kept in it.

    Parameters
    ----------
    identity
        Digest of slide, model and options.
    model, options
        What was predicted with.
    n_tiles, n_genes
        Its size.
    file, size, fingerprint
        The slide: name, bytes, and hash of samples of its content.
    """

    identity: str
    model: str = ""
    options: str = ""
    n_tiles: int = 0
    n_genes: int = 0
    file: str = ""
    size: int = 0
    fingerprint: str = ""

    def exactly(self) -> tuple[Any, ...]:
        """Equal for results of a slide, model and options."""
        return self.file, self.identity

    def but_for_time(self) -> tuple[Any, ...]:
        """Equal also for those of a slide that was copied or touched, which has another time of change."""
        return self.file, self.size, self.fingerprint, self.model, self.options

    def entries(self, scale: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The entries of ``hespotex`` in the result; `scale` is more to say of the slide."""
        cohort = asdict(self)
        slide = {name: cohort.pop(name) for name in ("file", "size", "fingerprint")}
        return {_SLIDE: slide | dict(scale), _COHORT: cohort}


def written(output: Path) -> Written | None:
    """What `output` says of itself; ``None`` if it is not there, or was not written by a cohort."""
    try:
        found = _of_store(output) if output.is_dir() else _of_h5ad(output)
        return Written(**{name: found[name] for name in Written.__dataclass_fields__ if name in found})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _of_store(output: Path) -> dict[str, Any]:
    entries = json.loads((output / "zarr.json").read_text())["attributes"][Keys.NAMESPACE]
    if (output / "images").exists():
        raise ValueError("results hold no pixels: somebody made a slide of one")
    return entries[_SLIDE] | entries[_COHORT]


def _of_h5ad(output: Path) -> dict[str, Any]:
    import h5py

    with h5py.File(output, "r") as file:
        entries = file[f"uns/{Keys.NAMESPACE}"]
        found = {**entries[_SLIDE], **entries[_COHORT]}
        return {name: _plain(found[name][()]) for name in Written.__dataclass_fields__ if name in found}


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.item()
