"""Which encoders there are: ours by name, others through the entry-point group ``hespotex.encoders``."""

from __future__ import annotations

import copy
import inspect
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import DataTypeError, DataValueError, ModelMismatchError
from ._base import Encoder, EncoderInfo, TileEncoder
from ._names import near
from ._published import PUBLISHED

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_encoder", "available", "create", "get", "is_known", "register", "remember"]

# Module and class of each built-in encoder; a module imports what it needs when an encoder is made.
_BUILTIN = {
    "morphology": ("hespotex.encoders.morphology", "Morphology"),
    "quiltnet": ("hespotex.encoders.open_clip", "QuiltNet"),
    "open_clip": ("hespotex.encoders.open_clip", "OpenClipEncoder"),
    "timm": ("hespotex.encoders.timm", "TimmEncoder"),
    "lazyslide": ("hespotex.encoders.lazyslide", "LazySlideEncoder"),
    "hipt": ("hespotex.encoders.hipt", "HIPT"),
    "rgb": ("hespotex.encoders.rgb", "MeanColour"),
    "crops": ("hespotex.encoders.crops", "Crops"),
    "dense": ("hespotex.encoders.dense", "Dense"),
    "pyramid": ("hespotex.encoders.pyramid", "Pyramid"),
}
_REGISTERED: dict[str, type[Encoder]] = {}
_OWN: dict[str, TileEncoder] = {}  # made by the user of a module or function in this session


def register(encoder: type[Encoder]) -> type[Encoder]:
    """Class decorator: make an encoder known by the name in its ``info``."""
    _REGISTERED[encoder.info.name] = encoder
    return encoder


def remember(encoder: TileEncoder) -> None:
    """Let :func:`create` find an encoder that is no class of its own; a later one of its name takes its place."""
    _OWN[encoder.name] = encoder


def is_known(name: str) -> bool:
    """Whether `name` belongs to an encoder that is not the user's own."""
    return name.partition(":")[0] in {*_BUILTIN, *PUBLISHED, *_REGISTERED, *_plugins()}


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="hespotex.encoders")}


def _known() -> list[str]:
    return sorted({*_BUILTIN, *PUBLISHED, *_REGISTERED, *_plugins(), *_OWN})


def get(name: str) -> type[Encoder]:
    """The class of encoder `name`; for ``"timm:resnet50"`` that of the family ``"timm"``.

    Raises
    ------
    DataValueError
        If there is none; the nearest names are suggested.
    """
    family, _, architecture = str(name).partition(":")
    encoder = _found(family, name)
    if encoder.info.is_family != bool(architecture):
        form = f"{family}:<{encoder.info.argument}>" if encoder.info.is_family else family
        raise DataValueError(f"encoder={name!r} must be written {form!r}")
    return encoder


def _found(family: str, name: str) -> type[Encoder]:
    """The class of an encoder or family, imported on first use; `name` is what was asked for."""
    if family in _REGISTERED:
        return _REGISTERED[family]
    if family in _BUILTIN:
        module, attribute = _BUILTIN[family]
        kind = getattr(import_module(module), attribute)
    elif family in PUBLISHED:
        from .pretrained import encoder_class

        kind = encoder_class(family)
    elif family in (plugins := _plugins()):
        kind = plugins[family].load()
    else:
        like = near(family, _known(), n=3)
        hint = f"did you mean {' or '.join(map(repr, like))}? " if like else ""
        raise DataValueError(
            f"encoder={name!r} is unknown; {hint}there are {', '.join(map(repr, _known()))}. An encoder of your own must be "
            f"made in this session first: hx.encoders.from_module(module, name={name!r})"
        )
    return _REGISTERED.setdefault(family, kind)


