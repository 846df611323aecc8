"""The pixel size and the objective that a TIFF states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from tifffile import TiffFile

__all__ = ["number", "objective_of", "sane_mpp", "stated_mpp"]

_MICRONS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3}
_SANE_MPP = (0.05, 20.0)  # a 72 dpi tag says 353 µm/px


def sane_mpp(mpp: tuple[float, float] | None) -> tuple[float, float] | None:
    """`mpp` where it can be that of a microscope."""
    if mpp is None or not all(_SANE_MPP[0] <= value <= _SANE_MPP[1] for value in mpp):
        return None
    return mpp


def stated_mpp(tiff: TiffFile, series: int) -> tuple[float, float] | None:
    """µm per pixel in x and y as the file states it of the image `series`, or None; not judged here."""
    page = tiff.series[series].keyframe
    found = _ome_mpp(tiff, series)
    if found is not None:
        return found
    aperio = _aperio(page.description, "MPP")
    if aperio is not None:
        return aperio, aperio
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


def objective_of(tiff: TiffFile, series: int) -> float | None:
    """Magnification of the objective, as Aperio's description or OME metadata give it."""
    found = _aperio(tiff.series[series].keyframe.description, "AppMag")
    if found is None:
        found = number(_attributes(_ome(tiff), "Objective").get("NominalMagnification"))
    return found


def number(text: Any) -> float | None:
    """`text` as a positive number, if it is one."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _aperio(description: str, name: str) -> float | None:
    found = re.search(rf"\b{name}\s*=\s*([0-9.]+)", description or "")
    return number(found.group(1)) if found else None


def _ratio(value: Any) -> float:
    numerator, denominator = value
    return numerator / denominator if denominator else 0.0


def _ome_mpp(tiff: TiffFile, series: int) -> tuple[float, float] | None:
    images = [node for node in _ome(tiff) if node.tag.endswith("}Image")]
    if len(images) == len(tiff.series):
        images = images[series:]
    elif len(images) > 1:  # those without pixels are no series
        images = [image for image in images if image.get("Name") == tiff.series[series].name]
    if not images:
        return None
    pixels = _attributes(images[0], "Pixels")
    sizes = [number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    units = [_MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"]
    if None in sizes or None in units:
        return None
    x, y = (size * unit for size, unit in zip(sizes, units, strict=True))  # type: ignore[operator]
    return x, y


def _ome(tiff: TiffFile) -> ElementTree.Element:
    """The file's OME metadata; an empty element if there are none."""
    try:
        return ElementTree.fromstring(tiff.ome_metadata if tiff.is_ome and tiff.ome_metadata else "<none/>")
    except ElementTree.ParseError:
        return ElementTree.Element("none")


def _attributes(root: ElementTree.Element, tag: str) -> Mapping[str, str]:
    """Attributes of the first element `tag` in `root`."""
    return next((node.attrib for node in root.iter() if node.tag.endswith(f"}}{tag}")), {})
