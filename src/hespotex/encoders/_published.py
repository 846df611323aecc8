"""Published encoders of pathology that go by a name of their own: one record each, and no code.

Where the facts come from: the model cards on the hub, and the loaders of lazyslide-models 0.1.0 and of TRIDENT, which load
the same files strictly into the same architectures. What they do not settle is marked "unconfirmed". Parameters and
shapes are checked by ``tests/encoders/test_manifest.py`` against counts that others published.

Several cards resize tiles of 256 px to 224. Here the slide itself is read at `mpp` to the network's input, by the bicubic
filter that all encoders share, so that a resize of the card's has no counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ._base import EncoderInfo
from ._hub import TIMM_FILES

__all__ = ["PUBLISHED", "Published"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))

_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_CC_ND = "CC-BY-NC-ND-4.0: no commercial use, no derivatives"

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Published:
    """How to build a published network, feed it, and read its weights file.

    Attributes
    ----------
    name
        In the registry.
    summary
        What it is.
    hub_id
        Where it is published; spelt as in the code of its card, so that the hub's cache is shared with it.
    licence, gated
        Of the weights; whether terms must be accepted first.
    architecture, arguments
        For ``timm.create_model``; layers by name.
    n_features
        Width of the embedding, pooled by default.
    pooling
        By default; ``None`` for the network's own.
    pixels
        Mean and standard deviation that pixels in [0, 1] are normalised by.
    layout
        How the file names its tensors: as timm, as the DINOv2 of transformers, or as CONCH.
    tile_px
        Side of the input.
    positions_px
        Side of the input that the positions in the file are for; `tile_px` if not given.
    mpp, trained_mpp
        Resolution of the input by default, and those of the training.
    """

    name: str
    summary: str
    hub_id: str
    licence: str
    architecture: str
    n_features: int
    gated: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pooling: str | None = "class"
    pixels: Pixels = IMAGENET
    layout: Literal["timm", "dinov2", "conch"] = "timm"
    tile_px: int = 224
    positions_px: int | None = None
    mpp: float = 0.5
    trained_mpp: tuple[float, ...] = (0.5,)

    @property
    def info(self) -> EncoderInfo:
        """The record as the registry shows it."""
        return EncoderInfo(
            name=self.name,
            summary=self.summary,
            n_features=self.n_features,
            mpp=self.mpp,
            tile_um=self.mpp * self.tile_px,
            licence=self.licence,
            gated=self.gated,
            extra="encoders",
            hub_id=self.hub_id,
            hub_files=TIMM_FILES,
            needs_weights=True,
            trained_mpp=self.trained_mpp,
            is_network=True,
        )


_RECORDS = (
    Published(
        "uni",
        "UNI, ViT-L/16 on 100,000 slides (Mahmood lab)",
        hub_id="MahmoodLab/uni",
        licence=_CC_ND,
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1e-5},
        n_features=1024,
    ),
    Published(
        "uni2-h",
        "UNI 2, ViT-H/14 with 8 registers on 350,000 slides (Mahmood lab)",
        hub_id="MahmoodLab/UNI2-h",
        licence=_CC_ND,
        architecture="vit_giant_patch14_224",
        arguments={
            **{"patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2},
            **{"init_values": 1e-5, "no_embed_class": True, "reg_tokens": 8, **_SWIGLU},
        },
        n_features=1536,
    ),
    Published(
        "virchow",
        "Virchow, ViT-H/14 on 1.5 million slides (Paige)",
        hub_id="paige-ai/Virchow",
        licence="Apache-2.0",
        architecture="vit_huge_patch14_224",
        arguments={"init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU},
        n_features=2560,
        pooling="class+mean",
    ),
    Published(
        "virchow2",
        "Virchow2, ViT-H/14 with 4 registers on 3.1 million slides, mixed magnifications (Paige)",
        hub_id="paige-ai/Virchow2",
        licence=_CC_ND,
        architecture="vit_huge_patch14_224",
        arguments={"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **_SWIGLU},
        n_features=2560,
        pooling="class+mean",
        trained_mpp=(0.25, 0.5, 1.0, 2.0),  # 5, 10, 20 and 40x
    ),
    Published(
        "h-optimus-0",
        "H-optimus-0, ViT-g/14 with 4 registers on 500,000 slides (Bioptimus)",
        hub_id="bioptimus/H-optimus-0",
        licence="Apache-2.0",
        gated=True,  # unconfirmed: sources differ; once open, it later asked for agreement
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"init_values": 1e-5},
        n_features=1536,
        pixels=BIOPTIMUS,
    ),
    Published(
        "h-optimus-1",
        "H-optimus-1, ViT-g/14 with 4 registers on a million slides (Bioptimus)",
        hub_id="bioptimus/H-optimus-1",
        licence=_CC_ND,
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"init_values": 1e-5},
        n_features=1536,
        pixels=BIOPTIMUS,
    ),
    Published(
        "h0-mini",
        "H0-mini, ViT-B/14 with 4 registers distilled from H-optimus-0 (Owkin, Bioptimus)",
        hub_id="bioptimus/H0-mini",
        licence=_CC_ND,
        architecture="vit_base_patch14_reg4_dinov2",
        # mlp_ratio unconfirmed: the card gives the layers, and 85.7 million parameters, which this ratio meets.
        arguments={"init_values": 1e-5, "mlp_ratio": 2.66667 * 2, **_SWIGLU},
        n_features=1536,
        pooling="class+mean",  # the card offers the class token alone, too
        pixels=BIOPTIMUS,
    ),
    Published(
        "gigapath",
        "Prov-GigaPath's tile encoder, ViT-g/16 on 171,000 slides (Providence, Microsoft)",
        hub_id="prov-gigapath/prov-gigapath",
        licence="Apache-2.0, for research; the card has further conditions",
        architecture="vit_giant_patch14_dinov2",
        arguments={"patch_size": 16, "mlp_ratio": 5.33334},
        n_features=1536,
    ),
    Published(
        "midnight-12k",
        "Midnight-12k, ViT-g/14 on the 12,000 slides of TCGA (Kaiko)",
        hub_id="kaiko-ai/midnight",
        licence="MIT",
        gated=False,  # unconfirmed: lazyslide-models says gated, all other sources public
        architecture="vit_giant_patch14_dinov2",
        n_features=3072,
        pooling="class+mean",
        pixels=HALF,
        layout="dinov2",
        positions_px=518,
        trained_mpp=(0.25, 0.5, 1.0, 2.0),
    ),
    Published(
        "phikon-v2",
        "Phikon-v2, ViT-L/16 on 58,000 public slides (Owkin)",
        hub_id="owkin/phikon-v2",
        licence="Owkin non-commercial licence, https://huggingface.co/owkin/phikon-v2/blob/main/LICENSE.pdf",
        gated=False,
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1.0},
        n_features=1024,
        layout="dinov2",
    ),
    Published(
        "conch",
        "CONCH, image tower (ViT-B/16) of a pathology vision-language model (Mahmood lab)",
        hub_id="MahmoodLab/conch",
        licence=_CC_ND,
        architecture="vit_base_patch16_224",
        n_features=512,
        pooling="attention",  # before the projection to text, as the card advises for all but text
        pixels=OPENAI,
        layout="conch",
        tile_px=448,
    ),
    Published(
        "resnet50",
        "ResNet-50 on ImageNet, no histology: the baseline of most benchmarks",
        hub_id="timm/resnet50.tv_in1k",
        licence="BSD-3-Clause (torchvision)",
        gated=False,
        architecture="resnet50.tv_in1k",
        n_features=2048,
        pooling=None,
        trained_mpp=(),
    ),
)

PUBLISHED: Mapping[str, Published] = MappingProxyType({record.name: record for record in _RECORDS})
