"""Mean colour: the plainest description of a place on a slide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataValueError
from ..image.features import window_means
from ._base import Encoder, EncoderInfo
from ._groups import grouped

if TYPE_CHECKING:
    from ..data.geometry import Slide
    from ..image.stream import Block

__all__ = ["MeanColour"]

PIXELS_PER_TILE = 16  # along its side; with so many, what a coarser level blurs at the border hardly counts
_BLOCK_PX = 1024


class MeanColour(Encoder):
    """Mean of red, green and blue over a square, each in [0, 1].

    A pixel that the square's border cuts counts by the share inside; what lies beyond the image does not count. Pixels
    are those of the coarsest level that is not coarser than `mpp`, as stored: on an image without coarser levels the
    mean is exact.

    Parameters
    ----------
    tile_um
        Side of the square in µm.
    mpp
        µm per pixel that are fine enough; a sixteenth of the tile by default. A coarser image is read as it is.

    Raises
    ------
    DataValueError
        If a size is not positive.
    """

    info = EncoderInfo(
        name="rgb", summary="mean red, green and blue", n_features=3, mpp=0.5, tile_um=8.0, licence="BSD-3-Clause"
    )
    name = "rgb"
    n_features = 3

    def __init__(self, *, tile_um: float = 8.0, mpp: float | None = None) -> None:
        mpp = tile_um / PIXELS_PER_TILE if mpp is None else mpp
        for label, value in (("tile_um", tile_um), ("mpp", mpp)):
            if not (np.isfinite(value) and value > 0):
                raise DataValueError(f"{label}={value!r} must be a positive number")
        self.tile_um, self.mpp = float(tile_um), float(mpp)

    def params(self) -> dict[str, Any]:
        """JSON values that identify the embedding; see :meth:`Encoder.params`."""
        return {"name": self.name, "tile_um": self.tile_um, "mpp": self.mpp}

    def resized(self, factor: float) -> MeanColour:
        """The same encoder for tiles `factor` times as wide, seen at a coarser resolution."""
        return MeanColour(tile_um=factor * self.tile_um, mpp=factor * self.mpp)

    def embed(
        self, slide: Slide, centres: np.ndarray, *, batch_size: int, device: str, progress_bar: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row indices (b,), colours (b, 3) float32), block by block of the slide.

        `device` and `batch_size` are ignored.
        """
        from ..image.stream import iter_blocks, working_grid

        # A tile narrower than half a pixel is refused here, as by all encoders.
        level = slide.level_for(max(self.mpp, min(slide.mpp, self.tile_um)))
        mpp = slide.mpp * level.downsample
        grid = working_grid(slide, mpp)
        side = self.tile_um / grid.mpp
        xy = grid.from_pixels(np.asarray(centres, dtype=np.float64).reshape(-1, 2))
        last = np.array(grid.shape[::-1]) - 1
        blocks, groups = grouped(np.clip(np.floor(xy), 0, last).astype(np.int64) // _BLOCK_PX)
        members = dict(zip(map(tuple, blocks.tolist()), groups, strict=True))
        places = iter_blocks(
            slide,
            mpp=mpp,
            block_px=_BLOCK_PX,
            halo_px=int(np.ceil(side / 2)) + 1,
            boxes=np.hstack([grid.to_pixels(blocks * _BLOCK_PX + 0.5)] * 2),
            progress_bar=progress_bar,
        )
        extent = np.array(slide.shape[::-1]) / grid.factor
        for block in places if len(blocks) else ():
            rows = members[block.x // _BLOCK_PX, block.y // _BLOCK_PX]
            yield rows, _colours(block, xy[rows], side, extent)


def _colours(block: Block, xy: np.ndarray, side: float, extent: np.ndarray) -> np.ndarray:
    """Means over squares around `xy` that lie in the core of the block, without what lies beyond the image."""
    left, top = (max(block.halo_px - start, 0) for start in (block.x, block.y))
    pixels = block.pixels[top:, left:]
    first = np.array([block.x - block.halo_px + left, block.y - block.halo_px + top])
    width, height = np.minimum(extent - first, pixels.shape[1::-1])
    means = window_means(pixels.transpose(2, 0, 1), xy - first, [side], size=(float(width), float(height)))
    return means[:, 0] / np.float32(255)
