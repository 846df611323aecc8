"""Which models there are: ours by name, others through the entry-point group ``hespotex.models``."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import DataValueError
from ._base import Model

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["available", "create", "get", "register"]

# Module of each built-in model, imported when first asked for: the heavy ones load torch.
_BUILTIN = {
    "hespotex": "hespotex.models.hespotex",
    "histex": "hespotex.models.histex",
    "hisdiff": "hespotex.models.hisdiff",
    "bleep": "hespotex.models.bleep",
    "istar": "hespotex.models.istar",
    "ridge": "hespotex.models.ridge",
    "ridge_parts": "hespotex.models.ridge_parts",
    "stage": "hespotex.models.stage",
    "mlp": "hespotex.models.mlp",
    "knn": "hespotex.models.knn",
    "mean": "hespotex.models.mean",
    "xfuse": "hespotex.models.xfuse",
    "stand": "hespotex.models.stand",
    "tesla": "hespotex.models.tesla",
    "interpolate": "hespotex.models.interpolate",
}
_REGISTERED: dict[str, type[Model]] = {}


def register(model: type[Model]) -> type[Model]:
    """Class decorator: make a model known by the name in its ``info``."""
    _REGISTERED[model.info.name] = model
    return model


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="hespotex.models")}


def names() -> list[str]:
    """All models that can be had."""
    return sorted({*_BUILTIN, *_REGISTERED, *_plugins()})


def distributed_names() -> list[str]:
    """Models whose fit can be shared out among devices."""
    return [name for name in names() if get(name).info.distributed]


def get(name: str) -> type[Model]:
    """The class of model `name`.

    Raises
    ------
    DataValueError
        If there is none; the nearest names are suggested.
    """
    if name not in _REGISTERED:
        if name in _BUILTIN:
            import_module(_BUILTIN[name])
        elif name in (plugins := _plugins()):
            register(plugins[name].load())
        else:
            known = names()
            near = difflib.get_close_matches(name, known)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataValueError(f"model={name!r} is unknown; {hint}available: {', '.join(map(repr, known))}")
    return _REGISTERED[name]


def create(name: str, *, preset: str | None = None, config: Any = None, **options: Any) -> Model:
    """An unfitted model by name.

    Parameters
    ----------
    name
        Name in the registry.
    preset
        Named config to start from, such as ``"paper"``; not together with `config`.
    config
        The model's config dataclass or a mapping of its fields.
    options
        Single fields of the config.
    """
    kind = get(name)
    if preset is not None:
        if config is not None:
            raise DataValueError("give either preset= or config=, not both")
        config = kind.preset(preset)
    return kind(config, **options)


def available() -> pd.DataFrame:
    """Table of all models: level, task, what they need, presets, paper.

    Examples
    --------
    >>> import hespotex as hx
    >>> "ridge" in hx.models.available().index
    True
    """
    import pandas as pd

    names = sorted({*_BUILTIN, *_REGISTERED, *_plugins()})
    infos = [get(name).info for name in names]
    rows = [
        {
            "level": info.level,
            "task": info.task,
            "needs": ", ".join(info.needs),
            "trained": info.trained,
            "uncertainty": info.uncertainty,
            "distributed": info.distributed,
            "cost": info.cost,
            "presets": ", ".join(info.presets),
            "summary": info.summary,
            "paper": info.paper,
        }
        for info in infos
    ]
    return pd.DataFrame(rows, index=pd.Index(names, name="model"))
