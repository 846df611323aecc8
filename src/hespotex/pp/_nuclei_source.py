"""What `method` of :func:`hespotex.pp.segment_nuclei` stands for: a way to find nuclei, or nuclei that are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._version import __version__
from ..data.geometry import Slide, pixel_maps, shape_geometries
from ..data.provenance import digest
from ..errors import DataTypeError, DataValueError, GeometryError, MissingKeyError, ScaleError
from ..image.fingerprint import fingerprint
from ..image.stream import Block
from ..segmentation._appearance import estimate_appearance, sample_tissue
from ..segmentation._tiled import BLOCK_PX, Backend
from ..segmentation.cellpose import CellposeSegmenter
from ..segmentation.existing import check_outlines
from ..segmentation.geojson import GivenOutlines, is_geojson, read_geojson
from ..segmentation.instanseg import NETWORK_MPP, LazyslideSegmenter
from ..segmentation.labels import check_labels, load_labels
from ..segmentation.watershed import Watershed

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["METHODS", "Method", "OfPixels", "Source", "resolve_source"]

WORKING_MPP = 0.5  # finer pixels cost time and find no more nuclei
MIN_DIAMETER_PX = 5.0  # fewer pixels across, and neighbours blur into one
CALLABLE_HALO_DIAMETERS = 8.0
LABELS_HALO_DIAMETERS = 8.0
LABELS_OFF_PX = 2.0  # levels of a pyramid that drop an odd row differ by one
METHODS = ("watershed", "cellpose", "instanseg")
LAZYSLIDE = "lazyslide:"
SAMPLES = 8  # along each side: where the slide is looked at for its identity

Method = (
    Literal["watershed", "cellpose", "instanseg"]
    | Callable[[np.ndarray], np.ndarray]
    | np.ndarray
    | str
    | os.PathLike[str]
)


@dataclass(frozen=True, eq=False)
class Source:
    """Where nuclei come from, and how the slide must be read for it.

    Attributes
    ----------
    name
        How it is called in records and messages.
    mpp
        Working resolution in µm per pixel.
    backend
        Finds nuclei in a block; ``None`` where outlines are given.
    outlines
        Outlines in level-0 pixels that are there already.
    halo_px, block_px
        Surroundings of a block and its side.
    one_thread
        Whether `backend` must not be called in several threads.
    keep_names
        Whether labels mean the same in all blocks.
    dtype
        Type of given labels.
    described
        All that determines the result of `backend` besides the slide; ``None`` if that is unknown.
    """

    name: str
    mpp: float
    backend: Backend | None = None
    outlines: GivenOutlines | None = None
    halo_px: int = 0
    block_px: int = 0
    one_thread: bool = False
    keep_names: bool = False
    dtype: np.dtype | None = None
    described: tuple[Any, ...] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Arguments that do the same on another slide; none for nuclei that are there and for functions."""
        return {"method": self.name} if self.name in METHODS or self.name.startswith(LAZYSLIDE) else {}

    def identity(self, slide: Slide, simplify_um: float) -> str:
        """Digest of all that determines the regions found in a run of blocks."""
        height, width = slide.shape
        y, x = np.meshgrid(*((np.arange(SAMPLES) + 0.5) / SAMPLES * size for size in (height, width)), indexing="ij")
        looks = fingerprint(slide, np.column_stack([x.ravel(), y.ravel()]))
        reading = [slide.mpp, self.mpp, self.halo_px, self.block_px, simplify_um]
        return digest([__version__, looks, *reading, repr(self.described)])


@dataclass(frozen=True)
class OfPixels:
    """A segmenter of images as one of blocks; unlike a lambda it can be sent to another process."""

    segmenter: Callable[[np.ndarray], np.ndarray]

    def __call__(self, block: Block) -> np.ndarray:
        return self.segmenter(block.pixels)


