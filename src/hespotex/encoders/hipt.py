"""HIPT: two nested transformers, of which iStar takes the features of superpixels. Weights are the user's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError, MissingWeightsError
from ._base import Encoder, EncoderInfo
from ._licence import show_licence
from ._torch import DTYPES, Halving
from ._weights import identify, load_into, read_state_dict, recall

if TYPE_CHECKING:
    import torch

    from ..data.geometry import Slide
    from ..image.stream import Block, WorkingGrid
    from ._vit import VisionTransformer

__all__ = ["HIPT", "Networks", "image_maps", "load_networks", "random_networks"]

SIDE = 16  # pixels of a superpixel
PATCH = 256  # pixels of a patch: 16 superpixels
WINDOW = 4096  # pixels of a region: 16 patches, what the upper transformer was trained on
LOCAL, REGIONAL = 384, 192
HEADS = 6
MAX_ATTENTION_GB = 8.0  # of one layer over a whole slide

_NAMES = ("vit256", "vit4k")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_TRAINING_HEAD = "head."  # of self-supervised training, no part of the transformer


class Networks:
    """The two transformers, frozen.

    Parameters
    ----------
    vit256
        From patches of 256 px to a class token and 256 tokens, 384 wide.
    vit4k
        From a grid of class tokens to tokens, 192 wide.
    dtype
        Type they compute in.
    """

    def __init__(self, vit256: VisionTransformer, vit4k: VisionTransformer, dtype: str = "float32") -> None:
        import torch

        if dtype not in DTYPES:
            raise DataValueError(f"dtype={dtype!r} is unknown; possible: {', '.join(map(repr, DTYPES))}")
        self._dtype = getattr(torch, dtype)
        self._vit256, self._vit4k = (
            network.eval().requires_grad_(requires_grad=False).to(self._dtype) for network in (vit256, vit4k)
        )
        self._in_halves = Halving()

    def local(self, patches: np.ndarray, *, batch_size: int, device: str) -> tuple[np.ndarray, np.ndarray]:
        """Class tokens (n, 384) and patch tokens (n, 16, 16, 384) of patches (n, 256, 256, 3) uint8.

        Equal patches, such as blank glass, are computed once.
        """
        import torch

        numbers: dict[bytes, int] = {}
        which = np.array([numbers.setdefault(patch.tobytes(), len(numbers)) for patch in patches], dtype=np.int64)
        first = np.unique(which, return_index=True)[1]
        target = self._to(device)
        class_tokens = np.empty((len(first), LOCAL), dtype=np.float32)
        tokens = np.empty((len(first), PATCH // SIDE, PATCH // SIDE, LOCAL), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(first), batch_size):
                some = slice(start, start + batch_size)
                out = self._in_halves(lambda pixels: self._tokens(pixels, target), patches[first[some]], target)
                class_tokens[some] = out[:, 0]
                tokens[some] = out[:, 1:].reshape(-1, *tokens.shape[1:])
        return class_tokens[which], tokens[which]

    def regional(self, grid: np.ndarray, *, device: str) -> np.ndarray:
        """Tokens (h, w, 192) of a grid of class tokens (h, w, 384)."""
        import torch

        x = torch.from_numpy(np.ascontiguousarray(grid.transpose(2, 0, 1)))[None].to(self._to(device))
        with torch.inference_mode():
            tokens = self._vit4k(x.to(self._dtype))[0, 1:].float().cpu().numpy()
        return tokens.reshape(*grid.shape[:2], REGIONAL)

    def _tokens(self, patches: np.ndarray, target: torch.device) -> np.ndarray:
        """Tokens of the lower transformer (b, 257, 384) of patches (b, 256, 256, 3) uint8."""
        import torch

        x = torch.from_numpy(patches).to(target).permute(0, 3, 1, 2).float()
        return self._vit256(((x / 255 - 0.5) / 0.5).to(self._dtype)).float().cpu().numpy()

    def _to(self, device: str) -> torch.device:
        from .._device import resolve_device

        target = resolve_device(device)
        self._vit256.to(target)
        self._vit4k.to(target)
        return target


def random_networks(seed: int = 0, dtype: str = "float32") -> Networks:
    """Both transformers with random weights, for tests."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Networks(*_new(), dtype)


