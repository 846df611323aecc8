"""Networks that torch compiles, and what is done where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .._logging import logger
from ._memory import is_out_of_memory

if TYPE_CHECKING:
    import torch

__all__ = ["Compiled"]


class Compiled:
    """The modules of a network that torch is to compile in place, and the size of batch it does so for.

    There is one such object for a network: encoders for tiles of other sizes share it with the modules.
    """

    def __init__(self) -> None:
        self._modules: list[torch.nn.Module] = []
        self._size = 0  # tiles

    def __bool__(self) -> bool:
        return bool(self._modules)

    def start(self, modules: Sequence[torch.nn.Module]) -> None:
        """Have torch compile `modules` at the next batch, for its size."""
        self._modules, self._size = list(modules), 0
        for module in self._modules:
            module.compile(dynamic=False)

    def stop(self) -> None:
        """Go on with the modules as they are."""
        for module in self._modules:
            module._compiled_call_impl = None
        self._modules = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The modules as they are meanwhile; what is compiled already is kept."""
        modules, calls = self._modules, [module._compiled_call_impl for module in self._modules]
        self.stop()
        try:
            yield
        finally:
            self._modules = modules
            for module, call in zip(modules, calls, strict=True):
                module._compiled_call_impl = call

    def __call__(self, run: Callable[[np.ndarray], np.ndarray], tiles: np.ndarray) -> np.ndarray:
        """``run(tiles)``; a smaller batch is filled up, as each size would be compiled anew."""
        if not self or not len(tiles):
            return run(tiles)
        self._size = max(self._size, len(tiles))
        try:
            return run(np.pad(tiles, ((0, self._size - len(tiles)), (0, 0), (0, 0), (0, 0))))[: len(tiles)]
        except Exception as error:  # what compilers raise is not a closed set
            if is_out_of_memory(error):
                self._size = 0  # the halves are not to be filled up to what did not fit
                raise
            logger.warning("torch cannot compile the network, which goes on as it is: %s", str(error).split("\n")[0])
            self.stop()
            return run(tiles)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the modules, to be compiled there if they were to be here."""
        return {"_modules": self._modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.start(state["_modules"])