def resolve_source(
    sdata: SpatialData,
    slide: Slide,
    method: Method,
    *,
    diameter_um: float,
    mpp: float | None,
    model: str | os.PathLike[str] | None,
    device: str | None,
) -> Source:
    """Find out what `method` is, and make ready for it; parameters are those of :func:`segment_nuclei`."""
    network = isinstance(method, str) and (method in METHODS[1:] or method.startswith(LAZYSLIDE))
    if model is not None and not network:
        raise DataValueError(
            "model= names the weights of a network; use it with method='cellpose', 'instanseg' or 'lazyslide:<name>'"
        )
    given = None if network else _given(sdata, slide, method)
    if isinstance(given, GivenOutlines):
        checked = check_outlines(given, slide, repr(os.fspath(method)), stacklevel=4)  # type: ignore[arg-type]
        working = max(WORKING_MPP, slide.mpp) if mpp is None else mpp
        return Source("outlines", working, outlines=checked, block_px=BLOCK_PX)
    if given is not None:
        return _from_labels(slide, given, diameter_um, mpp)
    working = max(WORKING_MPP, slide.mpp) if mpp is None else mpp
    if isinstance(method, str) and (method == "instanseg" or method.startswith(LAZYSLIDE)):
        working = NETWORK_MPP if mpp is None else mpp
        _check_size(diameter_um, working, mpp)
        return _lazyslide(method, working, diameter_um / working, model, device)
    diameter_px = _check_size(diameter_um, working, mpp)
    if callable(method):
        return Source(
            getattr(method, "__name__", type(method).__name__),
            working,
            OfPixels(method),
            halo_px=int(np.ceil(CALLABLE_HALO_DIAMETERS * diameter_px)),
            block_px=BLOCK_PX,
            one_thread=True,
        )
    if method == "cellpose":
        cellpose = CellposeSegmenter(model, diameter_px=diameter_px, device=device)
        return Source(
            "cellpose",
            working,
            OfPixels(cellpose),
            halo_px=cellpose.halo_px,
            block_px=BLOCK_PX,
            one_thread=True,
            described=("cellpose", diameter_px, _file_state(cellpose.path)),
        )
    watershed = Watershed(diameter_px, estimate_appearance(sample_tissue(slide, working)))
    return Source(
        "watershed",
        working,
        OfPixels(watershed),
        halo_px=watershed.halo_px,
        block_px=BLOCK_PX,
        described=(watershed,),
    )


def _check_size(diameter_um: float, working: float, mpp: float | None) -> float:
    """Diameter of a nucleus in working pixels."""
    diameter_px = diameter_um / working
    if diameter_px < MIN_DIAMETER_PX:
        raise ScaleError(
            f"at {working:.3g} µm/px a nucleus of {diameter_um:g} µm has {diameter_px:.1f} px across, and "
            f"{MIN_DIAMETER_PX:g} are needed to tell neighbours apart; use the full-resolution image"
            + (" or a smaller mpp=" if mpp else "")
        )
    return diameter_px


def _lazyslide(
    method: str, working: float, diameter_px: float, model: str | os.PathLike[str] | None, device: str | None
) -> Source:
    segmenter = LazyslideSegmenter(method.removeprefix(LAZYSLIDE), model, diameter_px=diameter_px, device=device)
    weights = None if model is None else _file_state(Path(model).expanduser())
    return Source(
        "instanseg" if segmenter.name == "instanseg" else method,
        working,
        OfPixels(segmenter),
        halo_px=segmenter.halo_px,
        block_px=segmenter.block_px,
        one_thread=True,
        described=(segmenter.name, diameter_px, weights),
    )


def _file_state(path: Path | None) -> tuple[Any, ...] | None:
    """What tells a file from one that was put in its place."""
    if path is None:
        return None
    state = path.stat()
    return path.name, state.st_size, state.st_mtime_ns


