"""Published encoders of pathology by name: UNI, Virchow, H-optimus, GigaPath, Midnight, Phikon, CONCH and others."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .._optional import optional_import
from ..errors import DataValueError
from ._hub import find_weights
from ._layouts import classifier_of, from_conch, from_dinov2, layer, resampled
from ._licence import show_licence
from ._network import NetworkEncoder
from ._published import PUBLISHED, Published
from ._weights import load_into, read_state_dict

if TYPE_CHECKING:
    import torch

    from ._pooling import Pooled

__all__ = ["PretrainedEncoder", "build", "encoder_class", "module_names"]


class PretrainedEncoder(NetworkEncoder):
    """A published encoder, with the preprocessing and pooling it was trained for.

    Parameters
    ----------
    weights
        Weights file as published (safetensors or a PyTorch checkpoint), the folder it lies in, or
        ``"hf-hub:<owner>/<model>"``. By default that in the hub's cache, else the file that was given before on this
        machine, else it is downloaded from where it is published.
    revision
        Commit, tag or branch of the hub's model to take.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; by default that of the training.
    tile_px
        Side of the network's input; that of the training by default. For transformers a multiple of the patch, positions
        being interpolated.
    pooling
        ``"class"``: the class token. ``"mean"``: the mean of the patches. ``"class+mean"``: both. ``"class+centre"``: the
        class token and the mean of the patches in the middle. By default as its authors recommend.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    weights_name, weights_sha256
        Identity of the weights, as :meth:`params` gives it.

    Raises
    ------
    MissingWeightsError
        If there are no weights: says which terms to accept where, how to log in, and how to pass a file.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    CheckpointError
        If they are damaged or of another network; names the first tensors that do not fit.
    DataValueError
        If `tile_px` or `pooling` does not go with the network.

    Warns
    -----
    HespotexWarning
        On first use, of the licence.
    """

    record: ClassVar[Published]

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        revision: str | None = None,
        tile_um: float | None = None,
        mpp: float | None = None,
        tile_px: int | None = None,
        pooling: str | None = None,
        dtype: str = "float32",
        weights_name: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        record = self.record
        self.name = record.name
        self.tile_px = record.tile_px if tile_px is None else int(tile_px)
        if self.tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        self.set_size(tile_um, mpp, default_um=record.mpp * self.tile_px)
        module = build(record, tile_px=self.tile_px, pooling=record.pooling if pooling is None else pooling)
        found = find_weights(
            record.name,
            weights,
            hub_id=record.hub_id,
            revision=revision,
            name=weights_name,
            sha256=weights_sha256,
        )
        show_licence(record.name, record.licence)
        self._weights = found
        state = module_names(record, read_state_dict(found.path), module, self.tile_px)
        load_into(module, state, f"the encoder {record.name!r}", assign=True)
        found.remember()
        self._set_network(module, *record.pixels, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, where the class is made anew."""
        return _restored, (self.record.name, self.__dict__)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "tile_px": self.tile_px,
            "pooling": self._pooling,
            "dtype": self._dtype,
            "weights_name": self._weights.name,
            "weights_sha256": self._weights.sha256,
        }


@cache
def encoder_class(name: str) -> type[PretrainedEncoder]:
    """The class of the published encoder `name`, one of :data:`~hespotex.encoders._published.PUBLISHED`."""
    record = PUBLISHED[name]
    return type("PretrainedEncoder", (PretrainedEncoder,), {"record": record, "info": record.info, "name": name})


def _restored(name: str, state: dict[str, Any]) -> PretrainedEncoder:
    encoder = object.__new__(encoder_class(name))
    encoder.__dict__.update(state)
    return encoder


def build(record: Published, *, tile_px: int, pooling: str | None) -> Pooled:
    """The network on the ``meta`` device: names and shapes, and no memory.

    Raises
    ------
    DataValueError
        If `tile_px` is no multiple of the patch, or the network cannot be pooled so.
    """
    timm = optional_import("timm", feature=f"the encoder {record.name!r}", extra="encoders")
    import torch

    from ._pooling import Pooled

    kind = Pooled
    if record.layout == "conch":
        optional_import("open_clip", feature=f"the encoder {record.name!r}", extra="encoders")
        from ._conch import ConchTower

        kind = ConchTower
    arguments = {key: layer(key, value) for key, value in record.arguments.items()}
    is_transformer = record.architecture.startswith("vit_")
    with torch.device("meta"):
        model = timm.create_model(
            record.architecture,
            pretrained=False,
            num_classes=0,
            **({"img_size": tile_px} if is_transformer else {}),
            **arguments,
        )
        module = kind(model, pooling, record.name)
    if is_transformer and tile_px % _patch(model):
        raise DataValueError(f"tile_px={tile_px!r} of encoder {record.name!r} must be a multiple of {_patch(model)}")
    return module


def module_names(
    record: Published, state: dict[str, torch.Tensor], module: Pooled, tile_px: int
) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by their names in the network, positions fitted to its input."""
    model: Any = module.backbone
    if record.layout == "conch":
        named = from_conch(state, with_pooler=hasattr(module, "attn_pool_contrast"))
    else:
        timm_state = from_dinov2(state) if record.layout == "dinov2" else state
        left_out = classifier_of(model, model.state_dict())
        named = {f"backbone.{name}": value for name, value in timm_state.items() if name not in left_out}
    key = "backbone.pos_embed"
    if key in named:
        # As transformers does, which the published features of the one come from, and as timm does for the other.
        named[key] = resampled(
            named[key],
            n_prefix=0 if model.no_embed_class else model.num_prefix_tokens,
            grid=tile_px // _patch(model),
            trained_grid=(record.positions_px or record.tile_px) // _patch(model),
            antialias=record.layout == "timm",
        )
    return named


def _patch(model: Any) -> int:
    return int(model.patch_embed.patch_size[0])
