"""Output folders of Space Ranger for Visium HD."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.elements import image_element, transformations
from ..errors import DataValueError
from ._assemble import check_inside
from ._image import check_positive, open_picture, resolve_mpp
from ._tenx import annotate, folder, foreign, json_of, one_of, other_features, required, tidy_genes

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_visium_hd"]

_INSTANCE: Final = "location_id"  # of spatialdata-io
_IMAGES: Final = (".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png", ".svs", ".ndpi")


def read_visium_hd(
    path: str | Path,
    bin_size: int = 8,
    *,
    image: str | Path | None = None,
    bins_as_squares: bool = True,
    name: str | None = None,
    patient: str | None = None,
) -> SpatialData:
    """Read a Visium HD section: its bins and the microscope image that they were registered to.

    Bins and counts are read by ``spatialdata_io.visium_hd``, the image as by :func:`read_wsi`: lazily, of any supported
    format, BigTIFF (``.btf``) included.

    Parameters
    ----------
    path
        The folder ``outs`` of Space Ranger (3.0 or later), with ``feature_slice.h5`` and ``binned_outputs``; names with the
        prefix of a data set, as 10x offers for download, will do.
    bin_size
        Side of a bin in µm: 8 or 16, or another that the folder holds.
    image
        The microscope image, the one that was given to Space Ranger. By default the only file in ``microscope_image``, or
        the only ``*tissue_image.*`` in `path`.
    bins_as_squares
        Whether bins are squares, of about 2 kB each in memory, or the circles within, which take a tenth of it.
    name
        Name of the section; that of the folder by default (that above, if it is called ``outs``).
    patient
        Patient, kept beside the name.

    Returns
    -------
    SpatialData
        ``images["image"]``
            Lazy (3, h, w) uint8, in ``"global"`` (its pixels) and ``"microns"``.
        ``shapes["bins"]``
            The bins under tissue, in pixels of the image.
        ``tables["table"]``
            Raw counts (CSR) of genes, with ``obsm["spatial"]`` (pixels) and ``obs["array_row"]``, ``["array_col"]``; symbols
            that stand for several genes are numbered. Features that are no genes are left out; their number is in
            ``attrs["hespotex"]["left_out"]``.

    Raises
    ------
    DataValueError
        If a file is missing (its name and what 10x calls it are given) or damaged, there is no such bin size, or the image
        is not to be found.
    CountsError
        If the matrix does not hold counts.
    GeometryError
        If bins lie outside the image: it is not the one that they were registered to.

    Warns
    -----
    HespotexWarning
        If the image states another scale than Space Ranger.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.read_visium_hd("sample/outs", 16, image="sample.btf")  # doctest: +SKIP
    """
    from spatialdata import SpatialData
    from spatialdata.transformations import set_transformation
    from spatialdata_io import visium_hd

    path = folder(path, "Space Ranger")
    dataset = _dataset(path)
    bins = _bins(path, bin_size)
    left_out = other_features(required(bins / "filtered_feature_bc_matrix.h5", "filtered feature-barcode matrix"))
    required(bins / "spatial" / "tissue_positions.parquet", "tissue positions")
    scales = json_of(required(bins / "spatial" / "scalefactors_json.json", "scale factors"))
    if "microns_per_pixel" not in scales:
        raise DataValueError("path: 'scalefactors_json.json' does not state 'microns_per_pixel'; is it of Visium HD?")
    mpp = check_positive("microns_per_pixel", scales["microns_per_pixel"])
    picture = open_picture(_image(path) if image is None else image)
    with foreign(
        "spatialdata_io.visium_hd",
        "File .* does not exist, skipping it",
        "No image path found",
        "No full resolution image",
    ):
        read = visium_hd(
            path,
            dataset_id=dataset or None,
            load_segmentations_only=False,
            bin_size=bin_size,
            bins_as_squares=bins_as_squares,
            fullres_image_file=path / "read-by-hespotex",  # it would be read as a whole
            var_names_make_unique=False,
            gex_only=True,
        )
    adata = tidy_genes(read.tables[bins.name])
    shapes = read.shapes[f"{dataset}_{bins.name}"]
    if adata.n_obs == 0:
        raise DataValueError("path: 'filtered_feature_bc_matrix.h5' holds no bin under tissue")
    adata.obsm[Keys.SPATIAL] = np.asarray(adata.obsm[Keys.SPATIAL], dtype=np.float64)
    width, height = picture.size
    advice = "Pass the image that was given to Space Ranger with image=."
    check_inside(adata.obsm[Keys.SPATIAL], adata.obs_names, width, height, advice)
    mpp = resolve_mpp(mpp, picture)
    set_transformation(shapes, transformations(mpp), set_all=True)
    name = name or dataset or (path.resolve().parent.name if path.resolve().name == "outs" else path.resolve().name)
    attrs = {"name": name, "patient": patient, "bin_size_um": bin_size, "left_out": left_out}
    logger.info("%s: %d bins of %d µm, %d genes, %.4g µm/px", name, adata.n_obs, bin_size, adata.n_vars, mpp)
    return SpatialData(
        images={Keys.IMAGE: image_element(picture.levels, mpp)},
        shapes={Keys.BINS: shapes},
        tables={Keys.TABLE: annotate(adata, Keys.BINS, _INSTANCE)},
        attrs={Keys.NAMESPACE: attrs},
    )


def _dataset(path: Path) -> str:
    """Prefix of the files of a data set as 10x offers it; empty in a folder of Space Ranger."""
    if (path / "feature_slice.h5").is_file():
        return ""
    found = sorted(path.glob("*_feature_slice.h5"))
    if len(found) > 1:
        raise DataValueError(
            f"path: the folder holds several data sets: {[file.name for file in found]}; give each its own"
        )
    if not found:
        required(path / "feature_slice.h5", "feature slice")
    return found[0].name.removesuffix("_feature_slice.h5")


def _bins(path: Path, bin_size: int) -> Path:
    """Folder of the bins of a size."""
    parent = next(
        (place for place in (path / "binned_outputs", path) if any(place.glob("square_*um"))), path / "binned_outputs"
    )
    there = sorted(found.name for found in parent.glob("square_*um") if found.is_dir())
    if not there:
        raise DataValueError(
            f"path: there is no 'binned_outputs' with folders such as 'square_008um' in {str(path)!r} (10x calls them the "
            f"binned outputs)"
        )
    wanted = f"square_{bin_size:03d}um" if isinstance(bin_size, int) else str(bin_size)
    if wanted not in there:
        sizes = [int(found.removeprefix("square_").removesuffix("um")) for found in there]
        raise DataValueError(f"bin_size={bin_size!r} is not among those of the folder: {sizes}")
    return parent / wanted


def _image(path: Path) -> Path:
    found = [file for file in path.glob("microscope_image/*") if file.suffix.lower() in _IMAGES]
    found = found or [file for file in path.glob("*tissue_image.*") if file.suffix.lower() in _IMAGES]
    return one_of(found, "image", "microscope image")
