"""AnnData objects with spots in pixels, as scanpy and squidpy keep them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..errors import (
    AmbiguousKeyError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexWarning,
    MissingKeyError,
    ScaleError,
)
from ._assemble import build_section
from ._image import Picture, check_positive, open_picture
from ._names import Duplicates, check_duplicates, shorten, unique_anndata
from ._parsing import finite_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["from_anndata", "section_from_anndata"]

_VISIUM_PITCH_UM = 100.0
# Space Ranger reports 65 or 55 µm as the diameter of a spot, so the pitch is 1.54 or 1.82 of it
_VISIUM_RATIOS = (100 / 65, 100 / 55)
_RATIO_TOLERANCE = 0.04
_COARSE_MPP = 3.5
_SCALES = {"hires": "tissue_hires_scalef", "lowres": "tissue_lowres_scalef"}


def from_anndata(
    adata: AnnData,
    image: str | Path | np.ndarray,
    *,
    mpp: float | None = None,
    spot_diameter_um: float | None = None,
    pitch_um: float | None = None,
    library_id: str | None = None,
    name: str | None = None,
    patient: str | None = None,
    in_tissue_only: bool = True,
    duplicates: Duplicates = "error",
) -> SpatialData:
    """Turn a Visium-style AnnData and its full-resolution H&E into a SpatialData.

    Parameters
    ----------
    adata
        Spots x genes with ``obsm["spatial"]`` (x, y in pixels of `image`) and, as a rule,
        ``uns["spatial"][library_id]["scalefactors"]``. Not changed; ``X`` is taken as it is, raw or not.
    image
        The full-resolution H&E: a TIFF, JPEG or PNG file, or an array (height, width, 3) uint8.
    mpp
        µm per pixel of `image`. By default, in this order: from `pitch_um`; what the file states; from the Visium
        lattice, where the spots' distance and ``spot_diameter_fullres`` show that it is one.
    spot_diameter_um
        Diameter of a spot; by default ``spot_diameter_fullres`` pixels.
    pitch_um
        Distance of neighbouring spots, centre to centre (100 for Visium): the scale is derived from it.
    library_id
        Key in ``uns["spatial"]``, where there are several.
    name
        Name of the section; `library_id` by default.
    patient
        Patient, kept beside the name.
    in_tissue_only
        Leave out spots with ``obs["in_tissue"]`` = 0; without effect where the column is absent.
    duplicates
        ``"first"`` keeps the first of genes named twice; ``"error"`` refuses them.

    Returns
    -------
    SpatialData
        As of :func:`hespotex.io.read_st`; ``obs``, ``var``, ``layers``, ``obsm`` and ``uns`` of `adata` come along.
        With a preview, ``obsm["spatial"]`` and the scalefactors in ``uns["spatial"]`` are those of the preview.

    Warns
    -----
    HespotexWarning
        If `image` is a preview: its spots lie on it only after scaling by the ``tissue_hires_scalef`` (or ``lowres``)
        of the object, or its pixels are coarser than 3.5 µm.

    Raises
    ------
    MissingKeyError
        If ``obsm["spatial"]`` is not there, or `library_id` is none of ``uns["spatial"]``.
    AmbiguousKeyError
        If there are several libraries and `library_id` is not given.
    ScaleError
        If the µm per pixel are unknown.
    GeometryError
        If spots lie outside the image.
    DataValueError
        If names repeat, SpatialData does not take a name, ``in_tissue`` holds no number, or no spot is left.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.from_anndata(adata, "tissue_full_image.tif")  # doctest: +SKIP
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise DataTypeError(f"adata must be an AnnData, not {type(adata).__name__}")
    library, scales = _library(adata, library_id)
    return section_from_anndata(
        adata,
        open_picture(image),
        library=library,
        scales=scales,
        mpp=mpp,
        spot_diameter_um=spot_diameter_um,
        pitch_um=pitch_um,
        attrs={"name": name or library or "section", "patient": patient},
        in_tissue_only=in_tissue_only,
        duplicates=duplicates,
    )


