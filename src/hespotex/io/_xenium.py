"""Output folders of Xenium, with the H&E image that was taken afterwards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.elements import image_element
from ..data.geometry import on_image, resolve_slide
from ..errors import DataValueError, GeometryError, HespotexWarning, ScaleError
from ._image import Picture, check_positive, open_picture
from ._tenx import annotate, folder, foreign, json_of, one_of, other_features, required, tidy_genes

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["read_xenium"]

_FILES: Final = {
    "cells.zarr.zip": "cell segmentation masks and boundaries",
    "cells.parquet": "cell summary",
    "cell_boundaries.parquet": "cell segmentation boundaries",
    "nucleus_boundaries.parquet": "nucleus segmentation boundaries",
}
_HE: Final = "he_image.ome.tif"
_INSTANCE: Final = "cell_id"
_SCALE_TOLERANCE: Final = 0.05  # sections shrink and stretch between the two scans


def read_xenium(
    path: str | Path,
    image: str | Path | None = None,
    *,
    alignment: str | Path | None = None,
    transcripts: bool = False,
    name: str | None = None,
    patient: str | None = None,
) -> SpatialData:
    """Read a Xenium section: its cells and the H&E image of the same tissue.

    Cells, boundaries and counts are read by ``spatialdata_io.xenium``, the image as by :func:`read_wsi`: lazily, of any
    supported format. The fluorescence images are not read, nor the masks, of which the boundaries are outlines.

    Parameters
    ----------
    path
        Output folder of the instrument or of Xenium Ranger, with ``experiment.xenium``.
    image
        The H&E image. By default the only ``*he_image.ome.tif`` of the folder.
    alignment
        The matrix that Xenium Explorer exports (CSV, 3 x 3): from pixels of `image` to pixels of the morphology image. By
        default the file beside `image` that is named like it and ends in ``alignment.csv``; without any, `image` must have
        the morphology image's pixels.
    transcripts
        Whether to add ``points["transcripts"]``, lazily.
    name
        Name of the section; the ``region_name`` of the experiment by default.
    patient
        Patient, kept beside the name.

    Returns
    -------
    SpatialData
        ``images["image"]``
            The H&E, lazy (3, h, w) uint8, in ``"global"`` (its pixels) and ``"microns"`` (Xenium's own µm).
        ``shapes["cell_boundaries"]``, ``shapes["nucleus_boundaries"]``
            Outlines in µm, in the same two coordinate systems.
        ``tables["table"]``
            Raw counts (CSR) of genes, one row per cell, with ``obsm["spatial"]`` (pixels of the image) and 10x's columns of
            ``obs``. Control probes and codewords are left out; their number is in ``attrs["hespotex"]["left_out"]``.

    Raises
    ------
    DataValueError
        If a file is missing (its name and what 10x calls it are given) or damaged, or the image is not to be found.
    ScaleError
        If there is no alignment and the image states another pixel size than Xenium's, or the alignment stretches the image
        by more than 3 %.
    GeometryError
        If the alignment is no affine map, or no cell lies on the image.
    CountsError
        If the matrix does not hold counts.

    Warns
    -----
    HespotexWarning
        If cells lie beyond the image or have no outline: they are left out. If no alignment is given and the image does not
        state its scale, or the alignment's differs from what it states by more than 5 %.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.read_xenium("outs", "he.ome.tif", alignment="he_imagealignment.csv")  # doctest: +SKIP
    """
    from spatialdata import SpatialData
    from spatialdata.transformations import Affine, Identity, set_transformation
    from spatialdata_io import xenium

    path = folder(path, "Xenium")
    specs = json_of(required(path / "experiment.xenium", "experiment manifest"))
    if "pixel_size" not in specs:
        raise DataValueError("path: 'experiment.xenium' does not state 'pixel_size'")
    pixel_um = check_positive("pixel_size", specs["pixel_size"])
    left_out = other_features(required(path / "cell_feature_matrix.h5", "cell-feature matrix"))
    for file, what in _FILES.items():
        required(path / file, what)
    if transcripts:
        required(path / "transcripts.parquet", "transcript data")
    image = Path(one_of(sorted(path.glob(f"*{_HE}")), "image", f"H&E image (*{_HE})") if image is None else image)
    picture = open_picture(image)
    to_microns = np.diag([pixel_um, pixel_um, 1.0]) @ _alignment(image, alignment, picture, pixel_um)
    _check_scale(picture, to_microns)

    with foreign("spatialdata_io.xenium", "The table is annotating 'cell_labels'"):
        read = xenium(
            path,
            cells_labels=False,
            nucleus_labels=False,
            transcripts=transcripts,
            morphology_mip=False,
            morphology_focus=False,
            aligned_images=False,
        )
    to_pixels = np.linalg.inv(to_microns)
    adata = tidy_genes(read.tables["table"])
    positions = np.asarray(adata.obsm[Keys.SPATIAL], dtype=np.float64) @ to_pixels[:2, :2].T + to_pixels[:2, 2]
    outlines = read.shapes[Keys.CELLS]
    kept = _kept(positions, adata.obs[_INSTANCE].isin(outlines.index).to_numpy(), picture)
    adata = adata[kept].copy()
    adata.obsm[Keys.SPATIAL] = positions[kept]
    shapes = {Keys.CELLS: outlines.loc[adata.obs[_INSTANCE]]}
    if Keys.XENIUM_NUCLEI in read.shapes:  # early builds of 2.0 mix up the nuclei of a cell, and are not read
        shapes[Keys.XENIUM_NUCLEI] = _on_image(read.shapes[Keys.XENIUM_NUCLEI], to_pixels, picture)

    element = image_element(picture.levels, None)
    in_microns = {"global": Affine(to_pixels, ("x", "y"), ("x", "y")), Keys.MICRONS: Identity()}
    set_transformation(
        element, {"global": Identity(), Keys.MICRONS: Affine(to_microns, ("x", "y"), ("x", "y"))}, set_all=True
    )
    points = {"transcripts": read.points["transcripts"]} if transcripts else {}
    for part in (*shapes.values(), *points.values()):
        set_transformation(part, in_microns, set_all=True)
    name = name or str(specs.get("region_name") or path.resolve().name)
    sdata = SpatialData(
        images={Keys.IMAGE: element},
        shapes=shapes,
        points=points,
        tables={Keys.TABLE: annotate(adata, Keys.CELLS, _INSTANCE)},
        attrs={Keys.NAMESPACE: {"name": name, "patient": patient, "left_out": left_out}},
    )
    mpp = resolve_slide(sdata).mpp
    logger.info("%s: %d cells, %d genes, H&E of %.4g µm/px", name, adata.n_obs, adata.n_vars, mpp)
    return sdata


def _alignment(image: Path, alignment: str | Path | None, picture: Picture, pixel_um: float) -> np.ndarray:
    """Affine map (3, 3) of the image's pixels to those of the morphology image."""
    beside = image.with_name(f"{image.name.removesuffix('.ome.tif')}alignment.csv")
    if alignment is None and beside.is_file():
        alignment = beside
    if alignment is None:
        advice = "pass alignment= with the CSV that Xenium Explorer exported (10x calls it the image alignment file)"
        if picture.mpp is None:
            warnings.warn(
                f"there is no alignment of {picture.origin}, which does not state its scale: it is taken to have the pixels of "
                f"the morphology image, {pixel_um:g} µm; else {advice}",
                HespotexWarning,
                stacklevel=3,
            )
        elif abs(picture.mpp / pixel_um - 1) > _SCALE_TOLERANCE:
            raise ScaleError(
                f"image: {picture.origin} has {picture.mpp:.4g} µm/px, Xenium's morphology image {pixel_um:g}; {advice}"
            )
        return np.eye(3)
    path = Path(alignment)
    if not path.is_file():
        raise DataValueError(f"alignment: there is no file {str(path)!r}")
    try:
        matrix = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        raise DataValueError(f"alignment: {path.name!r} is no table of numbers ({error})") from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise GeometryError(
            f"alignment: {path.name!r} holds {matrix.shape[0]} x {matrix.shape[1]} numbers; 3 x 3 are needed"
        )
    if np.abs(matrix[2] - [0, 0, 1]).max() > 1e-6 or abs(np.linalg.det(matrix)) < 1e-9:
        raise GeometryError(f"alignment: {path.name!r} is no affine map that can be inverted: {matrix.tolist()}")
    return matrix


def _check_scale(picture: Picture, to_microns: np.ndarray) -> None:
    scale = float(np.sqrt(abs(np.linalg.det(to_microns[:2, :2]))))
    if picture.stated is not None and abs(picture.stated[0] / scale - 1) > _SCALE_TOLERANCE:
        warnings.warn(
            f"the alignment gives {picture.origin} {scale:.4g} µm/px, but the file states {picture.stated[0]:.4g}; the "
            f"alignment is used. Is it that of another image?",
            HespotexWarning,
            stacklevel=3,
        )


def _kept(positions: np.ndarray, outlined: np.ndarray, picture: Picture) -> np.ndarray:
    """Which cells lie on the image and have an outline, (n,) bool."""
    width, height = picture.size
    inside = on_image(positions, (height, width))
    if not inside.any():
        raise GeometryError(
            f"none of {len(positions)} cells lies on {picture.origin} of {width} x {height} px; the alignment is that of "
            f"another image, or missing"
        )
    for mask, what in (
        (inside, f"lie beyond {picture.origin}"),
        (outlined, "have no outline in 'cell_boundaries.parquet'"),
    ):
        if not mask.all():
            warnings.warn(
                f"{int((~mask).sum())} of {len(mask)} cells {what} and are left out", HespotexWarning, stacklevel=3
            )
    return inside & outlined


def _on_image(outlines: GeoDataFrame, to_pixels: np.ndarray, picture: Picture) -> Any:
    """Outlines (µm) whose centre lies on the image."""
    centres = outlines.geometry.centroid
    pixels = np.column_stack([centres.x, centres.y]) @ to_pixels[:2, :2].T + to_pixels[:2, 2]
    width, height = picture.size
    return outlines[on_image(pixels, (height, width))]