def load_networks(paths: Mapping[str, Path], dtype: str = "float32") -> Networks:
    """Both transformers from the files ``{"vit256": …, "vit4k": …}``.

    Of a checkpoint of self-supervised training the teacher is taken. No code in a file is run.

    Raises
    ------
    CheckpointError
        If a file is damaged, or a tensor is missing, left over or of another shape.
    """
    import torch

    networks = _new()
    for name, network in zip(_NAMES, networks, strict=True):
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of the training, plain values
            state = read_state_dict(paths[name], wrappers=("teacher", "state_dict", "model"))
        state = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
        own = {key: value for key, value in state.items() if not key.startswith(_TRAINING_HEAD)}
        load_into(network, own, f"the transformer {name!r} of HIPT")
    return Networks(*networks, dtype)


def image_maps(
    image: np.ndarray, networks: Networks, *, batch_size: int = 64, device: str = "cpu", legacy: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Regional (H/16, W/16, 192) and local features (H/16, W/16, 384) of a whole image in memory.

    Parameters
    ----------
    image
        RGB at 0.5 µm per pixel, (H, W, 3) uint8, sides multiples of 256.
    networks
        The two transformers.
    batch_size
        Patches per forward pass.
    device
        As everywhere.
    legacy
        As published: the image is continued by its edge to multiples of 4096 px, and the upper transformer attends to
        all of it at once. Otherwise it attends to windows of 16 × 16 patches, which it was trained on.
    """
    height, width = image.shape[:2]
    if height % PATCH or width % PATCH:
        raise DataValueError(f"image of {height} × {width} pixels: its sides must be multiples of {PATCH}")
    if legacy:
        image = np.pad(image, [(0, -height % WINDOW), (0, -width % WINDOW), (0, 0)], mode="edge")
    class_tokens, local = _local_maps(image, networks, batch_size, device)
    if legacy:
        _check_attention(class_tokens.shape[:2])
        regional = networks.regional(class_tokens, device=device)
    else:
        step = WINDOW // PATCH
        regional = np.empty((*class_tokens.shape[:2], REGIONAL), dtype=np.float32)
        for row, column in product(*(range(0, size, step) for size in regional.shape[:2])):
            window = slice(row, row + step), slice(column, column + step)
            regional[window] = networks.regional(class_tokens[window], device=device)
    rows, columns = height // SIDE, width // SIDE
    return _spread(regional)[:rows, :columns], local[:rows, :columns]


class HIPT(Encoder):
    """Features of superpixels (16 px at 0.5 µm, thus 8 µm) by HIPT's two transformers, as iStar arranges them.

    A place gets the 579 features of the superpixel that holds it: 192 regional ones, tokens of the upper transformer
    for the patch of 128 µm; 384 local ones, the token of the lower transformer for the superpixel itself; and its mean
    colour. Superpixels are counted from the image's first pixel. The slide is streamed in windows of 16 × 16 patches;
    the cost grows with the area of the windows that hold places.

    The weights may not be passed on: get those of both transformers from the authors of HIPT, mind their licence, and
    name the folder.

    Parameters
    ----------
    weights
        Folder with one file each that begins with ``vit256`` and ``vit4k``, or ``{"vit256": file, "vit4k": file}``;
        safetensors or PyTorch checkpoints. ``"random"`` for tests. May be left out if this machine has seen files with
        `weights_sha256` before. Nothing is downloaded.
    seed
        Of random weights.
    tile_um, mpp
        Side of a superpixel in µm, or the resolution that gives 16 px; 8 µm at 0.5 µm/px by default.
    shifts
        Grids of patches per axis, each shifted by a part of a patch, whose features are averaged: 4 gives the 16 of
        iStar, at as many times the cost.
    global_attention
        Let the upper transformer attend to the whole slide at once, as iStar does, and not to windows of the size it
        was trained on. All of the slide is then read, blank glass included; memory grows with the square of its area,
        on which the features depend, too.
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
        If they are damaged or of other transformers.
    """

    info = EncoderInfo(
        name="hipt",
        summary="two nested transformers over superpixels, the features of iStar; own weights needed",
        n_features=REGIONAL + LOCAL + 3,
        mpp=0.5,
        tile_um=8.0,
        licence="GPL-3.0 (Mahmood lab), non-commercial academic purposes only",
        needs_weights=True,
        is_network=True,
    )
    name = "hipt"
    n_features = REGIONAL + LOCAL + 3

    def __init__(
        self,
        weights: str | Path | Mapping[str, str | Path] | None = None,
        *,
        seed: int = 0,
        tile_um: float | None = None,
        mpp: float | None = None,
        shifts: int = 1,
        global_attention: bool = False,
        dtype: str = "float32",
        weights_name: str | None = None,
        weights_sha256: Mapping[str, str] | None = None,
    ) -> None:
        if mpp is not None and tile_um is not None and abs(tile_um / (mpp * SIDE) - 1) > 1e-6:
            raise DataValueError(
                f"tile_um={tile_um!r} and mpp={mpp!r} contradict each other: superpixels have {SIDE} px; give one"
            )
        self.tile_um = float(tile_um if tile_um is not None else SIDE * (0.5 if mpp is None else mpp))
        if not (np.isfinite(self.tile_um) and self.tile_um > 0):
            raise DataValueError(f"tile_um={tile_um!r}, mpp={mpp!r}: sizes must be positive")
        if shifts not in (1, 2, 4, 8, 16):
            raise DataValueError(f"shifts={shifts!r} must be 1, 2, 4, 8 or 16: shifts are whole superpixels")
        if global_attention and shifts > 1:
            raise DataValueError(
                "global_attention=True goes with shifts=1; both together are hespotex.encoders.hipt.image_maps and "
                "hespotex.models.istar.features.feature_map on an image in memory"
            )
        self.mpp = self.tile_um / SIDE
        self._shifts, self._global, self._dtype, self._seed = int(shifts), bool(global_attention), dtype, int(seed)
        if weights == "random" or (weights is None and weights_name == "random"):
            self._weights_name, self._sha256 = "random", None
            self._networks = random_networks(self._seed, dtype)
            return
        expected = dict(weights_sha256 or {})
        paths = _find(weights, expected)
        found = {name: identify(paths[name], expected=expected.get(name)) for name in _NAMES}
        show_licence(self.name, self.info.licence)
        self._sha256 = {name: sha256 for name, (_, sha256) in found.items()}
        self._weights_name = weights_name or ", ".join(path.name for path, _ in found.values())
        self._networks = load_networks({name: path for name, (path, _) in found.items()}, dtype)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        identity = {"seed": self._seed} if self._sha256 is None else {"weights_sha256": self._sha256}
        return {
            "name": self.name,
            "tile_um": self.tile_um,
            "shifts": self._shifts,
            "global_attention": self._global,
            "dtype": self._dtype,
            "weights_name": self._weights_name,
            **identity,
        }

    def runs(self, slide: Slide, centres: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
        """Superpixels by rows of windows; all of them where attention is over the whole slide."""
        from ..image.stream import working_grid

        if self._global or not len(centres):
            return super().runs(slide, centres, batch_size=batch_size)
        row = _cells(working_grid(slide, self.mpp), centres)[:, 0] // (WINDOW // SIDE)
        order = np.argsort(row, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(row[order])) + 1)

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), features (b, 579) float32), window by window.

        Raises
        ------
        DataValueError
            If attention over the whole slide would take too much memory.
        """
        from ..image.stream import iter_blocks, working_grid

        grid = working_grid(slide, self.mpp)
        cells = _cells(grid, centres)
        if not len(cells):
            return
        corners = cells[:, ::-1] * SIDE
        inside = np.concatenate([corners + 1, corners + SIDE - 1], axis=1).reshape(-1, 2, 2)
        blocks = iter_blocks(
            slide,
            mpp=self.mpp,
            block_px=WINDOW,
            halo_px=PATCH,
            boxes=None if self._global else grid.to_pixels(inside).reshape(-1, 4),
            progress_bar=progress_bar,
        )
        if self._global:
            _check_attention((-(-grid.shape[0] // PATCH), -(-grid.shape[1] // PATCH)))
            yield np.arange(len(cells)), self._whole(blocks, cells, grid.shape, batch_size, device)
            return
        for block in blocks:
            first = np.array([block.y, block.x]) // SIDE
            rows = np.flatnonzero((cells // (WINDOW // SIDE) == first // (WINDOW // SIDE)).all(axis=1))
            if len(rows):
                row, column = (cells[rows] - first).T
                yield rows, self._window(block, batch_size, device)[row, column]

    def _window(self, block: Block, batch_size: int, device: str) -> np.ndarray:
        """Features of all superpixels of a window, (h, w, 579), each the mean over the shifts."""
        size = [stop.stop - stop.start for stop in block.core]
        rows, columns = (-(-length // SIDE) for length in size)
        step = PATCH // self._shifts
        total = np.zeros((rows, columns, REGIONAL + LOCAL), dtype=np.float32)
        for up, left in product(range(0, PATCH, step), repeat=2):
            # The halo holds the patch before the window, and white beyond the image.
            pixels = block.pixels[PATCH - up :, PATCH - left :]
            height, width = (
                -(-(length + shift) // PATCH) * PATCH for length, shift in zip(size, (up, left), strict=True)
            )
            class_tokens, local = _local_maps(pixels[:height, :width], self._networks, batch_size, device)
            maps = np.concatenate([_spread(self._networks.regional(class_tokens, device=device)), local], axis=2)
            total += maps[up // SIDE : up // SIDE + rows, left // SIDE : left // SIDE + columns]
        return np.concatenate([total / self._shifts**2, _colour(block)], axis=2)

    def _whole(
        self, blocks: Iterator[Block], cells: np.ndarray, shape: tuple[int, int], batch_size: int, device: str
    ) -> np.ndarray:
        """Features of some superpixels (n, 579), with attention over the whole slide."""
        features = np.empty((len(cells), self.n_features), dtype=np.float32)
        class_tokens = np.zeros((-(-shape[0] // PATCH), -(-shape[1] // PATCH), LOCAL), dtype=np.float32)
        for block in blocks:
            size = [-(-(stop.stop - stop.start) // PATCH) * PATCH for stop in block.core]
            pixels = block.pixels[PATCH : PATCH + size[0], PATCH : PATCH + size[1]]
            found, local = _local_maps(pixels, self._networks, batch_size, device)
            y, x = block.y // PATCH, block.x // PATCH
            class_tokens[y : y + found.shape[0], x : x + found.shape[1]] = found
            first = np.array([block.y, block.x]) // SIDE
            rows = np.flatnonzero((cells // (WINDOW // SIDE) == first // (WINDOW // SIDE)).all(axis=1))
            row, column = (cells[rows] - first).T
            features[rows, REGIONAL : REGIONAL + LOCAL] = local[row, column]
            features[rows, REGIONAL + LOCAL :] = _colour(block)[row, column]
        row, column = cells.T // (PATCH // SIDE)
        features[:, :REGIONAL] = self._networks.regional(class_tokens, device=device)[row, column]
        return features


def _new() -> tuple[VisionTransformer, VisionTransformer]:
    from ._vit import VisionTransformer

    return (
        VisionTransformer(LOCAL, 12, HEADS, patch_px=SIDE),
        VisionTransformer(REGIONAL, 6, HEADS, n_inputs=LOCAL),
    )


def _find(weights: str | Path | Mapping[str, str | Path] | None, expected: Mapping[str, str]) -> dict[str, Path]:
    """The two files."""
    if isinstance(weights, Mapping):
        if missing := [name for name in _NAMES if name not in weights]:
            raise MissingWeightsError(f"weights= names no file for {', '.join(map(repr, missing))}")
        return {name: Path(weights[name]) for name in _NAMES}
    if weights is not None:
        folder = Path(weights).expanduser()
        if not folder.is_dir():
            raise MissingWeightsError(
                f"weights={str(folder)!r} is not a folder; give the one that holds the files of {' and '.join(_NAMES)}"
            )
        return {name: _file(folder, name) for name in _NAMES}
    known = {name: recall(sha256) for name, sha256 in expected.items() if name in _NAMES}
    paths = {name: path for name, path in known.items() if path is not None}
    if len(paths) < len(_NAMES):
        raise MissingWeightsError(
            "encoder 'hipt' needs weights of two transformers, which hespotex may not pass on; give their folder: "
            "hx.pp.embed(sdata, 'hipt', weights='folder')"
            + (f" (files with SHA-256 {', '.join(expected.values())})" if expected else "")
        )
    return paths


def _file(folder: Path, name: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.name.startswith(name) and path.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise MissingWeightsError(
            f"weights={str(folder)!r} must hold one file that begins with {name!r} ({'/'.join(_SUFFIXES)}), has {names}"
        )
    return found[0]


def _local_maps(image: np.ndarray, networks: Networks, batch_size: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Class tokens of patches (h, w, 384) and tokens of superpixels (16·h, 16·w, 384) of an image of whole patches."""
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    patches = image.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3)
    class_tokens, tokens = networks.local(patches, batch_size=batch_size, device=device)
    side = PATCH // SIDE
    local = tokens.reshape(rows, columns, side, side, LOCAL).swapaxes(1, 2).reshape(rows * side, columns * side, LOCAL)
    return class_tokens.reshape(rows, columns, LOCAL), local


def _spread(regional: np.ndarray) -> np.ndarray:
    """Features of patches repeated for all their superpixels."""
    return regional.repeat(PATCH // SIDE, axis=0).repeat(PATCH // SIDE, axis=1)


def _cells(grid: WorkingGrid, centres: np.ndarray) -> np.ndarray:
    """Superpixel (row, column) of the grid that holds each centre, (n, 2)."""
    xy = grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2))
    last = [-(-size // SIDE) - 1 for size in grid.shape]
    return np.clip(np.floor(xy[:, ::-1] / SIDE), 0, last).astype(np.int64)


def _colour(block: Block) -> np.ndarray:
    """Mean colour of the superpixels of a block in [0, 1], (h, w, 3) float32."""
    rows, columns = (-(-(stop.stop - stop.start) // SIDE) for stop in block.core)
    pixels = block.pixels[block.halo_px :, block.halo_px :][: rows * SIDE, : columns * SIDE]
    means = pixels.reshape(rows, SIDE, columns, SIDE, 3).mean(axis=(1, 3), dtype=np.float64)
    return (means / 255).astype(np.float32)


def _check_attention(shape: tuple[int, ...]) -> None:
    """Raise if attention over a grid of patches takes too much memory."""
    tokens = int(np.prod(shape)) + 1
    gigabytes = HEADS * tokens**2 * 4 / 1e9
    if gigabytes > MAX_ATTENTION_GB:
        raise DataValueError(
            f"global_attention=True: {tokens} patches of the slide at once take {gigabytes:.1f} GB a layer, more than "
            f"{MAX_ATTENTION_GB:g}; use the windows of the default, global_attention=False"
        )
