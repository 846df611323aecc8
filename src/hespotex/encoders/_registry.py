"""Which encoders there are: ours by name, others through the entry-point group ``hespotex.encoders``."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import DataTypeError, DataValueError
from ._base import Encoder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["available", "create", "get", "register"]

# Module and class of each built-in encoder; a module imports what it needs when an encoder is made.
_BUILTIN = {
    "morphology": ("hespotex.encoders.morphology", "Morphology"),
    "quiltnet": ("hespotex.encoders.open_clip", "QuiltNet"),
    "open_clip": ("hespotex.encoders.open_clip", "OpenClipEncoder"),
    "timm": ("hespotex.encoders.timm", "TimmEncoder"),
    "hipt": ("hespotex.encoders.hipt", "HIPT"),
    "rgb": ("hespotex.encoders.rgb", "MeanColour"),
    "crops": ("hespotex.encoders.crops", "Crops"),
    "dense": ("hespotex.encoders.dense", "Dense"),
    "pyramid": ("hespotex.encoders.pyramid", "Pyramid"),
}
_REGISTERED: dict[str, type[Encoder]] = {}


def register(encoder: type[Encoder]) -> type[Encoder]:
    """Class decorator: make an encoder known by the name in its ``info``."""
    _REGISTERED[encoder.info.name] = encoder
    return encoder


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="hespotex.encoders")}


def _known() -> list[str]:
    return sorted({*_BUILTIN, *_REGISTERED, *_plugins()})


def get(name: str) -> type[Encoder]:
    """The class of encoder `name`; for ``"timm:resnet50"`` that of the family ``"timm"``.

    Raises
    ------
    DataValueError
        If there is none; the nearest names are suggested.
    """
    family, _, architecture = str(name).partition(":")
    if family not in _REGISTERED:
        if family in _BUILTIN:
            module, attribute = _BUILTIN[family]
            _REGISTERED[family] = getattr(import_module(module), attribute)
        elif family in (plugins := _plugins()):
            _REGISTERED[family] = plugins[family].load()
        else:
            near = difflib.get_close_matches(family, _known())
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataValueError(f"encoder={name!r} is unknown; {hint}there are {', '.join(map(repr, _known()))}")
    encoder = _REGISTERED[family]
    if encoder.info.is_family != bool(architecture):
        form = f"{family}:<{encoder.info.argument}>" if encoder.info.is_family else family
        raise DataValueError(f"encoder={name!r} must be written {form!r}")
    return encoder


def create(name: str, **params: Any) -> Encoder:
    """An encoder by name.

    Parameters
    ----------
    name
        Name in the registry; for families with what follows the colon: ``"timm:<architecture>"``,
        ``"open_clip:<architecture>"``, ``"dense:<encoder>"``, ``"pyramid:<encoder>"``.
    params
        Options of the encoder; ``create(**encoder.params())`` makes an equal one, given ``weights=`` if
        it has any that are not found by themselves.

    Raises
    ------
    DataValueError
        If the name is unknown.
    DataTypeError
        If an option is unknown.
    """
    kind = get(name)
    architecture = name.partition(":")[2]
    if architecture:
        params = {kind.info.argument: architecture, **params}
    try:
        return kind(**params)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise DataTypeError(f"encoder {name!r}: {error}") from error
        raise


def available() -> pd.DataFrame:
    """Table of all encoders: width, resolution, tile size, licence, whether gated, and what to install.

    Examples
    --------
    >>> import hespotex as hx
    >>> "quiltnet" in hx.encoders.available().index
    True
    """
    import pandas as pd

    names = _known()
    infos = [(_REGISTERED.get(name) or _class(name)).info for name in names]
    rows = [
        {
            "n_features": info.n_features,
            "mpp": info.mpp,
            "tile_um": info.tile_um,
            "licence": info.licence,
            "gated": info.gated,
            "extra": info.extra,
            "summary": info.summary,
        }
        for info in infos
    ]
    labels = [f"{info.name}:<{info.argument}>" if info.is_family else info.name for info in infos]
    table = pd.DataFrame(rows, index=pd.Index(labels, name="encoder"))
    return table.astype({"n_features": "Int64"})


def _class(name: str) -> type[Encoder]:
    if name in _BUILTIN:
        module, attribute = _BUILTIN[name]
        return getattr(import_module(module), attribute)
    return _plugins()[name].load()
