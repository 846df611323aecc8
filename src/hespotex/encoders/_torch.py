"""What encoders that are torch networks share: normalisation, device, compilation, batches that fit into memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError
from ._compiled import Compiled
from ._memory import Halving

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Halving", "Network", "TileNetwork", "torch_dtype"]

DTYPES = ("float32", "bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype:
    """The type of torch that a network is asked to compute in.

    Raises
    ------
    DataValueError
        If `name` is none of :data:`DTYPES`.
    """
    import torch

    if name not in DTYPES:
        raise DataValueError(f"dtype={name!r} is unknown; possible: {', '.join(map(repr, DTYPES))}")
    found: torch.dtype = getattr(torch, name)
    return found


class Network(ABC):
    """A frozen network on a device, compiled if asked, that encoders for tiles of several sizes share.

    Where a batch does not fit into the memory of the device, it is taken in halves from then on.

    Parameters
    ----------
    dtype
        Type the network computes in. The CPUs that have bfloat16 instructions run it two to four times faster, at a
        cosine of 0.9999 to float32; others are slower, so that it is asked for.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = torch_dtype(dtype)
        self._device: torch.device | None = None
        self._in_halves = Halving()
        self._compiled = Compiled()

    def __call__(
        self,
        tiles: np.ndarray,
        device: str,
        after: Callable[[Any], Any] | None = None,
        forward: Callable[[Any], Any] | None = None,
    ) -> np.ndarray:
        """Features (b, n_features) float32 of RGB tiles (b, h, w, 3) uint8.

        `forward` is what to call in place of the network itself, such as a method of it that stops earlier; it is not
        compiled.

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
            self._move(target)
            self._device = target

        def run(some: np.ndarray) -> np.ndarray:
            return self._features(some, target, after, forward)

        with torch.inference_mode():
            if forward is None:
                return self._in_halves(partial(self._compiled, run), tiles, target)
            with self.uncompiled():
                return self._in_halves(run, tiles, target)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: on the CPU, as that process may have no other device. It moves back when it is called."""
        if self._device is not None and self._device.type != "cpu":
            import torch

            self._move(torch.device("cpu"))
            self._device = None
        return self.__dict__

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called, and torch could."""
        return bool(self._compiled)

    def compile(self) -> None:
        """Have torch compile the network at the next batch, for its size; it pays after some thousand tiles.

        Where torch cannot (it needs a C++ compiler), the network goes on as it is, and the log says why.
        """
        self._compiled.stop()  # what it consists of is looked up in the network as it is
        self._compiled.start(self._compilable())

    def uncompiled(self) -> AbstractContextManager[None]:
        """The network as it is, for batches of many sizes: each would be compiled anew."""
        return self._compiled.paused()

    @abstractmethod
    def _move(self, target: torch.device) -> None:
        """Put the network onto a device."""

    @abstractmethod
    def _compilable(self) -> list[torch.nn.Module]:
        """The modules to compile."""

    @abstractmethod
    def _features(
        self,
        tiles: np.ndarray,
        target: torch.device,
        after: Callable[[Any], Any] | None,
        forward: Callable[[Any], Any] | None,
    ) -> np.ndarray:
        """Features of some tiles in one pass."""


class TileNetwork(Network):
    """A module and the normalisation of its input.

    Parameters
    ----------
    network
        Module from (b, 3, h, w) to (b, n_features).
    mean, std
        Per channel, of values in [0, 1]; ``None`` leaves pixels as 0–255.
    dtype
        As for :class:`Network`.
    """

    def __init__(
        self, network: torch.nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: str
    ) -> None:
        import torch

        super().__init__(dtype)
        # Convolutions are up to 1.5 times as fast on CPU with channels last, and no slower elsewhere.
        self._network = network.eval().requires_grad_(requires_grad=False).to(self._dtype)
        self._network = self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # untyped there
        # (x / 255 - mean) / std, as one product and one sum
        centre, spread = (None if value is None else torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        self._scale = None if spread is None else 1 / (255 * spread)
        self._shift = None if centre is None or spread is None else -centre / spread

    def _move(self, target: torch.device) -> None:
        self._network = self._network.to(target)

    def _compilable(self) -> list[torch.nn.Module]:
        return [self._network]

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
        features = (forward or self._network)(x.to(self._dtype)).float()
        result: np.ndarray = (after(features) if after else features).cpu().numpy()
        return result
