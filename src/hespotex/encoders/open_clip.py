"""Image towers of open_clip models, QuiltNet first among them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._optional import optional_import
from ..errors import DataValueError
from ._base import EncoderInfo, PatchEncoder
from ._hub import HUB, Weights, find_weights
from ._licence import show_licence
from ._names import near
from ._torch import TileNetwork
from ._weights import load_into, read_state_dict

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["OpenClipEncoder", "QuiltNet"]

_TOWER = "visual."
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # preferred first: it can hold no code


class OpenClipEncoder(PatchEncoder):
    """The image tower of an open_clip model; its text tower is not loaded.

    Parameters
    ----------
    architecture
        Name in open_clip, such as ``"ViT-B-32"``.
    weights
        Weights file (safetensors or a PyTorch checkpoint) of the whole model, the folder it lies in, or
        ``"hf-hub:<owner>/<model>"``, which downloads it unless the hub's cache holds it. It may be left out if this
        machine has seen a file with `weights_sha256` before.
    revision
        Commit of the hub's model to take.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    quick_gelu
        Whether activations are OpenAI's approximation of GELU. It belongs to how the weights were trained;
        a wrong choice raises no error.
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
        If open_clip has no such architecture.
    """

    info = EncoderInfo(
        name="open_clip",
        summary="image tower of any open_clip architecture with a weights file",
        mpp=0.5,
        licence="that of the weights",
        extra="encoders",
        is_family=True,
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
        raw_pixels: bool = False,
        patch: Literal["tile", "published"] = "tile",
        normalize: bool = True,
        dtype: str = "float32",
        weights_name: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        open_clip = optional_import("open_clip", feature=f"the encoder {self.info.name!r}", extra="encoders")

        self.name = f"open_clip:{architecture}" if self.info.is_family else self.info.name
        self.architecture = architecture
        if architecture not in open_clip.list_models():
            like = near(architecture, open_clip.list_models())
            raise DataValueError(
                f"open_clip has no architecture {architecture!r}" + (f"; near: {like}" if like else "")
            )
        if patch not in ("tile", "published"):
            raise DataValueError(f"patch={patch!r} is unknown; possible: 'tile', 'published'")
        self._weights = find_weights(
            self.name,
            weights,
            files=_FILES,
            hub_id=self.info.hub_id,
            revision=revision,
            name=weights_name,
            sha256=weights_sha256,
        )
        if self.info.hub_id:
            show_licence(self.name, self.info.licence, stacklevel=4)
        elif isinstance(weights, str) and weights.startswith(HUB):
            show_licence(weights, f"see https://huggingface.co/{weights.removeprefix(HUB)}")
        self._quick_gelu, self._raw_pixels, self._normalize = quick_gelu, raw_pixels, normalize
        self._dtype, self._patch = dtype, patch

        tower = open_clip.create_model(architecture, pretrained=None, force_quick_gelu=quick_gelu).visual
        state = read_state_dict(self._weights.path)
        own = {name.removeprefix(_TOWER): value for name, value in state.items() if name.startswith(_TOWER)}
        load_into(tower, own, f"the image tower of {architecture!r}")
        self._weights.remember()

        self.tile_px = int(np.max(tower.image_size))
        self.n_features = int(tower.output_dim)
        self.set_size(tile_um, mpp, default_um=self.default_um or 0.5 * self.tile_px)
        mean, std = (None, None) if raw_pixels else (_own(tower, "mean"), _own(tower, "std"))
        self._tower = tower
        self._network = TileNetwork(tower, mean, std, dtype)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "quick_gelu": self._quick_gelu,
            "raw_pixels": self._raw_pixels,
            "patch": self._patch,
            "normalize": self._normalize,
            "dtype": self._dtype,
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
    )
    default_um = 100.0

    def __init__(self, weights: str | Path | None = None, **options: Any) -> None:
        super().__init__("ViT-B-32", weights, **options)


def _own(tower: Any, name: str) -> tuple[float, float, float]:
    """Normalisation the architecture's configuration states; open_clip's default is CLIP's."""
    value = getattr(tower, f"image_{name}", None)
    if value is None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        value = OPENAI_DATASET_MEAN if name == "mean" else OPENAI_DATASET_STD
    first, second, third = (float(entry) for entry in value)
    return first, second, third


def _unit_length(features: Any) -> Any:
    from torch.nn.functional import normalize

    return normalize(features, dim=-1)
