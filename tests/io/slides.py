"""Slides written for tests: pyramids as the benchmarks write them, and Leica's .scn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import tifffile

__all__ = ["blocks", "plain_pyramid", "slide_writer", "write_scn"]


def slide_writer() -> ModuleType:
    """``benchmarks/slides.py``, which is no part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "slides.py"
    spec = importlib.util.spec_from_file_location("hespotex_benchmark_slides", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image (height, width, 3) of 32 px blocks of one colour, so that halving is exact away from odd borders."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3), dtype=np.uint8)
    return np.kron(cells, np.ones((32, 32, 1), np.uint8))[:height, :width]


def plain_pyramid(
    path: Path, pixels: np.ndarray, *, levels: int = 3, tile: int = 256, mpp: float | None = 0.5, **options: object
) -> list[np.ndarray]:
    """Write every second pixel of every second row as the next level, without loss; returns the levels."""
    written = [pixels[:: 2**level, :: 2**level] for level in range(levels)]
    per_cm = None if mpp is None else 10_000 / mpp
    with tifffile.TiffWriter(path) as tiff:
        for level, image in enumerate(written):
            resolution = {} if per_cm is None else {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            tiff.write(
                image,
                photometric="rgb",
                tile=(tile, tile),
                subfiletype=int(level > 0),
                metadata=None,
                **{"compression": "zlib", **resolution, **options},
            )
    return written


def write_scn(path: Path, pixels: np.ndarray, *, mpp: float, left: int, top: int) -> None:
    """A slide as Leica's scanners write it: a macro image, then the scanned area somewhere on the glass, in two levels."""
    height, width = pixels.shape[:2]
    nm = mpp * 1000
    glass_x, glass_y = round((width + 2 * left) * nm), round((height + 2 * top) * nm)
    half = pixels[::2, ::2]
    macro = np.full((glass_y // 16_000, glass_x // 16_000, 3), 200, np.uint8)

    def image(
        name: str, levels: list[tuple[int, np.ndarray]], view: tuple[int, int, int, int], objective: float
    ) -> str:
        sizes = [(ifd, level.shape[1], level.shape[0]) for ifd, level in levels]
        dimensions = "".join(
            f'<dimension sizeX="{x}" sizeY="{y}" r="{r}" ifd="{ifd}"/>' for r, (ifd, x, y) in enumerate(sizes)
        )
        return (
            f'<image name="{name}"><creationDate>2026-01-01T00:00:00.00Z</creationDate>'
            f'<device model="Leica SCN400" version="1"/>'
            f'<pixels sizeX="{sizes[0][1]}" sizeY="{sizes[0][2]}">{dimensions}</pixels>'
            f'<view sizeX="{view[0]}" sizeY="{view[1]}" offsetX="{view[2]}" offsetY="{view[3]}" spacingZ="0"/>'
            f"<scanSettings><objectiveSettings><objective>{objective}</objective></objectiveSettings>"
            "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    area = (round(width * nm), round(height * nm), round(left * nm), round(top * nm))
    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="u" sizeX="{glass_x}" sizeY="{glass_y}"><barcode>x</barcode>'
        + image("macro", [(0, macro)], (glass_x, glass_y, 0, 0), 0.6)
        + image("main", [(1, pixels), (2, half)], area, 20)
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for ifd, level in enumerate((macro, pixels, half)):
            per_cm = 10_000 / (mpp if ifd < 2 else 2 * mpp)
            tiff.write(
                level,
                photometric="rgb",
                tile=(256, 256),
                description=description if ifd == 0 else None,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                software=False,
                metadata=None,
            )