def _given(sdata: SpatialData, slide: Slide, method: Method) -> Any:
    """The label image or the outlines that `method` is or names; ``None`` if it is a way to make them."""
    if isinstance(method, np.ndarray):
        return check_labels(method, "method")
    if isinstance(method, os.PathLike):
        return read_geojson(method) if is_geojson(method) else load_labels(method)
    if callable(method) or method in METHODS:
        return None
    if not isinstance(method, str):
        raise DataTypeError(
            f"method must be one of {METHODS}, a function, a label image, or the name or path of one; got "
            f"{type(method).__name__}"
        )
    if method in sdata.labels:
        return _label_image(sdata, slide, method)
    if method in sdata.shapes:
        outlines = shape_geometries(sdata, method, slide)
        return GivenOutlines(outlines.to_numpy(), _plain_ids(outlines.index))
    if is_geojson(method):
        return read_geojson(method)
    if method.endswith(".npy"):
        return load_labels(method)
    raise MissingKeyError(
        f"method={method!r} is neither one of {METHODS} or 'lazyslide:<name>', nor among the labels {list(sdata.labels)} or "
        f"the shapes {list(sdata.shapes)}, nor the path of a .npy or .geojson file"
    )


def _plain_ids(index: Any) -> np.ndarray:
    """Ids of shapes as whole numbers, or as text."""
    values = np.asarray(index)
    return values.astype(np.int64) if values.dtype.kind in "iu" else values.astype(str).astype(object)


def _label_image(sdata: SpatialData, slide: Slide, key: str) -> Any:
    """The lazy array of ``labels[key]``, which has to lie on the image."""
    from spatialdata import get_pyramid_levels
    from xarray import DataArray

    element = sdata.labels[key]
    finest = element if isinstance(element, DataArray) else next(iter(get_pyramid_levels(element)))
    labels = check_labels(finest.transpose("y", "x").data, f"labels {key!r}")
    matrix = pixel_maps(sdata, slide.key).get(("labels", key))
    if matrix is None:
        raise GeometryError(f"labels {key!r} share no coordinate system with image {slide.key!r}")
    square = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    corners = square * labels.shape[::-1] @ matrix[:2, :2].T + matrix[:2, 2]
    pixel = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    if np.abs(corners - square * slide.shape[::-1]).max() > LABELS_OFF_PX * max(pixel, 1):
        raise GeometryError(
            f"labels {key!r} do not cover image {slide.key!r}: their corners lie at {corners.round().tolist()} px of it; "
            f"rasterise them on the image first"
        )
    return labels


def _from_labels(slide: Slide, labels: Any, diameter_um: float, mpp: float | None) -> Source:
    if mpp is not None:
        raise DataValueError("mpp= chooses the resolution at which nuclei are found; labels have one already")
    shapes = [tuple(int(size) for size in level.array.shape[1:]) for level in slide.levels]
    if tuple(labels.shape) not in shapes:
        raise DataValueError(
            f"the label image has {labels.shape[1]} × {labels.shape[0]} px, image {slide.key!r} has "
            f"{slide.shape[1]} × {slide.shape[0]} (levels: {shapes}, height first); they must be equal"
        )
    level = slide.levels[shapes.index(tuple(labels.shape))]
    mpp = slide.mpp * level.downsample
    return Source(
        "labels",
        mpp,
        partial(_window, labels=labels),
        halo_px=int(np.ceil(LABELS_HALO_DIAMETERS * diameter_um / mpp)),
        block_px=BLOCK_PX,
        keep_names=True,
        dtype=np.dtype(labels.dtype),
    )


def _window(block: Block, *, labels: Any) -> np.ndarray:
    """Labels under a block, which may reach beyond them; 0 there."""
    top, left = block.y - block.halo_px, block.x - block.halo_px
    rows, columns = block.pixels.shape[:2]
    height, width = labels.shape
    y0, x0 = max(top, 0), max(left, 0)
    part = np.asarray(labels[y0 : min(top + rows, height), x0 : min(left + columns, width)])
    window = np.zeros((rows, columns), dtype=part.dtype)
    window[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return window
