"""Image towers of open_clip models, QuiltNet first among them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._optional import optional_import
from ..errors import DataValueError, HespotexWarning, MissingWeightsError
from ._base import EncoderInfo, PatchEncoder
from ._torch import TileNetwork
from ._weights import identify, load_into, read_state_dict, recall

if TYPE_CHECKING:
    from ..data.geometry import Slide

__all__ = ["OpenClipEncoder", "QuiltNet"]

_TOWER = "visual."
_HUB = "hf-hub:"
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # preferred first: it can hold no code


class OpenClipEncoder(PatchEncoder):
    """The image tower of an open_clip model; its text tower is not loaded.

    Parameters
    ----------
    architecture
        Name in open_clip, such as ``"ViT-B-32"``.
    weights
        Weights file (safetensors or a PyTorch checkpoint) of the whole model, or ``"hf-hub:<owner>/<model>"``,
        which downloads it. It may be left out if this machine has seen a file with `weights_sha256` before.
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
            near = [name for name in open_clip.list_models() if architecture.lower() in name.lower()][:5]
            raise DataValueError(
                f"open_clip has no architecture {architecture!r}" + (f"; near: {near}" if near else "")
            )
        if patch not in ("tile", "published"):
            raise DataValueError(f"patch={patch!r} is unknown; possible: 'tile', 'published'")
        path = self._find(weights, revision, weights_name, weights_sha256)
        path, self._sha256 = identify(path, expected=weights_sha256)
        hub = isinstance(weights, str) and weights.startswith(_HUB)
        self._weights_name = weights_name or (str(weights) if hub else path.name)
        self._quick_gelu, self._raw_pixels, self._normalize = quick_gelu, raw_pixels, normalize
        self._dtype, self._patch = dtype, patch

        tower = open_clip.create_model(architecture, pretrained=None, force_quick_gelu=quick_gelu).visual
        state = read_state_dict(path)
        own = {name.removeprefix(_TOWER): value for name, value in state.items() if name.startswith(_TOWER)}
        load_into(tower, own, f"the image tower of {architecture!r}")

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
            "weights_name": self._weights_name,
            "weights_sha256": self._sha256,
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
        before = self._tower.output_tokens
        self._tower.output_tokens = True
        try:
            return self._tower(x)[1]
        finally:
            self._tower.output_tokens = before

    def _tiles(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tiles, or patches as published."""
        if self._patch == "tile":
            return super()._tiles(slide, centres, batch_size=batch_size, progress_bar=progress_bar)
        from ..image.patches import iter_patches

        size: dict[str, Any] = {"diameter_um": self.tile_um, "side": self.tile_px}
        return iter_patches(slide, centres, **size, batch_size=batch_size, progress_bar=progress_bar)

    def _find(
        self, weights: str | Path | None, revision: str | None, name: str | None, sha256: str | None
    ) -> str | Path:
        if weights is None and sha256 is not None:
            weights = recall(sha256)
        if weights is None:
            which = f" {name!r} with SHA-256 {sha256}" if sha256 else ""
            raise MissingWeightsError(
                f"encoder {self.name!r} needs its weights{which}; pass weights='<file>' or weights='hf-hub:<owner>/<model>'"
            )
        if isinstance(weights, str) and weights.startswith(_HUB):
            return _download(weights.removeprefix(_HUB), revision, self.name)
        return weights


class QuiltNet(OpenClipEncoder):
    """QuiltNet-B-32, the frozen encoder of HESpotEx: 512 features of unit length.

    The default follows the configuration that comes with the weights: bicubic resize to 224 px, CLIP's mean and
    standard deviation, ordinary GELU. HESpotEx's published code differs in three points, which are options here:
    ``quick_gelu=True``, ``raw_pixels=True`` and ``patch="published"``.

    Parameters
    ----------
    weights
        Weights file of the whole model; by default it is taken from where it was used before, else downloaded from
        ``hf-hub:wisdomik/QuiltNet-B-32`` (0.6 GB).
    options
        As for ``open_clip:<architecture>``; a tile is 100 µm wide by default, one spot of a legacy array.
    """

    info = EncoderInfo(
        name="quiltnet",
        summary="QuiltNet-B-32, image tower of a pathology CLIP; the encoder of HESpotEx",
        n_features=512,
        mpp=round(100 / 224, 3),
        tile_um=100.0,
        licence="see the model card of wisdomik/QuiltNet-B-32 (trained on Quilt-1M: research use)",
        extra="encoders",
    )
    default_um = 100.0
    hub_id = f"{_HUB}wisdomik/QuiltNet-B-32"
    _licence_shown = False

    def __init__(self, weights: str | Path | None = None, **options: Any) -> None:
        if not QuiltNet._licence_shown:
            QuiltNet._licence_shown = True
            warnings.warn(f"quiltnet: {self.info.licence}", HespotexWarning, stacklevel=2)
        sha256 = options.get("weights_sha256")
        if weights is None and (sha256 is None or recall(sha256) is None):
            weights = self.hub_id
        super().__init__("ViT-B-32", weights, **options)


def _download(hub_id: str, revision: str | None, encoder: str) -> Path:
    hub = optional_import("huggingface_hub", feature=f"downloading the encoder {encoder!r}", extra="encoders")
    errors = optional_import("huggingface_hub.errors", feature=f"downloading the encoder {encoder!r}", extra="encoders")
    for filename in _HUB_FILES:
        try:
            return Path(hub.hf_hub_download(hub_id, filename, revision=revision))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise _unavailable(hub_id, encoder, error) from error
        except (errors.HfHubHTTPError, OSError, ValueError) as error:
            raise _unavailable(hub_id, encoder, error) from error
    raise MissingWeightsError(f"encoder {encoder!r}: {hub_id} on the hub holds none of {list(_HUB_FILES)}")


def _unavailable(hub_id: str, encoder: str, error: Exception) -> MissingWeightsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MissingWeightsError(
        f"encoder {encoder!r}: its weights could not be taken from the hub ({reason}). Either go online; if access is "
        f"restricted, accept the terms at https://huggingface.co/{hub_id} and log in with: hf auth login. Or download "
        f"{' or '.join(_HUB_FILES)} there by hand and pass the file: weights='<file>'"
    )


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
