"""Encoders of the user's own: a torch module, or any function of tiles."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import sanitize
from ..errors import DataTypeError, DataValueError
from ._base import EncoderInfo, TileEncoder
from ._code import hash_code
from ._network import triple
from ._torch import TileNetwork

if TYPE_CHECKING:
    import torch

__all__ = ["OwnEncoder", "from_module", "hash_module"]

_UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class OwnEncoder(TileEncoder):
    """A user's network or function as an encoder; made by :func:`from_module`."""

    def __init__(
        self,
        run: Callable[[np.ndarray, str], np.ndarray],
        identity: dict[str, Any],
        *,
        tile_px: int,
        tile_um: float | None,
        mpp: float | None,
        n_features: int | None,
        code_hash: str,
    ) -> None:
        if tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        self.name, self.tile_px = identity["name"], int(tile_px)
        self._run, self._identity, self._code_hash = run, identity, code_hash
        self._network = run if isinstance(run, TileNetwork) else None
        self.set_size(tile_um, mpp, default_um=0.5 * self.tile_px)
        if n_features is None:
            n_features = self._checked(np.full((1, self.tile_px, self.tile_px, 3), 255, np.uint8), "cpu", None).shape[1]
        self.n_features = int(n_features)
        self.info = EncoderInfo(  # type: ignore[misc]  # of this encoder, not of a class of them
            name=self.name,
            summary="an encoder of your own",
            n_features=self.n_features,
            mpp=self.mpp,
            tile_um=self.tile_um,
            is_network=self._network is not None,
        )

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {**self._identity, "tile_px": self.tile_px, "tile_um": self.tile_um}

    def code_hash(self) -> str:
        """Of the function or module, its code and the values it uses; see :meth:`Encoder.code_hash`."""
        return self._code_hash

    def encode(self, tiles: np.ndarray, device: str) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, tile_px, tile_px, 3) uint8."""
        return self._checked(tiles, device, self.n_features)

    def _checked(self, tiles: np.ndarray, device: str, width: int | None) -> np.ndarray:
        features = np.asarray(self._run(tiles, device), dtype=np.float32)
        if features.ndim != 2 or len(features) != len(tiles) or (width is not None and features.shape[1] != width):
            wanted = f"({len(tiles)}, {width or 'n_features'})"
            raise DataValueError(
                f"encoder {self.name!r} gave an array of shape {features.shape} for {len(tiles)} tiles; it must give one row "
                f"of features each, {wanted}"
            )
        return features


def from_module(
    module: torch.nn.Module | Callable[[np.ndarray], Any],
    *,
    name: str | None = None,
    tile_px: int = 224,
    tile_um: float | None = None,
    mpp: float | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: str = "float32",
    n_features: int | None = None,
) -> TileEncoder:
    """An encoder of your own: a torch module, or any function.

    Parameters
    ----------
    module
        A module from images (b, 3, tile_px, tile_px), normalised, to features (b, d); it is copied. Or a function from RGB
        tiles (b, tile_px, tile_px, 3) uint8 to features (b, d), which does everything else itself.
    name
        Of the encoder: the features are stored as ``obsm["X_<name>"]``. That of the module's class by default; a function
        needs one, by which a model that was trained on its features finds it: give a new name when it changes.
    tile_px
        Side of a tile in pixels, as the module takes it.
    tile_um, mpp
        Size of a tile in µm, or the resolution it is looked at; 0.5 µm/px by default.
    mean, std
        Normalisation of values in [0, 1] for a module, one number or one per channel; 0 and 1 by default.
    dtype
        Type a module computes in: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    n_features
        Width of the embedding; found out on a white tile if not given.

    Returns
    -------
    The encoder, for ``hx.pp.embed(sdata, encoder)``. In this session its name is known as well, so that a model trained on
    its features finds it again; in another session, make it again first. It counts as the same if its weights, its
    structure and its settings are. Features that are there already are computed anew if its code, or a value that the code
    uses, is another one, or cannot be compared, as the log says.

    Raises
    ------
    DataTypeError
        If `module` is neither a module nor a function, or a function was given no name.
    DataValueError
        If the name belongs to another encoder, or what comes out is not one row of features per tile.

    Examples
    --------
    >>> import hespotex as hx
    >>> colour = hx.encoders.from_module(lambda tiles: tiles.mean((1, 2)), name="colour", tile_px=32)
    >>> colour.n_features, colour.tile_um
    (3, 16.0)
    """
    from ._registry import is_known, remember

    if isinstance(module, type) or not callable(module):
        raise DataTypeError(f"an encoder of your own must be a torch.nn.Module or a function, got {module!r}")
    network = _network(module)
    if name is None:
        if network is None:
            raise DataTypeError("a function needs a name that tells it from others: name='my_encoder'")
        name = sanitize(type(network).__name__.lower())
    if is_known(name):
        raise DataValueError(f"name={name!r} belongs to another encoder; choose another")
    identity: dict[str, Any] = {"name": name}
    if network is None:
        if mean is not None or std is not None or dtype != "float32":
            raise DataValueError(
                "mean=, std= and dtype= are for modules; a function gets tiles as uint8 and does the rest"
            )
        run: Callable[[np.ndarray, str], np.ndarray] = _of_function(module)
    else:
        own_mean, own_std = triple(mean, _UNIT[0]), triple(std, _UNIT[1])
        identity |= {
            "mean": list(own_mean),
            "std": list(own_std),
            "dtype": dtype,
            "weights_sha256": hash_module(network),
        }
        run = TileNetwork(copy.deepcopy(network), own_mean, own_std, dtype)
    size: dict[str, Any] = {"tile_px": tile_px, "tile_um": tile_um, "mpp": mpp, "n_features": n_features}
    encoder = OwnEncoder(run, identity, **size, code_hash=hash_code(module))
    remember(encoder)
    return encoder


def hash_module(module: torch.nn.Module) -> str:
    """SHA-256 of a module's structure, as its text shows it, and of its parameters and buffers."""
    import torch

    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\n{module!r}".encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            digest.update(f"{name}{value!r}".encode())
            continue
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _network(module: Any) -> torch.nn.Module | None:
    """The module, if it is one; torch is not imported to tell that it is not."""
    import sys

    torch = sys.modules.get("torch")
    return module if torch is not None and isinstance(module, torch.nn.Module) else None


def _of_function(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, str], np.ndarray]:
    def run(tiles: np.ndarray, device: str) -> np.ndarray:  # the function chooses its device itself
        features = function(tiles)
        return features.detach().cpu().float().numpy() if hasattr(features, "detach") else np.asarray(features)

    return run
