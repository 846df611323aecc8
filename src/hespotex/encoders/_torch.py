"""What encoders that are torch networks share: normalisation, device, forward passes that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .._logging import logger
from ..errors import DataValueError, DeviceMemoryError, HespotexWarning

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Halving", "TileNetwork", "is_out_of_memory"]

DTYPES = ("float32", "bfloat16", "float16")


class Halving:
    """Batches by what fits into the memory of a device: one that does not is taken in halves from then on."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._at_most: int | None = None  # tiles that fit, once more of them did not

    def __call__(self, run: Callable[[np.ndarray], np.ndarray], tiles: np.ndarray, device: torch.device) -> np.ndarray:
        """``run(tiles)``, one row for each of the tiles (b, h, w, 3), some at a time where need be.

        Raises
        ------
        DeviceMemoryError
            If not even one tile fits.

        Warns
        -----
        HespotexWarning
            If a batch does not, once for each size.
        """
        import torch

        if self._device != device:
            self._device, self._at_most = device, None
        step = max(min(self._at_most or len(tiles), len(tiles)), 1)
        parts: list[np.ndarray] = []
        start = 0
        while start < len(tiles) or not parts:
            try:
                parts.append(run(tiles[start : start + step]))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    raise DeviceMemoryError(
                        f"one tile of {tiles.shape[1]} × {tiles.shape[2]} px does not fit into the memory of "
                        f"{str(device)!r}; free some, take device='cpu', dtype='bfloat16' or a smaller encoder"
                    ) from error
                step = self._at_most = -(-step // 2)
                _forget(device)
                warnings.warn(
                    f"{str(device)!r} is out of memory; going on with batches of {step} tiles. To spare the attempt: "
                    f"batch_size={step}",
                    HespotexWarning,
                    stacklevel=3,
                )
            else:
                start += step
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TileNetwork:
    """A frozen network and the normalisation of its input.

    Where a batch does not fit into the memory of the device, it is taken in halves from then on.

    Parameters
    ----------
    network
        Module from (b, 3, h, w) to (b, n_features).
    mean, std
        Per channel, of values in [0, 1]; ``None`` leaves pixels as 0–255.
    dtype
        Type the network computes in. The CPUs that have bfloat16 instructions run it two to four times faster, at a
        cosine of 0.9999 to float32; others are slower, so that it is asked for.
    """

    def __init__(
        self, network: torch.nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: str
    ) -> None:
        import torch

        if dtype not in DTYPES:
            raise DataValueError(f"dtype={dtype!r} is unknown; possible: {', '.join(map(repr, DTYPES))}")
        self._dtype = getattr(torch, dtype)
        # Convolutions are up to 1.5 times as fast on CPU with channels last, and no slower elsewhere.
        self._network = network.eval().requires_grad_(requires_grad=False).to(self._dtype)
        self._network = self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # untyped there
        # (x / 255 - mean) / std, as one product and one sum
        centre, spread = (None if value is None else torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        self._scale = None if spread is None else 1 / (255 * spread)
        self._shift = None if centre is None or spread is None else -centre / spread
        self._device: torch.device | None = None
        self._in_halves = Halving()
        self._compiled: Callable[[Any], Any] | None = None
        self._compiled_for = 0  # tiles

    def __call__(
        self,
        tiles: np.ndarray,
        device: str,
        after: Callable[[Any], Any] | None = None,
        forward: Callable[[Any], Any] | None = None,
    ) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, h, w, 3) uint8.

        `forward` is what to call in place of the network itself, such as a method of it that stops earlier.

        Raises
        ------
        DeviceMemoryError
            If not even one tile fits into the memory of the device.

        Warns
        -----
        HespotexWarning
            If a batch does not, once for each size.
        """
        import torch

        from .._device import resolve_device

        target = resolve_device(device)
        if self._device != target:
            self._network = self._network.to(target)
            self._device = target
        with torch.inference_mode():
            return self._in_halves(lambda part: self._features(part, target, after, forward), tiles, target)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the network without its device, to be compiled there if it was to be here."""
        if self._device is not None and self._device.type != "cpu":
            self._network, self._device = self._network.cpu(), None
        return {**self.__dict__, "_compiled": self._compiled is not None, "_compiled_for": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _compiled=None)
        if state["_compiled"]:
            self.compile()

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called, and torch could."""
        return self._compiled is not None

    def compile(self) -> None:
        """Have torch compile the network at the next batch, for its size; it pays after some thousand tiles.

        Where torch cannot (it needs a C++ compiler), the network goes on as it is, and the log says why.
        """
        import torch

        self._compiled, self._compiled_for = torch.compile(self._network, dynamic=False), 0

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The network as it is, for batches of many sizes: each would be compiled anew."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    def _features(
        self,
        tiles: np.ndarray,
        target: torch.device,
        after: Callable[[Any], Any] | None,
        forward: Callable[[Any], Any] | None,
    ) -> np.ndarray:
        import torch

        # NumPy's (b, h, w, c) is the memory of a channels-last (b, c, h, w): no copy is needed.
        x = torch.from_numpy(np.ascontiguousarray(tiles)).to(target).permute(0, 3, 1, 2).float()
        if self._scale is not None and self._shift is not None:
            x.mul_(self._scale.to(target)).add_(self._shift.to(target))
        x = x.to(self._dtype)
        if forward is None and self._compiled is not None and len(tiles):
            features = self._run_compiled(x).float()
        else:
            features = (forward or self._network)(x).float()
        return (after(features) if after else features).cpu().numpy()

    def _run_compiled(self, x: Any) -> Any:
        """Features by the compiled network; a smaller batch is filled up, as each size would be compiled anew."""
        import torch

        self._compiled_for = max(self._compiled_for, len(x))
        full = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self._compiled_for - len(x)))
        assert self._compiled is not None
        try:
            return self._compiled(full.contiguous(memory_format=torch.channels_last))[: len(x)]
        except Exception as error:  # what compilers raise is not a closed set
            if is_out_of_memory(error):
                self._compiled_for = 0  # the halves are not to be filled up to what did not fit
                raise
            logger.warning("torch cannot compile the network, which goes on as it is: %s", str(error).split("\n")[0])
            self._compiled = None
            return self._network(x)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says so; that of CUDA has a class of its own, those of other devices only a text."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _forget(device: torch.device) -> None:
    """Give back what the failed attempt reserved."""
    import torch

    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
