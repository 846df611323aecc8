"""Fitted models by identity, in the content-addressed cache, so that an object can name the model it trained."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._settings import settings
from ..errors import DataValueError
from ._base import config_to_json
from ._checkpoint import load
from ._registry import names

if TYPE_CHECKING:
    from ._base import Model

__all__ = ["identify", "recall", "remember"]

_IDENTITY = re.compile(r"[\w.-]+@[0-9a-f]{16}")


def identify(model: Model) -> str:
    """Name and hash of all that a fitted model predicts with, its recipe included: ``ridge@1f3c…``."""
    arrays, values = model.state()
    digest = hashlib.sha256()
    recipe = None if model.recipe is None else model.recipe.to_json()
    head = [model.info.name, model.unit, model.genes, config_to_json(model.config), values, recipe]
    digest.update(json.dumps(head, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.data)
    return f"{model.info.name}@{digest.hexdigest()[:16]}"


def _folder(identity: str) -> Path:
    return settings.cache_dir / "models" / identity


def remember(model: Model) -> str:
    """Keep `model` in the cache; returns its identity."""
    identity = identify(model)
    folder = _folder(identity)
    if not folder.exists():
        try:
            model.save(folder)
        except (OSError, DataValueError):
            if not folder.exists():  # else another process, which trained the same model, was faster
                raise
    return identity


def recall(name: str | Path) -> Model:
    """The model saved at a path, or kept in the cache under an identity."""
    text = str(name)
    if _IDENTITY.fullmatch(text) and not Path(text).exists():
        if not _folder(text).exists():
            raise DataValueError(
                f"model={text!r} is no longer in the cache {str(settings.cache_dir)!r}; give the model itself or the "
                "path it was saved to: hx.tl.predict(sdata, model='path')"
            )
        return load(_folder(text))
    if text in names() and not Path(text).exists():
        raise DataValueError(
            f"model={text!r} names a method, which has to be trained first: model = hx.tl.train(sections, {text!r})"
        )
    return load(name)
