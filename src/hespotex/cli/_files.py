"""What the commands read and write."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import check_writable
from ..errors import DataValueError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["MODEL_MARKS", "STORE_MARKS", "check_apart", "check_output", "write_store"]

STORE_MARKS = ("zarr.json", ".zgroup")  # of any zarr store
MODEL_MARKS = ("manifest.json",)  # of a saved model


def check_apart(slide: Path, out: Path) -> None:
    """Raise if the result would replace its own input, or what LazySlide keeps beside it."""
    from ..io._open import store_beside

    if out.resolve() == slide.resolve():
        raise DataValueError("--out is the slide itself; the result goes to a store of its own")
    store = store_beside(slide)
    if store is not None and out.resolve() == store.resolve():
        raise DataValueError(f"--out {out} is LazySlide's store of the slide; the result goes to a store of its own")


def check_output(out: Path, marks: tuple[str, ...], kind: str, *, overwrite: bool) -> None:
    """Raise before the work if its result could not be written, and make the folder above it."""
    if out.exists() and not overwrite:
        raise DataValueError(f"--out {out} exists; add --overwrite to replace it")
    if out.exists() and not any((out / mark).is_file() for mark in marks):
        raise DataValueError(f"--out {out} exists and is no {kind}, so it is not replaced; name another place")
    check_writable(out, f"--out {out}")
    out.parent.mkdir(parents=True, exist_ok=True)


def write_store(sdata: SpatialData, out: Path) -> None:
    """Write `sdata` to `out`, where it appears only when whole."""
    from .._files import publish
    from ..data.wsi import with_slide

    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        with_slide(sdata).write(part)
        publish(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
