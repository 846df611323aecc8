"""Image towers of open_clip models, QuiltNet first among them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._optional import optional_import
from ..errors import CheckpointError, DataValueError
from ._base import EncoderInfo, PatchEncoder
from ._clip_pixels import CONFIG, by_name, of_config
from ._hub import HUB, Weights, find_described, find_weights
from ._licence import show_hub_licence, show_licence
from ._names import near
from ._network import triple
from ._published import OPENAI
from ._torch import TileNetwork
from ._weights import load_into, read_state_dict

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["OpenClipEncoder", "QuiltNet"]

_TOWER = "visual."
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # preferred first: it can hold no code
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}  # the tower is thrown away


class OpenClipEncoder(PatchEncoder):
    """The image tower of an open_clip model; its text tower is not loaded.

    Parameters
    ----------
    architecture
        Name in open_clip, such as ``"ViT-B-32"``; ``"hf-hub:<owner>/<model>"``, a model of the hub in open_clip's layout,
        whose configuration is followed; or the folder of such a model on this machine.
    weights
        Weights file (safetensors or a PyTorch checkpoint) of the whole model, the folder it lies in, or
        ``"hf-hub:<owner>/<model>"``, which downloads it unless the hub's cache holds it. It may be left out for a model of
        the hub or a folder, and if this machine has seen a file with `weights_sha256` before.
    revision
        Commit of the hub's model to take.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    quick_gelu
        Whether activations are OpenAI's approximation of GELU, also where the architecture or configuration does not say
        so. It belongs to how the weights were trained; a wrong choice raises no error.
    mean, std
        Normalisation of values in [0, 1], one number or one per channel. By default that in the configuration of the model,
        of the folder or of the hub's model that `weights` names; else that of the weights which open_clip lists for the
        architecture. It must be what the weights were trained with, and a wrong choice raises no error.
    raw_pixels
        Feed pixels as 0–255 in place of normalising them, as HESpotEx's published code does. Only to reproduce it.
    patch
        ``"tile"``: the tile at its exact place, resized as open_clip does. ``"published"``: as HESpotEx's published code
        cuts it from the finest level, to whole pixels, one spot diameter wide (`tile_um` is the diameter of the
        section's spots), cut at the border of the image, resized by area or, however far it is enlarged, by cubic
        interpolation. Only to reproduce it.
    normalize
        Whether features are scaled to unit length.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    config
        Configuration in the layout of ``open_clip_config.json``, in place of that of the architecture, model or folder;
        of it, what the image tower needs is part of :meth:`params`.
    weights_name, weights_sha256
        Identity of the weights, as :meth:`params` gives it.

    Raises
    ------
    MissingWeightsError
        If there are no weights, or the hub does not give them.
    ModelMismatchError
        If they are not those of `weights_sha256`.
    CheckpointError
        If they are damaged or of another architecture, or the configuration is none of open_clip.
    DataValueError
        If open_clip has no such architecture.

    Warns
    -----
    HespotexWarning
        On first use of weights of the hub, of their licence. If open_clip lists weights of the architecture that are
        normalised differently, and nothing says which these are.
    """

    info = EncoderInfo(
        name="open_clip",
        summary="image tower of any open_clip architecture with a weights file",
        mpp=0.5,
        licence="that of the weights",
        extra="encoders",
        is_family=True,
        is_network=True,
    )
    default_um: float | None = None
    _network: TileNetwork
    _weights: Weights

    def __init__(
        self,
        architecture: str,
        weights: str | Path | None = None,
        *,
        revision: str | None = None,
        tile_um: float | None = None,
        mpp: float | None = None,
        quick_gelu: bool = False,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        raw_pixels: bool = False,
        patch: Literal["tile", "published"] = "tile",
        normalize: bool = True,
        dtype: str = "float32",
        config: Mapping[str, Any] | None = None,
        weights_name: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        open_clip = optional_import("open_clip", feature=f"the encoder {self.info.name!r}", extra="encoders")

        if patch not in ("tile", "published"):
            raise DataValueError(f"patch={patch!r} is unknown; possible: 'tile', 'published'")
        if raw_pixels and not (mean is None and std is None):
            raise DataValueError("raw_pixels=True feeds pixels as they are; mean= and std= do not go with it")
        names = open_clip.list_models()
        source = _source(architecture, names, revision, config)
        self.name = f"open_clip:{source.name}" if self.info.is_family else self.info.name
        self.architecture = source.name
        self._config = source.config
        if source.config is None and architecture not in names:
            like = near(architecture, names)
            raise DataValueError(
                f"open_clip has no architecture {architecture!r}" + (f"; near: {like}" if like else "")
            )
        self._weights = find_weights(
            self.name,
            source.folder if weights is None else weights,
            files=_FILES,
            hub_id=self.info.hub_id or source.hub_id,
            revision=revision,
            name=weights_name,
            sha256=weights_sha256,
        )
        weights_hub = self._weights.name.removeprefix(HUB) if self._weights.name.startswith(HUB) else ""
        if self.info.hub_id:
            show_licence(self.name, self.info.licence, stacklevel=4)
        elif hub_id := weights_hub or source.hub_id:
            show_hub_licence(self.name, hub_id)
        self._quick_gelu, self._raw_pixels, self._normalize = quick_gelu, raw_pixels, normalize
        self._dtype, self._patch = dtype, patch

        if source.config is None:
            tower = open_clip.create_model(architecture, pretrained=None, force_quick_gelu=quick_gelu).visual
        else:
            tower = _tower(open_clip, source.config, quick_gelu=quick_gelu)
        state = read_state_dict(self._weights.path)
        tensors = {name.removeprefix(_TOWER): value for name, value in state.items() if name.startswith(_TOWER)}
        load_into(tower, tensors, f"the image tower of {source.name!r}")
        self._weights.remember()

        self.tile_px = int(np.max(tower.image_size))
        model = (source.config or {}).get("model_cfg") or open_clip.get_model_config(architecture)
        self.n_features = int(getattr(tower, "output_dim", None) or model["embed_dim"])  # towers of timm do not say
        self.set_size(tile_um, mpp, default_um=self.default_um or 0.5 * self.tile_px)
        self._pixels: dict[str, list[float]] = {}  # of params(): what neither the configuration nor the name tells
        if raw_pixels:
            self._network = TileNetwork(tower, None, None, dtype)
        else:
            default, is_told = OPENAI, True
            if source.config is not None:
                default = of_config(source.config)
            elif self.info.is_family and (mean is None or std is None):
                default, is_told = by_name(self.name, architecture, weights_hub, revision)
            own = triple(mean, default[0]), triple(std, default[1])
            if not is_told or mean is not None or std is not None:
                self._pixels = {"mean": list(own[0]), "std": list(own[1])}
            self._network = TileNetwork(tower, *own, dtype)
        self._tower = tower

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "quick_gelu": self._quick_gelu,
            **self._pixels,
            "raw_pixels": self._raw_pixels,
            "patch": self._patch,
            "normalize": self._normalize,
            "dtype": self._dtype,
            **({} if self._config is None else {"config": copy.deepcopy(self._config)}),
            "weights_name": self._weights.name,
            "weights_sha256": self._weights.sha256,
        }

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._network(tiles, device, after=_unit_length if self._normalize else None)

    def encode_patches(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Patch tokens (b, rows, columns, d) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8.

        They have the width of the tower: the projection to text is trained on the class token alone.

        Raises
        ------
        DataValueError
            If the tower is no plain vision transformer.
        """
        after = _unit_length if self._normalize else None
        if getattr(self._tower, "output_tokens", None) is not None and self._tower.attn_pool is None:
            tokens = self._network(tiles, device, after=after, forward=self._tokens)
            rows, columns = self._tower.grid_size
            if tokens.shape[1] == rows * columns:
                return tokens.reshape(len(tokens), rows, columns, -1)
        raise DataValueError(
            f"encoder {self.name!r} has no patch tokens: its image tower is no plain vision transformer"
        )

    def _tokens(self, x: Any) -> Any:
        tower = copy.copy(self._tower)  # of the same parameters; other threads may be at the features of whole tiles
        tower.output_tokens = True
        return tower(x)[1]

    def _tiles(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tiles, or patches as published."""
        if self._patch == "tile":
            return super()._tiles(slide, centres, batch_size=batch_size, progress_bar=progress_bar)
        from ..image.patches import iter_patches

        size: dict[str, Any] = {"diameter_um": self.tile_um, "side": self.tile_px}
        return iter_patches(slide, centres, **size, batch_size=batch_size, progress_bar=progress_bar)


class QuiltNet(OpenClipEncoder):
    """QuiltNet-B-32, the frozen encoder of HESpotEx: 512 features of unit length.

    The default follows the configuration that comes with the weights: bicubic resize to 224 px, CLIP's mean and
    standard deviation, ordinary GELU. HESpotEx's published code differs in three points, which are options here:
    ``quick_gelu=True``, ``raw_pixels=True`` and ``patch="published"``.

    Parameters
    ----------
    weights
        Weights file of the whole model; by default that in the hub's cache, else the file that was given before on this
        machine, else it is downloaded from ``hf-hub:wisdomik/QuiltNet-B-32`` (0.6 GB).
    options
        As for ``open_clip:<architecture>``; a tile is 100 µm wide by default, one spot of a legacy array.
    """

    info = EncoderInfo(
        name="quiltnet",
        summary="QuiltNet-B-32, image tower of a pathology CLIP; the encoder of HESpotEx",
        n_features=512,
        mpp=round(100 / 224, 3),
        tile_um=100.0,
        licence="MIT; trained on Quilt-1M, which is for research; see https://huggingface.co/wisdomik/QuiltNet-B-32",
        extra="encoders",
        hub_id="wisdomik/QuiltNet-B-32",
        hub_files=_FILES,
        needs_weights=True,
        is_network=True,
    )
    default_um = 100.0

    def __init__(self, weights: str | Path | None = None, **options: Any) -> None:
        super().__init__("ViT-B-32", weights, **options)


@dataclass(frozen=True)
class _Source:
    """What stands behind the colon."""

    name: str  # without the paths of this machine
    config: dict[str, Any] | None = None  # of the image tower; None: open_clip knows it by the name
    hub_id: str = ""
    folder: Path | None = None


def _source(text: str, names: Sequence[str], revision: str | None, config: Mapping[str, Any] | None) -> _Source:
    """One of the names in open_clip, or the configuration of a model of the hub or in a folder."""
    if config is None and text in names:
        return _Source(text)
    if config is not None and not Path(text).expanduser().exists():  # as params() gives it
        hub_id = text.removeprefix(HUB) if text.startswith(HUB) else ""
        return _Source(text, _of_image(config, "config="), hub_id)
    described = find_described("open_clip", text, CONFIG, revision)
    if described is None:
        return _Source(text)
    try:
        found = config or json.loads(described.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{CONFIG!r} is no configuration of an open_clip model: {error!r}") from error
    name = text if described.hub_id else described.config.parent.resolve().name
    return _Source(name, _of_image(found, CONFIG), described.hub_id, described.place)


def _of_image(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What of a configuration determines the features of images, as JSON values."""
    try:
        model, pixels = config["model_cfg"], config.get("preprocess_cfg") or {}
        kept = {
            "model_cfg": {
                "embed_dim": int(model["embed_dim"]),
                "quick_gelu": bool(model.get("quick_gelu")),
                "vision_cfg": {key: value for key, value in model["vision_cfg"].items() if value is not None},
            },
            "preprocess_cfg": {key: pixels[key] for key in ("mean", "std") if key in pixels},
        }
        plain: dict[str, Any] = json.loads(json.dumps(kept, default=lambda value: value.tolist()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what!r} is no configuration of an open_clip model: {error!r}") from error
    return plain


def _tower(open_clip: Any, config: Mapping[str, Any], *, quick_gelu: bool) -> Any:
    """The image tower of a configuration, with random weights."""
    model = config["model_cfg"]
    vision = {**model["vision_cfg"], "timm_model_pretrained": False}
    try:
        return open_clip.CLIP(model["embed_dim"], vision, _NO_TEXT, quick_gelu=quick_gelu or model["quick_gelu"]).visual
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"open_clip cannot make the image tower that {CONFIG} describes: {error}") from error


def _unit_length(features: Any) -> Any:
    from torch.nn.functional import normalize

    return normalize(features, dim=-1)