def section_from_anndata(
    adata: AnnData,
    picture: Picture,
    *,
    library: str | None,
    scales: Mapping[str, float],
    mpp: float | None,
    spot_diameter_um: float | None,
    pitch_um: float | None,
    attrs: Mapping[str, Any],
    in_tissue_only: bool,
    duplicates: Duplicates,
) -> SpatialData:
    """Common part of the readers of AnnData; `scales` are the scalefactors of its `library`."""
    check_duplicates(duplicates)
    if Keys.SPATIAL not in adata.obsm:
        raise MissingKeyError(
            f"adata.obsm has no 'spatial' (x, y in pixels of the image); it has {list(adata.obsm) or 'nothing'}"
        )
    if in_tissue_only and Keys.IN_TISSUE in adata.obs:
        in_tissue = finite_columns(adata.obs[[Keys.IN_TISSUE]], [Keys.IN_TISSUE], "adata.obs")[Keys.IN_TISSUE]
        adata = adata[(in_tissue == 1).to_numpy()]
    if adata.n_obs == 0:
        raise DataValueError("adata has no spot (in tissue)")
    adata = unique_anndata(adata, duplicates, "adata").copy()
    xy = np.asarray(adata.obsm[Keys.SPATIAL], dtype=np.float64)[:, :2]
    if xy.shape[1] != 2:
        raise GeometryError(f"adata.obsm['spatial'] has shape {xy.shape}; (spots, 2) is needed")
    if not np.isfinite(xy).all():
        lost = adata.obs_names[~np.isfinite(xy).all(axis=1)]
        raise GeometryError(f"adata.obsm['spatial'] holds no position for {shorten(lost, 3)}; leave these spots out")

    shrink = _preview(xy, picture, scales)
    xy = xy * shrink
    if shrink != 1:
        _scale_factors(adata.uns[Keys.SPATIAL][library]["scalefactors"], shrink)
    diameter_px = scales.get("spot_diameter_fullres", np.nan) * shrink
    mpp = _mpp(mpp, pitch_um, picture, xy, diameter_px)
    if mpp > _COARSE_MPP:
        warnings.warn(
            f"{picture.origin} has {mpp:.3g} µm per pixel: a preview? Nuclei cannot be seen; pass the full-resolution "
            "image",
            HespotexWarning,
            stacklevel=3,
        )
    if spot_diameter_um is not None:
        diameter_px = check_positive("spot_diameter_um", spot_diameter_um) / mpp
    if not diameter_px > 0:
        raise ScaleError(
            "spot_diameter_um: adata does not state spot_diameter_fullres; pass spot_diameter_um= (55 for Visium)"
        )
    sdata = build_section(
        picture.levels,
        adata,
        xy,
        mpp=mpp,
        radius_px=diameter_px / 2,
        attrs=attrs,
        advice="Pass the full-resolution image that obsm['spatial'] refers to.",
    )
    logger.info("%s: %d spots, %d genes, %.4g µm/px", attrs["name"], adata.n_obs, adata.n_vars, mpp)
    return sdata


def _library(adata: AnnData, library_id: str | None) -> tuple[str | None, dict[str, float]]:
    """Name and scalefactors of the library that is meant."""
    libraries = adata.uns.get(Keys.SPATIAL, {})
    if not isinstance(libraries, Mapping):
        libraries = {}
    if library_id is not None and library_id not in libraries:
        raise MissingKeyError(f"library_id={library_id!r} is not in adata.uns['spatial']: {list(libraries)}")
    if library_id is None and len(libraries) > 1:
        raise AmbiguousKeyError(
            f"adata.uns['spatial'] holds {list(libraries)}; choose one with library_id=, after subsetting adata to it"
        )
    if not libraries:
        return None, {}
    library = library_id or next(iter(libraries))
    factors = libraries[library].get("scalefactors", {})
    return library, {key: float(value) for key, value in factors.items() if np.ndim(value) == 0}


def _scale_factors(factors: dict[str, Any], shrink: float) -> None:
    """Let scalefactors refer to the preview as they did to the full-resolution image, of which one pixel is `shrink`."""
    for key, value in factors.items():
        if key.endswith("_fullres"):  # lengths in pixels
            factors[key] = float(value) * shrink
        elif key.endswith("_scalef"):  # pixels of a smaller image per pixel
            factors[key] = float(value) / shrink


def _preview(xy: np.ndarray, picture: Picture, scales: Mapping[str, float]) -> float:
    """Pixels of the picture per pixel of the spots' frame: 1, or the scale of a preview that fits."""
    width, height = picture.size
    reach = xy.max(axis=0)
    if not (reach >= [width, height]).any():
        return 1.0
    for kind, key in _SCALES.items():
        factor = scales.get(key, np.nan)
        # a preview is the whole slide: its longer side has 2,000 or 600 px
        if (reach * factor < [width, height]).all() and max(width, height) in (600, 2000):
            warnings.warn(
                f"{picture.origin} is the {kind} preview: the spots reach ({reach[0]:.0f}, {reach[1]:.0f}) px, the "
                f"image {width} x {height}. They are scaled by {key}; pass the full-resolution image instead",
                HespotexWarning,
                stacklevel=4,
            )
            return factor
    return 1.0


def _mpp(mpp: float | None, pitch_um: float | None, picture: Picture, xy: np.ndarray, diameter_px: float) -> float:
    if mpp is not None:
        return check_positive("mpp", mpp)
    if pitch_um is not None:
        return check_positive("pitch_um", pitch_um) / _spacing(xy)
    if picture.mpp is not None:
        return picture.mpp
    if len(xy) > 1 and diameter_px > 0:
        spacing = _spacing(xy)
        if any(abs(spacing / diameter_px / ratio - 1) < _RATIO_TOLERANCE for ratio in _VISIUM_RATIOS):
            return _VISIUM_PITCH_UM / spacing
    raise ScaleError(
        f"mpp: {picture.origin} does not state its µm per pixel, and the spots are no Visium lattice; "
        "pass mpp=, or pitch_um= (distance of neighbouring spots, 100 for Visium)"
    )


def _spacing(xy: np.ndarray) -> float:
    """Median distance to the nearest spot in pixels."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        raise ScaleError("pitch_um: one spot has no neighbour to derive the scale from; pass mpp=")
    distance, _ = cKDTree(xy).query(xy, k=2)
    spacing = float(np.median(distance[:, 1]))
    if not spacing > 0:
        raise GeometryError("adata.obsm['spatial'] puts spots on each other")
    return spacing
