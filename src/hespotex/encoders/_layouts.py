"""Weights files of other libraries, by the names that timm gives the same tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, DataValueError

if TYPE_CHECKING:
    import torch

__all__ = ["classifier_of", "fit_input", "from_conch", "from_dinov2", "layer", "resampled"]

# Tensors outside the blocks, then those of one block: in transformers' DINOv2, and in timm.
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_UNUSED = "embeddings.mask_token"  # of training
_PARTS = ("query", "key", "value")
_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_PROJECTION = re.compile(rf"attention\.attention\.({'|'.join(_PARTS)})\.(weight|bias)")

# What a file of CONCH holds besides the image tower: the text tower, the decoder, and what only they need.
_OTHER_TOWERS = ("text.", "text_decoder.", "logit_scale", "visual.attn_pool_caption.", "visual.ln_caption.")
_TO_TEXT = "visual.proj_contrast"


def from_dinov2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' DINOv2 by their names in timm, where query, key and value are one.

    Raises
    ------
    CheckpointError
        If one of the three is missing.
    """
    import torch

    named: dict[str, torch.Tensor] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            if name != _UNUSED:
                named[_OUTSIDE.get(name, name)] = value
            continue
        number, rest = block.groups()
        part = _PROJECTION.fullmatch(rest)
        if part is not None:
            joined.setdefault(f"blocks.{number}.attn.qkv.{part[2]}", {})[part[1]] = value
            continue
        for own, theirs in _IN_BLOCK.items():
            rest = rest.replace(own, theirs)
        named[f"blocks.{number}.{rest}"] = value
    for name, parts in joined.items():
        if missing := [part for part in _PARTS if part not in parts]:
            raise CheckpointError(f"the weights hold no {missing[0]} to make {name!r} of")
        named[name] = torch.cat([parts[part] for part in _PARTS])
    return named


def from_conch(state: Mapping[str, torch.Tensor], *, with_pooler: bool) -> dict[str, torch.Tensor]:
    """Tensors of CONCH's image tower, those of the transformer by their names in timm after ``"backbone."``."""
    unused = (*_OTHER_TOWERS, _TO_TEXT, *(() if with_pooler else ("visual.attn_pool_contrast.", "visual.ln_contrast.")))
    tower = {name: value for name, value in state.items() if not name.startswith(unused)}
    return {name.removeprefix("visual.").replace("trunk.", "backbone.", 1): value for name, value in tower.items()}


def resampled(positions: torch.Tensor, *, n_prefix: int, grid: int, trained_grid: int, antialias: bool) -> torch.Tensor:
    """Positions (1, n_prefix + trained_grid², d) for a grid of other sides; others are left as they are."""
    if grid == trained_grid or positions.ndim != 3 or positions.shape[1] != n_prefix + trained_grid**2:
        return positions
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=n_prefix, antialias=antialias)


def fit_input(model: Any, tile_px: int, own_px: int, name: str) -> None:
    """Have a network of timm take tiles of `tile_px`, its positions interpolated where it has them.

    `own_px` is the side it is made for, and `name` that of the encoder.

    Raises
    ------
    DataValueError
        If it cannot.
    """
    stem = getattr(model, "patch_embed", None)
    made_for = getattr(stem, "img_size", None) or (own_px,)
    if tile_px == own_px == made_for[0]:
        return
    import torch

    patch = getattr(stem, "patch_size", (1,)) if hasattr(model, "set_input_size") else (1,)
    step = int(patch[0])
    reason = "" if tile_px % step == 0 else "not whole patches"
    try:
        if not reason:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=(tile_px, tile_px))
            with torch.inference_mode():  # what else would not fit shows on one tile
                model.eval()(torch.zeros(1, 3, tile_px, tile_px))
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        others = f" and other multiples of {step}" if step > 1 else ""
        raise DataValueError(
            f"tile_px={tile_px!r} does not go with encoder {name!r} ({reason}); it takes {own_px}{others}"
        )


def classifier_of(model: Any, own: Iterable[str]) -> set[str]:
    """Names of classifier tensors: a file of the whole model may hold them, the network made here does not."""
    heads = model.pretrained_cfg.get("classifier") or ()
    names = (heads,) if isinstance(heads, str) else heads
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} - set(own)


def layer(key: str, value: Any) -> Any:
    """An argument of a timm network; its layers, which JSON can only name, as classes.

    Raises
    ------
    DataValueError
        If there is no such layer.
    """
    if not isinstance(value, str) or key not in ("mlp_layer", "act_layer"):
        return value
    import timm.layers
    import torch

    found = getattr(timm.layers if key == "mlp_layer" else torch.nn, value, None)
    if not callable(found):
        raise DataValueError(
            f"{key}={value!r} is unknown; take 'SwiGLUPacked' for mlp_layer, 'SiLU' for act_layer, say"
        )
    return found