def create(name: str, **params: Any) -> Encoder:
    """An encoder by name.

    Parameters
    ----------
    name
        Name in the registry; for families with what follows the colon: ``"timm:<architecture>"``,
        ``"timm:hf-hub:<owner>/<model>"``, ``"open_clip:<architecture>"``, ``"lazyslide:<model>"``, ``"dense:<encoder>"``,
        ``"pyramid:<encoder>"``.
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
    if name in _OWN:
        return _own(_OWN[name], params)
    kind = get(name)
    architecture = name.partition(":")[2]
    if architecture:
        params = {kind.info.argument: architecture, **params}
    known = inspect.signature(kind).parameters
    unknown = [option for option in params if option not in known]
    if unknown and all(parameter.kind != parameter.VAR_KEYWORD for parameter in known.values()):
        raise DataTypeError(
            f"encoder {name!r} has no option {', '.join(f'{option}=' for option in unknown)}; it has "
            f"{', '.join(f'{option}=' for option in known if option != kind.info.argument)}"
        )
    return kind(**params)


def _own(encoder: TileEncoder, params: dict[str, Any]) -> Encoder:
    """An encoder of the user's own again, for tiles of another size if asked."""
    known = encoder.params()
    sizes = {key: params.pop(key, None) for key in ("tile_um", "mpp")}
    if unknown := sorted(params.keys() - known.keys()):
        raise DataTypeError(f"encoder {encoder.name!r}: unexpected options {unknown}; it is made already")
    if differing := [key for key, value in params.items() if known[key] != value]:
        key = differing[0]
        raise ModelMismatchError(
            f"encoder {encoder.name!r} of this session has {key}={known[key]!r}, and not {params[key]!r}: its "
            f"features cannot be mixed with those of the other; make that one again, or give this one a name of its own"
        )
    if sizes["tile_um"] in (None, encoder.tile_um) and sizes["mpp"] in (None, encoder.mpp):
        return encoder
    other = copy.copy(encoder)
    other.set_size(**sizes, default_um=encoder.tile_um)
    return other


def as_encoder(encoder: str | Encoder | Any, **options: Any) -> Encoder:
    """The encoder that is meant: made by name, of a torch module or a function, or as it is.

    Parameters
    ----------
    encoder
        A name (:func:`create`), a ``torch.nn.Module`` or a function of tiles (:func:`from_module`), or an encoder.
    options
        For making it.

    Raises
    ------
    DataTypeError
        If it is none of these.
    DataValueError
        If options are given for an encoder that is made already.
    """
    if isinstance(encoder, str):
        return create(encoder, **options)
    if isinstance(encoder, Encoder):
        if options:
            raise DataValueError(
                f"{sorted(options)} are options for making an encoder; {encoder.name!r} is made already"
            )
        return encoder
    if isinstance(encoder, type) or not callable(encoder):
        raise DataTypeError(
            f"encoder must be a name, an Encoder, a torch.nn.Module or a function, got {type(encoder).__name__}"
        )
    from .module import from_module

    return from_module(encoder, **options)


def available(family: str | None = None) -> pd.DataFrame:
    """Table of all encoders: width, resolution, tile size, licence, whether gated and cached, and what to install.

    Parameters
    ----------
    family
        ``"lazyslide"`` for the models of that family, one by one, which loads the package. By default each family is
        one row.

    Returns
    -------
    One row for each encoder, with its name as index. ``cached``: whether it runs without the network, because its weights
    lie in the hub's cache, were given as a file before, or are not needed; missing where that depends on what is asked for, or is not known.

    Raises
    ------
    DataValueError
        If the models of `family` are not listed anywhere.

    Examples
    --------
    >>> import hespotex as hx
    >>> "quiltnet" in hx.encoders.available().index
    True
    """
    import pandas as pd

    if family == "lazyslide":
        from .lazyslide import infos

        listed = infos()
    elif family is None:
        listed = [(info, _is_cached(info)) for info in map(_info, _known())]
    else:
        raise DataValueError(f"family={family!r}: only 'lazyslide' lists its models; those of timm: timm.list_models()")
    rows = [
        {
            "n_features": info.n_features,
            "mpp": info.mpp,
            "tile_um": info.tile_um,
            "licence": info.licence,
            "gated": info.gated,
            "extra": info.extra,
            "cached": cached,
            "summary": info.summary,
        }
        for info, cached in listed
    ]
    labels = [f"{info.name}:<{info.argument}>" if info.is_family else info.name for info, _ in listed]
    table = pd.DataFrame(rows, index=pd.Index(labels, name="encoder"))
    return table.astype({"n_features": "Int64", "cached": "boolean"})


def _info(name: str) -> EncoderInfo:
    if name in _OWN:
        return _OWN[name].info
    if name in PUBLISHED:
        return PUBLISHED[name].info
    return _found(name, name).info


def _is_cached(info: EncoderInfo) -> bool | None:
    from ._hub import is_cached

    if info.is_family:
        return None
    return not info.needs_weights or is_cached(info.name, info.hub_id, info.hub_files)
