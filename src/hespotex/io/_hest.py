"""Folders laid out as HEST-1k and HESpotEx lay theirs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from ..errors import AmbiguousKeyError, DataValueError, GeometryError, ScaleError
from ._anndata import _library, section_from_anndata
from ._assemble import transformations
from ._image import open_picture
from ._names import Duplicates
from ._parsing import parsing

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_hest"]

_IMAGES = (".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png")
_MPP_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded")


def read_hest(
    path: str | Path,
    sample: str | None = None,
    *,
    image: str | Path | None = None,
    labels: str | Path | None = None,
    mpp: float | None = None,
    spot_diameter_um: float | None = None,
    pitch_um: float | None = None,
    library_id: str | None = None,
    patient: str | None = None,
    in_tissue_only: bool = True,
    duplicates: Duplicates = "error",
) -> SpatialData:
    """Read a sample laid out as HESpotEx or HEST-1k: ``<id>.h5ad``, ``<id>.tif`` and, where there, ``<id>.npy``.

    Parameters
    ----------
    path
        The folder (flat, or with HEST's ``st/``, ``wsis/`` and ``metadata/``), or the ``.h5ad`` file itself.
    sample
        The id; may be left out where the folder holds one sample.
    image
        The H&E, where it does not lie beside the table under the same stem.
    labels
        Label image of nuclei (``.npy``, integers, the size of the H&E; 0 is background), likewise. It is mapped,
        not loaded.
    mpp
        µm per pixel. By default HEST's metadata (``<id>.json``), then as in :func:`from_anndata`.
    spot_diameter_um, pitch_um, library_id, in_tissue_only, duplicates
        As in :func:`from_anndata`.
    patient
        Patient, kept beside the name; by default the one that HEST's metadata names.

    Returns
    -------
    SpatialData
        As of :func:`hespotex.io.read_st`, with ``labels["nuclei_labels"]`` where there is a label image.

    Raises
    ------
    DataValueError
        If a file is not there or damaged, or the label image does not hold integers.
    AmbiguousKeyError
        If the folder holds several samples and none is named.
    GeometryError
        If the label image is not of the size of the H&E.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.read_hest("hest_data", "TENX95")  # doctest: +SKIP
    """
    import anndata as ad

    table = _table(Path(path), sample)
    stem = table.stem
    roots = _roots(table)
    metadata = _metadata(_beside(roots, stem, (".json",), "metadata"))
    image = Path(image) if image is not None else _beside(roots, stem, _IMAGES, "wsis")
    if image is None:
        raise DataValueError(f"image: no {stem}{{{','.join(_IMAGES)}}} beside {str(table)!r}; pass image=")
    labels = Path(labels) if labels is not None else _beside(roots, stem, (".npy",), "labels")

    picture = open_picture(image)
    nuclei = None if labels is None else _open_labels(labels, picture.size)
    with parsing("path", table, "an AnnData"):
        adata = ad.read_h5ad(table)
    library, scales = _library(adata, library_id)
    sdata = section_from_anndata(
        adata,
        picture,
        library=library,
        scales=scales,
        mpp=metadata.get("mpp") if mpp is None and pitch_um is None else mpp,
        spot_diameter_um=spot_diameter_um,
        pitch_um=pitch_um,
        attrs={"name": stem, "patient": patient if patient is not None else metadata.get("patient")},
        in_tissue_only=in_tissue_only,
        duplicates=duplicates,
    )
    if nuclei is not None:
        sdata.labels[Keys.NUCLEI_LABELS] = _label_element(nuclei, _mpp_of(sdata))
    return sdata


def _table(path: Path, sample: str | None) -> Path:
    if path.suffix == ".h5ad":
        if not path.is_file():
            raise DataValueError(f"path: there is no file {str(path)!r}")
        return path
    found = {file.stem: file for folder in (path, path / "st") for file in sorted(folder.glob("*.h5ad"))}
    if sample is not None:
        if sample not in found:
            raise DataValueError(f"sample={sample!r}: {str(path)!r} holds {', '.join(found) or 'no .h5ad file'}")
        return found[sample]
    if not found:
        raise DataValueError(f"path: {str(path)!r} holds no .h5ad file")
    if len(found) > 1:
        raise AmbiguousKeyError(f"path: {str(path)!r} holds {', '.join(found)}; choose one with sample=")
    return next(iter(found.values()))


def _roots(table: Path) -> list[Path]:
    """The folder of the table, and above it where the table lies in HEST's ``st/``."""
    return [table.parent, table.parent.parent] if table.parent.name == "st" else [table.parent]


def _beside(roots: list[Path], stem: str, suffixes: tuple[str, ...], subfolder: str) -> Path | None:
    for root in roots:
        for folder in (root, root / subfolder):
            for suffix in suffixes:
                if (file := folder / f"{stem}{suffix}").is_file():
                    return file
    return None


def _metadata(path: Path | None) -> dict[str, Any]:
    """Resolution and patient that HEST's metadata states."""
    if path is None:
        return {}
    with parsing("metadata", path, "JSON"):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise DataValueError(f"metadata: {path.name!r} holds {type(content).__name__}, not names and values")
    found: dict[str, Any] = {}
    for key in _MPP_KEYS:
        value = content.get(key)
        if "mpp" not in found and isinstance(value, int | float) and np.isfinite(value):
            found["mpp"] = float(value)
    if content.get("patient"):
        found["patient"] = str(content["patient"])
    return found


def _open_labels(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataValueError(f"labels: {path.name!r} cannot be read as a plain .npy array ({error})") from error
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataValueError(f"labels: {path.name!r} holds {labels.dtype}; integers are needed, 0 for background")
    if labels.shape != size[::-1]:
        raise GeometryError(f"labels: {path.name!r} has shape {labels.shape}, the image {size[::-1]} (height, width)")
    return labels


def _label_element(labels: np.ndarray, mpp: float) -> Any:
    import dask.array as da
    from spatialdata.models import Labels2DModel

    lazy = da.from_array(labels, chunks=(2048, 2048))
    return Labels2DModel.parse(lazy, dims=("y", "x"), transformations=transformations(mpp))


def _mpp_of(sdata: SpatialData) -> float:
    from spatialdata.transformations import get_transformation

    scale = get_transformation(sdata[Keys.IMAGE], Keys.MICRONS)
    if not hasattr(scale, "scale"):
        raise ScaleError("the image has no scale")
    return float(scale.scale[0])
