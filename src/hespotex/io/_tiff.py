"""Lazy reading of tiled TIFF, and the pixel size that a TIFF states."""

from __future__ import annotations

import re
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from tifffile import TiffFile

__all__ = ["TiffLevel", "stated_mpp"]

_MICRONS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3}


class TiffLevel:
    """One level of a tiled TIFF as (3, h, w) uint8, read by slices.

    The file is opened at the first read and again after unpickling, so that the lazy image travels to
    other processes; a finalizer closes it.
    """

    ndim = 3
    dtype = np.dtype("uint8")

    def __init__(self, path: Path, level: int, axes: str, shape: tuple[int, int]) -> None:
        self.path = path
        self.level = level
        self.axes = axes
        self.shape = (3, *shape)
        self._array: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "level": self.level, "axes": self.axes, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _array=None, _lock=threading.Lock())

    def __dask_tokenize__(self) -> Any:
        stat = self.path.stat()
        return "hespotex-tiff", str(self.path), stat.st_size, stat.st_mtime_ns, self.level

    def __getitem__(self, key: tuple[slice, slice, slice]) -> np.ndarray:
        channels, rows, columns = key
        keys = {"Y": rows, "X": columns}
        pixels = np.asarray(self._open()[tuple(keys.get(axis, slice(0, 3)) for axis in self.axes)])
        if self.axes[-1] not in "YX":
            pixels = np.moveaxis(pixels, -1, 0)
        return np.ascontiguousarray(pixels[channels])

    def _open(self) -> Any:
        import tifffile
        import zarr

        with self._lock:
            if self._array is None:
                file = tifffile.TiffFile(self.path)
                weakref.finalize(self, file.close)
                self._array = zarr.open(file.series[0].aszarr(level=self.level), mode="r")
        return self._array


def stated_mpp(tiff: TiffFile) -> tuple[float, float] | None:
    """µm per pixel in x and y as the file states it, or None; not judged here."""
    page = tiff.pages.first
    description = page.description or ""
    if tiff.is_ome and tiff.ome_metadata:
        found = _ome(tiff.ome_metadata)
        if found is not None:
            return found
    if aperio := re.search(r"\bMPP\s*=\s*([0-9.]+)", description):
        value = float(aperio.group(1))
        return value, value
    tags = page.tags
    if "XResolution" not in tags or "YResolution" not in tags:
        return None
    if tiff.is_imagej:
        unit = str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5m", "µm")
        length = _MICRONS.get(unit)
    else:
        length = {2: 25_400.0, 3: 10_000.0}.get(int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 1)
    per_unit = [_ratio(tags[name].value) for name in ("XResolution", "YResolution")]
    if length is None or min(per_unit) <= 0:
        return None
    return length / per_unit[0], length / per_unit[1]


def _ratio(value: Any) -> float:
    numerator, denominator = value
    return numerator / denominator if denominator else 0.0


def _ome(xml: str) -> tuple[float, float] | None:
    pixels = next((node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("}Pixels")), None)
    if pixels is None or "PhysicalSizeX" not in pixels.attrib or "PhysicalSizeY" not in pixels.attrib:
        return None
    units = [_MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"]
    if None in units:
        return None
    return tuple(float(pixels.attrib[f"PhysicalSize{axis}"]) * unit for axis, unit in zip("XY", units, strict=True))  # type: ignore[return-value,operator]
