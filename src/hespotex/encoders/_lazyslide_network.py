"""A model of lazyslide-models on a device: what it is fed, moved and compiled as."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError
from ._torch import Network

if TYPE_CHECKING:
    import torch

__all__ = ["PackageModel"]

_TILE_PX = 224  # where a model does not say


class PackageModel(Network):
    """A model of the package, its preprocessing, and the modules it puts together.

    Parameters
    ----------
    model
        The model as the package makes it.
    tile_px
        Side of its tiles; ``None`` for that which its preprocessing resizes to.
    dtype
        Type its modules compute in.

    Raises
    ------
    DataValueError
        If `tile_px` is less than 1.
    """

    def __init__(self, model: Any, tile_px: int | None, dtype: str) -> None:
        super().__init__(dtype)
        self.model = model
        self._transform = model.get_transform()
        self.tile_px = _side(model, self._transform) if tile_px is None else int(tile_px)
        if self.tile_px < 1:
            raise DataValueError(f"tile_px={tile_px!r} must be at least 1")
        if dtype != "float32":
            for part in self._parts():
                part.to(self._dtype)

    def white(self) -> np.ndarray:
        """One tile without tissue."""
        return np.full((1, self.tile_px, self.tile_px, 3), 255, np.uint8)

    def _parts(self) -> list[torch.nn.Module]:
        import torch

        return [part for part in vars(self.model).values() if isinstance(part, torch.nn.Module)]

    def _move(self, target: torch.device) -> None:
        self.model.to(target)

    def _features(
        self,
        tiles: np.ndarray,
        target: torch.device,
        after: Callable[[Any], Any] | None,
        forward: Callable[[Any], Any] | None,
    ) -> np.ndarray:
        import torch

        out = (forward or self.model.encode_image)(self._images(tiles, target))
        if after is not None:
            out = after(out)
        return out.float().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out, np.float32)

    def _images(self, tiles: np.ndarray, target: torch.device) -> Any:
        """The tiles as the model takes them: normalised tensors, or pixels for models that do it themselves."""
        import torch
        from torchvision.transforms import v2

        if self._transform is None:
            return list(tiles)
        if isinstance(self._transform, v2.Compose):  # takes a batch at once, and on the device
            images = self._transform(torch.from_numpy(np.ascontiguousarray(tiles)).to(target).permute(0, 3, 1, 2))
        else:
            from PIL import Image

            images = torch.stack([self._transform(Image.fromarray(tile)) for tile in tiles]).to(target)
        images = images.as_subclass(torch.Tensor)  # not torchvision's Image, which torch cannot compile for
        return images.to(self._dtype) if images.is_floating_point() else images

    def _compilable(self) -> list[torch.nn.Module]:
        """The modules that encoding calls itself: the whole network, or the parts that the model's class puts together."""
        called: dict[int, torch.nn.Module] = {}
        inside: list[torch.nn.Module] = []

        def enter(module: torch.nn.Module, _args: Any) -> None:
            if not inside and next(module.parameters(), None) is not None:
                called.setdefault(id(module), module)
            inside.append(module)

        def leave(_module: torch.nn.Module, _args: Any, _out: Any) -> None:  # what a hook returns replaces the output
            inside.pop()

        modules = {id(module): module for part in self._parts() for module in part.modules()}.values()
        hooks = [
            hook
            for module in modules
            for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
        ]
        try:
            self(self.white(), str(self._device or "cpu"))
        finally:
            for hook in hooks:
                hook.remove()
        return list(called.values())


def _side(model: Any, transform: Any) -> int:
    """Side that the model's own preprocessing resizes to."""
    for step in getattr(transform, "transforms", ()):
        if type(step).__name__ == "Resize":
            return int(np.max(step.size))
    side = getattr(model, "img_size", None) or getattr(model, "image_size", None) or _TILE_PX
    return int(np.max(side))
