"""Any architecture of timm with a weights file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import optional_import
from ..errors import DataValueError, MissingWeightsError
from ._base import EncoderInfo, PatchEncoder
from ._torch import TileNetwork
from ._weights import identify, load_into, read_state_dict, recall

__all__ = ["TimmEncoder"]


class TimmEncoder(PatchEncoder):
    """A timm network without its classifier.

    Parameters
    ----------
    architecture
        Name in timm, such as ``"resnet50"``.
    weights
        Weights file (safetensors, or a PyTorch state dict). It may be left out if this machine has seen a file with
        `weights_sha256` before. Nothing is downloaded.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default, the resolution most
        pathology encoders are trained at.
    tile_px
        Side of the network's input; that of timm's configuration by default.
    mean, std
        Normalisation of values in [0, 1], one number or one per channel; those of timm's configuration by default. They
        must be what the weights were trained with, and a wrong choice raises no error.
    pad_type
        Padding of convolutions where the architecture has a choice; ``"same"`` for weights from TensorFlow.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    weights_name, weights_sha256
        Identity of the weights, as :meth:`params` gives it.

    Raises
    ------
    MissingWeightsError
        If there are no weights.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    CheckpointError
        If they are damaged or of another architecture.
    DataValueError
        If timm has no such architecture.
    """

    info = EncoderInfo(
        name="timm",
        summary="any architecture of timm with a weights file",
        mpp=0.5,
        licence="that of the weights",
        extra="encoders",
        is_family=True,
    )

    def __init__(
        self,
        architecture: str,
        weights: str | Path | None = None,
        *,
        tile_um: float | None = None,
        mpp: float | None = None,
        tile_px: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        pad_type: str | None = None,
        dtype: str = "float32",
        weights_name: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        timm = optional_import("timm", feature="the encoder 'timm'", extra="encoders")

        self.name = f"timm:{architecture}"
        self.architecture = architecture
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture}*")[:5]
            raise DataValueError(f"timm has no architecture {architecture!r}" + (f"; near: {near}" if near else ""))
        if weights is None and weights_sha256 is not None:
            weights = recall(weights_sha256)
        if weights is None:
            which = f" {weights_name!r} with SHA-256 {weights_sha256}" if weights_sha256 else ""
            raise MissingWeightsError(
                f"encoder {self.name!r} needs its weights file{which}; pass it as weights=, for instance "
                f"hx.pp.embed(sdata, {self.name!r}, weights='model.safetensors')"
            )
        path, self._sha256 = identify(weights, expected=weights_sha256)
        self._weights_name = weights_name or path.name

        options = {} if pad_type is None else {"pad_type": pad_type}
        try:
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            raise DataValueError(f"architecture {architecture!r} takes no pad_type ({error})") from error
        state = {name: value for name, value in read_state_dict(path).items() if name not in _classifier(model)}
        load_into(model, state, f"architecture {architecture!r} of timm without classifier")

        config = timm.data.resolve_model_data_config(model)
        self.tile_px = int(config["input_size"][-1] if tile_px is None else tile_px)
        if self.tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        self._mean, self._std = _triple(mean, config["mean"]), _triple(std, config["std"])
        self._pad_type, self._dtype = pad_type, dtype
        self.n_features = int(model.num_features)
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        self._model = model
        self._network = TileNetwork(model, self._mean, self._std, dtype)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "tile_px": self.tile_px,
            "mean": list(self._mean),
            "std": list(self._std),
            "pad_type": self._pad_type,
            "dtype": self._dtype,
            "weights_name": self._weights_name,
            "weights_sha256": self._sha256,
        }

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._network(tiles, device)

    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Tokens of a transformer without those of class and registers, or the last map of a convolutional network.

        (b, rows, columns, d) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8.

        Raises
        ------
        DataValueError
            If the network's last features are neither.
        """
        features = self._network(tiles, device, forward=self._model.forward_features)
        if features.ndim == 3:
            tokens = features[:, getattr(self._model, "num_prefix_tokens", 0) :]
            side = math.isqrt(tokens.shape[1])
            if side**2 == tokens.shape[1]:
                return tokens.reshape(len(tokens), side, side, -1)
        elif features.ndim == 4:
            return features if features.shape[-1] == self.n_features else np.moveaxis(features, 1, -1)
        raise DataValueError(
            f"encoder {self.name!r} gives features of shape {features.shape[1:]} before pooling, which are no square of "
            f"patches; take a vision transformer, such as 'timm:vit_small_patch16_224'"
        )


def _classifier(model: Any) -> set[str]:
    """Names of classifier tensors: a file of the whole model may hold them, the model made here does not."""
    heads = model.pretrained_cfg.get("classifier") or ()
    names = (heads,) if isinstance(heads, str) else heads
    own = set(model.state_dict())
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} - own


def _triple(value: float | Sequence[float] | None, default: Sequence[float]) -> tuple[float, float, float]:
    values = np.broadcast_to(np.asarray(default if value is None else value, dtype=np.float64), (3,))
    if not np.isfinite(values).all():
        raise DataValueError(f"mean and std must be finite, got {value!r}")
    first, second, third = values.tolist()
    return first, second, third
