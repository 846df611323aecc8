"""LazySlide's objects: the slide of a ``WSIData`` is not among its images but in the file that its reader reads.

Nothing is added to the object. The slide goes by the name ``"wsi"``, under which wsidata itself attaches it on request;
such an attached copy is passed over, since its levels do not say where they lie.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from .._keys import Keys
from ..errors import DataValueError, ScaleError
from .elements import image_element

if TYPE_CHECKING:
    from xarray import DataArray, DataTree

    from ..image.files import Picture

__all__ = ["OF_WSIDATA", "has_reader", "set_reader_mpp", "slide_of_reader", "stated_by_reader", "with_slide"]

OF_WSIDATA = "slide_properties"  # what wsidata notes of the slide in the attrs of its object

_OPENED: WeakKeyDictionary[Any, Picture] = WeakKeyDictionary()  # by reader: a slide is opened once
_SAME_FILE = {"openslide", "tiffslide"}  # readers of files whose pixels we read ourselves, several times as fast


class ReaderRegions:
    """A slide that one of wsidata's readers reads; they open it again after unpickling."""

    def __init__(self, reader: Any) -> None:
        self.path = Path(reader.file)
        self.reader = reader

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels (height, width, 3) uint8."""
        try:
            return np.asarray(self.reader.get_region(x, y, width, height, level=level))[..., :3]
        except Exception as error:  # of whatever library it is; who asked says where
            raise ValueError(str(error)) from error


def has_reader(sdata: Any) -> bool:
    """Whether this is a ``WSIData`` whose slide is a file; those made from an image of a SpatialData hold that."""
    wsidata = sys.modules.get("wsidata")  # not loaded: then it cannot be one
    return wsidata is not None and isinstance(sdata, wsidata.WSIData) and sdata.reader.name != "spatialdata"


def slide_of_reader(sdata: Any) -> DataArray | DataTree:
    """The slide as an element of lazy levels, in pixels (``"global"``) and, where its mpp is known, in ``"microns"``.

    Raises
    ------
    DataValueError, ImageFormatError
        If its file is gone or damaged.
    ScaleError
        If the file states different scales of x and y, and the user none.
    """
    picture = _open(sdata)
    return image_element(picture.levels, _mpp(sdata, picture))


def with_slide(sdata: Any) -> Any:
    """All of a ``WSIData`` as a SpatialData that holds the slide itself, to be written; other objects as they are."""
    from spatialdata import SpatialData

    if not has_reader(sdata):
        return sdata
    elements = {name: element for _, name, element in sdata.gen_elements()}
    attrs = {name: value for name, value in sdata.attrs.items() if name != OF_WSIDATA}
    return SpatialData.init_from_elements({**elements, Keys.WSI: slide_of_reader(sdata)}, attrs=attrs)


def stated_by_reader(sdata: Any, shape: tuple[int, int]) -> float | None:
    """µm per pixel of an image in a ``WSIData``, if it has the shape of the slide."""
    wsidata = sys.modules.get("wsidata")
    if wsidata is None or not isinstance(sdata, wsidata.WSIData) or tuple(sdata.properties.shape) != shape:
        return None
    return sdata.properties.mpp


def set_reader_mpp(sdata: Any, mpp: float) -> None:
    """Set the scale of the slide where wsidata keeps it."""
    sdata.set_mpp(mpp)


def _open(sdata: Any) -> Picture:
    reader = sdata.reader
    picture = _OPENED.get(reader)
    if picture is None:
        picture = _OPENED[reader] = _picture(sdata)
    return picture


def _picture(sdata: Any) -> Picture:
    from ..image.files import Picture, open_picture, region_levels

    reader, properties = sdata.reader, sdata.properties
    if not Path(reader.file).exists():
        raise DataValueError(f"the slide of this WSIData is gone: there is no file {reader.file!r}; open it again")
    sizes = [(int(height), int(width)) for height, width in properties.level_shape]
    if reader.name in _SAME_FILE and properties.scene == 0 and properties.n_scenes == 1:
        picture = open_picture(reader.file)
        if picture.size == sizes[0][::-1]:
            return picture
    levels = region_levels(ReaderRegions(reader), sizes, [float(step) for step in properties.level_downsample])
    return Picture(levels, None, Path(reader.file).name, properties.magnification)


def _mpp(sdata: Any, picture: Picture) -> float | None:
    """What the user set, else one number for both axes of what the file states."""
    mpp = sdata.properties.mpp
    if picture.stated is None or (mpp is not None and not np.isclose(picture.stated, mpp, rtol=1e-3).any()):
        if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
            raise ScaleError(
                f"the slide of this WSIData has {mpp!r} µm/px; correct it with hx.pp.set_scale(wsi, mpp=...)"
            )
        return mpp
    return picture.mpp
