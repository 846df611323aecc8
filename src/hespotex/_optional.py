"""Import of heavy or optional packages, each with a clear error, in one place."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import MissingDependencyError

_OPERATORS: Any = None  # keeps the operator schemas of ensure_torchvision alive

_NEEDS_TORCHVISION = {"timm", "open_clip", "cellpose", "lightning", "torchmetrics", "torchvision"}


def ensure_torchvision() -> None:
    """Let torchvision import beside a torch that its compiled operators do not fit.

    The registry's torchvision is linked to CUDA; beside a CPU build of torch its first import dies with
    "operator torchvision::nms does not exist", and takes timm, open_clip, cellpose and lightning with it.
    Where its library cannot be loaded, the schemas of the two missing operators are declared. Must run
    before the first import of torchvision; does nothing where torchvision is whole or absent.
    """
    global _OPERATORS
    if "torchvision" in sys.modules or _OPERATORS is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    for folder in spec.submodule_search_locations:
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            return
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def optional_import(name: str, *, feature: str, extra: str | None = None) -> ModuleType:
    """Import `name`, or say which feature needs it and how to install it.

    Raises
    ------
    MissingDependencyError
        If the package is absent, or present but broken; the cause is shown.
    """
    if name.split(".")[0] in _NEEDS_TORCHVISION:
        ensure_torchvision()
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        package = f"hespotex[{extra}]" if extra else name
        raise MissingDependencyError(
            f"{feature} needs the package {name!r}, which could not be imported ({error}). "
            f"Install it with: pip install '{package}'"
        ) from error
