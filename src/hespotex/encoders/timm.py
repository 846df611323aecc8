"""Any architecture of timm, with a weights file or a model of the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._optional import optional_import
from ..errors import CheckpointError, DataValueError, MissingWeightsError
from ._base import EncoderInfo
from ._hub import HUB, find_described, find_weights
from ._layouts import classifier_of, fit_input, layer
from ._licence import show_hub_licence
from ._names import near
from ._network import NetworkEncoder, triple
from ._weights import load_into, read_state_dict

__all__ = ["TimmEncoder"]

PRETRAINED = "pretrained"
_CONFIG = "config.json"


class TimmEncoder(NetworkEncoder):
    """A timm network without its classifier.

    Parameters
    ----------
    architecture
        Name in timm, such as ``"resnet50"``; ``"hf-hub:<owner>/<model>"``, a model of the hub in timm's layout, whose
        configuration is followed; or the folder of such a model on this machine.
    weights
        Weights file (safetensors, or a PyTorch state dict), the folder it lies in, ``"hf-hub:<owner>/<model>"``, or
        ``"pretrained"`` for those that timm names for the architecture, from the hub. It may be left out for a model of
        the hub or a folder, and if this machine has seen a file with `weights_sha256` before.
    revision
        Commit, tag or branch of the hub's model to take.
    config
        Of a model of the hub, in place of its ``config.json``: what :meth:`params` holds of it.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default, the resolution most
        pathology encoders are trained at.
    tile_px
        Side of the network's input; that of timm's configuration by default. Transformers take a multiple of their patch,
        positions being interpolated; some architectures take one side alone.
    mean, std
        Normalisation of values in [0, 1], one number or one per channel; those of timm's configuration by default. They
        must be what the weights were trained with, and a wrong choice raises no error.
    pad_type
        Padding of convolutions where the architecture has a choice; ``"same"`` for weights from TensorFlow.
    pooling
        Of vision transformers: ``"class"``, ``"mean"``, ``"class+mean"`` or ``"class+centre"`` (the class token and the mean
        of the patches in the middle), normalised as the architecture does with its own, which is the default.
    model_args
        Further arguments of the architecture, JSON values, such as ``{"init_values": 1e-5}``.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    weights_name, weights_sha256
        Identity of the weights, as :meth:`params` gives it.

    Raises
    ------
    MissingWeightsError
        If there are no weights, or the hub does not give them.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    CheckpointError
        If they are damaged or of another architecture.
    DataValueError
        If timm has no such architecture, the hub's models no such name, or the network no use for `tile_px`.

    Warns
    -----
    HespotexWarning
        On first use of weights of the hub, of their licence.
    """

    info = EncoderInfo(
        name="timm",
        summary="any architecture of timm, with a weights file or a model of the hub",
        mpp=0.5,
        licence="that of the weights",
        extra="encoders",
        is_family=True,
        is_network=True,
    )

    def __init__(
        self,
        architecture: str,
        weights: str | Path | None = None,
        *,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        tile_um: float | None = None,
        mpp: float | None = None,
        tile_px: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        pad_type: str | None = None,
        pooling: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        weights_name: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        timm = optional_import("timm", feature="the encoder 'timm'", extra="encoders")
        from ._pooling import Pooled

        if tile_px is not None and tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        source = _source(timm, architecture, revision, config)
        self.name = f"timm:{source.name}"
        self.architecture = source.architecture
        if not timm.is_model(source.architecture):
            like = near(source.architecture, timm.list_models())
            raise DataValueError(
                f"timm has no architecture {source.architecture!r}" + (f"; near: {like}" if like else "")
            )
        if weights is None:
            weights = source.folder
        hub_id = source.hub_id
        if weights == PRETRAINED:
            weights, hub_id = None, _published(timm, source.architecture)
        self._weights = find_weights(
            self.name, weights, hub_id=hub_id, revision=revision, name=weights_name, sha256=weights_sha256
        )
        if self._weights.name.startswith(HUB):
            hub_id = self._weights.name.removeprefix(HUB)
        if hub_id:
            show_hub_licence(self.name, hub_id)
        self._model_args = {**source.arguments, **(model_args or {})}
        model = _create(timm, source.architecture, self._model_args, pad_type)
        module = Pooled(model, pooling, self.name)
        left_out = classifier_of(model, model.state_dict())
        state = {name: value for name, value in read_state_dict(self._weights.path).items() if name not in left_out}
        load_into(model, state, f"architecture {source.architecture!r} of timm without classifier")
        self._weights.remember()

        known = timm.data.resolve_data_config({}, pretrained_cfg={**model.pretrained_cfg, **source.pretrained})
        own_px = int(known["input_size"][-1])
        self.tile_px = own_px if tile_px is None else int(tile_px)
        fit_input(model, self.tile_px, own_px, self.name)
        self._pad_type, self._is_described = pad_type, bool(source.hub_id)
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        self._set_network(module, triple(mean, known["mean"]), triple(std, known["std"]), dtype)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            # The rest of what a model of the hub says of itself is among the others.
            **({"config": {"architecture": self.architecture}} if self._is_described else {}),
            "tile_um": self.tile_um,
            "tile_px": self.tile_px,
            "mean": list(self._mean),
            "std": list(self._std),
            "pad_type": self._pad_type,
            **({} if self._pooling is None else {"pooling": self._pooling}),
            **({"model_args": dict(self._model_args)} if self._model_args else {}),
            "dtype": self._dtype,
            "weights_name": self._weights.name,
            "weights_sha256": self._weights.sha256,
        }


@dataclass(frozen=True)
class _Source:
    """What stands behind the colon."""

    name: str  # without the paths of this machine
    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: dict[str, Any] = field(default_factory=dict)
    hub_id: str = ""
    folder: Path | None = None


def _source(timm: Any, text: str, revision: str | None, config: Mapping[str, Any] | None) -> _Source:
    """A name in timm, or the configuration of a model of the hub or in a folder."""
    if config is not None:
        if not text.startswith(HUB):
            raise DataValueError(f"config= is for 'timm:{HUB}<owner>/<model>', and 'timm:{text}' is not one")
        return _Source(text, hub_id=text.removeprefix(HUB), **_described(config, "config="))
    # A file may begin with the name of an architecture, and a folder may be called like one.
    is_name = "." not in text and timm.is_model(text)
    described = None if is_name else find_described("timm", text, _CONFIG, revision)
    if described is None:
        return _Source(text, text)
    try:
        found = json.loads(described.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_CONFIG!r} is no configuration of a timm model: {error!r}") from error
    facts = _described(found, _CONFIG)
    name = text if described.hub_id else facts["architecture"]
    return _Source(name, hub_id=described.hub_id, folder=described.place, **facts)


def _described(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Architecture, its arguments and the preprocessing, as timm writes them beside a model."""
    try:
        architecture = str(config["architecture"])
        arguments = dict(config.get("model_args") or {})
        pretrained = config.get("pretrained_cfg") or config
        pixels = {key: pretrained[key] for key in ("input_size", "mean", "std") if key in pretrained}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what!r} is no configuration of a timm model: {error!r}") from error
    # No classifier, and tokens that the network itself pools.
    arguments.pop("num_classes", None)
    if arguments.get("global_pool") == "":
        del arguments["global_pool"]
    return {"architecture": architecture, "arguments": arguments, "pretrained": pixels}


def _published(timm: Any, architecture: str) -> str:
    """Where timm's own weights for an architecture lie on the hub."""
    hub_id = getattr(timm.models.get_pretrained_cfg(architecture), "hf_hub_id", None)
    if not hub_id:
        raise MissingWeightsError(f"timm names no weights for {architecture!r}; pass a file: weights='<file>'")
    return str(hub_id)


def _create(timm: Any, architecture: str, arguments: Mapping[str, Any], pad_type: str | None) -> Any:
    options = {key: layer(key, value) for key, value in arguments.items()}
    if pad_type is not None:
        options["pad_type"] = pad_type
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise DataValueError(f"architecture {architecture!r} does not take all of {list(options)} ({error})") from error
    except RuntimeError as error:  # of a tag after the name, say
        raise DataValueError(f"timm cannot make architecture {architecture!r}: {error}") from error
