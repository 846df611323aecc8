"""Legacy Spatial Transcriptomics files."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..errors import CountsError, DataValueError, HespotexWarning, MissingKeyError, ScaleError
from ._assemble import build_section
from ._image import check_positive, isotropic, open_picture
from ._names import Duplicates, check_duplicates, shorten, unique_genes, unique_spots
from ._parsing import finite_columns, parsing

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

__all__ = ["read_st"]


def read_st(
    counts: str | Path,
    spots: str | Path,
    image: str | Path,
    *,
    name: str | None = None,
    patient: str | None = None,
    pitch_um: float | tuple[float, float] = 200.0,
    diameter_um: float = 100.0,
    mpp: float | None = None,
    frame_size: tuple[int, int] | None = None,
    on_tissue_only: bool = True,
    duplicates: Duplicates = "error",
) -> SpatialData:
    """Read one section of the legacy Spatial Transcriptomics array.

    Parameters
    ----------
    counts
        Table (tsv, may be gzipped) of raw counts: a row per spot named ``<x>x<y>`` (array position), a column
        per gene.
    spots
        Table (tsv) with the columns ``x``, ``y`` (array position), ``pixel_x``, ``pixel_y`` (position in the
        image) and, where there, ``new_x``, ``new_y`` (measured array position) and ``selected`` (1 under tissue).
    image
        The H&E: JPEG, PNG or TIFF. A format without random access is decoded once into the cache; see
        :func:`hespotex.io.read_image` on what happens when that is deleted.
    name
        Name of the section; the stem of `image` by default.
    patient
        Patient, kept beside the name: splits are made by it.
    pitch_um
        µm per step of the array position, one number or one for x and one for y: 200 for the classic array.
    diameter_um
        Diameter of a spot: 100 for the classic array.
    mpp
        µm per pixel of the image. By default derived from the spots: pixels per array step against `pitch_um`.
    frame_size
        Width and height of the image that ``pixel_x``, ``pixel_y`` refer to, where `image` is a resized copy of it.
    on_tissue_only
        Leave out spots with ``selected`` = 0; without effect where the column is absent.
    duplicates
        What to do with genes named twice: ``"error"``, ``"first"`` or ``"sum"``.

    Returns
    -------
    SpatialData
        ``images["image"]`` (lazy, multiscale, uint8 RGB), ``shapes["spots"]`` (circles, level-0 pixels) and
        ``tables["table"]`` (int32 CSR counts in ``X``; ``obs`` ``array_row``, ``array_col``, ``spot_id``;
        ``obsm["spatial"]`` in pixels). Coordinate systems ``"global"`` (pixels) and ``"microns"``. Spots found in one
        file only are left out, reported by a warning and kept in ``attrs["hespotex"]["unmatched"]``.

    Raises
    ------
    CountsError
        If a count is negative, missing or not whole.
    ScaleError
        If the scales of x and y differ by more than 3 %, or cannot be derived.
    GeometryError
        If spots lie outside the image.
    DataValueError
        If a table is damaged or holds text for numbers, names repeat, or the two tables share no spot.
    ImageFormatError
        If the image is not 8-bit RGB.
    MissingKeyError
        If the spot file lacks a column.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.io.read_st("C2.tsv.gz", "C2_selection.tsv", "C2.jpg", patient="C")  # doctest: +SKIP
    """
    import anndata as ad
    import pandas as pd

    check_duplicates(duplicates)
    diameter_um = check_positive("diameter_um", diameter_um)
    pitch = np.array([check_positive("pitch_um", value) for value in np.atleast_1d(pitch_um)])
    if len(pitch) not in (1, 2):
        raise ScaleError(f"pitch_um={pitch_um!r}: one number is needed, or one for x and one for y")
    pitch = np.broadcast_to(pitch, 2)
    counts, spots = Path(counts), Path(spots)
    matrix, count_names, genes = _read_counts(counts)
    matrix, genes = unique_genes(matrix, genes, duplicates, f"counts: {counts.name!r}")
    table = _read_spots(spots)

    listed = table.index
    if on_tissue_only and "selected" in table:
        table = table[table["selected"] != 0]
    shared = table.index.intersection(count_names, sort=False)
    if shared.empty:
        raise DataValueError(
            f"counts {counts.name!r} and spots {spots.name!r} share no spot; names must be '<x>x<y>': "
            f"found {shorten(count_names, 3)} against {shorten(listed, 3)}"
        )
    unmatched = {
        "counts_only": [str(key) for key in count_names.difference(listed, sort=False)],
        "spots_only": [str(key) for key in table.index.difference(count_names, sort=False)],
    }
    positions = [column for column in ("pixel_x", "pixel_y", "new_x", "new_y") if column in table]
    table = finite_columns(table.loc[shared], positions, f"spots: {spots.name!r}")
    matrix = matrix[count_names.get_indexer(shared)]

    picture = open_picture(image)
    width, height = picture.size
    sides = (width, height) if frame_size is None else np.atleast_1d(frame_size)
    frame = np.array([check_positive("frame_size", side) for side in sides])
    if len(frame) != 2:
        raise ScaleError(f"frame_size={frame_size!r}: (width, height) of the original image in pixels is needed")
    xy = table[["pixel_x", "pixel_y"]].to_numpy() * (np.array([width, height]) / frame)
    if mpp is None:
        mpp = _mpp_from_lattice(table, xy, pitch, spots.name)
    else:
        mpp = check_positive("mpp", mpp)

    obs = pd.DataFrame(
        {
            Keys.ARRAY_ROW: table["y"].round().astype(np.int64).to_numpy(),
            Keys.ARRAY_COL: table["x"].round().astype(np.int64).to_numpy(),
            Keys.IN_TISSUE: table["selected"].astype(np.int64).to_numpy() if "selected" in table else 1,
        },
        index=pd.Index(shared.to_numpy(dtype=object)),
    )
    adata = ad.AnnData(X=matrix, obs=obs, var=pd.DataFrame(index=pd.Index(genes.to_numpy(dtype=object))))
    attrs: dict[str, Any] = {"name": name or Path(image).stem, "patient": patient, "unmatched": unmatched}
    sdata = build_section(
        picture.levels,
        adata,
        xy,
        mpp=mpp,
        radius_px=diameter_um / mpp / 2,
        attrs=attrs,
        advice="If the image is a resized copy, give the size of the original as frame_size=(width, height).",
    )
    _report(unmatched, counts.name, spots.name)
    logger.info("read %s: %d spots, %d genes, %.4g µm/px", attrs["name"], adata.n_obs, adata.n_vars, mpp)
    return sdata


def _spot_names(x: np.ndarray, y: np.ndarray) -> pd.Index:
    import pandas as pd

    return pd.Index([f"{column:g}x{row:g}" for column, row in zip(x, y, strict=True)])


def _read_counts(path: Path) -> tuple[csr_matrix, pd.Index, pd.Index]:
    """Counts (CSR int32), the spots' normalised names and the genes."""
    import pandas as pd
    from scipy import sparse

    if not path.is_file():
        raise DataValueError(f"counts: there is no file {str(path)!r}")
    with parsing("counts", path, "a table of spots x genes"):
        # pandas renames repeated columns, so the header is read apart
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            header = file.readline().rstrip("\r\n").split("\t")
        frame = pd.read_csv(path, sep="\t", header=None, skiprows=1, index_col=0, low_memory=False)
    genes = pd.Index(header[len(header) - frame.shape[1] :])
    if len(genes) != frame.shape[1] or frame.empty:
        raise CountsError(f"counts: {path.name!r} is not a table of spots x genes")
    try:
        values = frame.to_numpy(dtype=np.float64)
    except ValueError as error:
        raise CountsError(f"counts: {path.name!r} holds text where counts are expected ({error})") from error
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.round(values)).any():
        raise CountsError(
            f"counts: {path.name!r} holds negative, missing or fractional values; raw counts are needed, "
            "not normalised ones"
        )
    positions = frame.index.astype(str).str.extract(r"^([0-9.]+)x([0-9.]+)$").astype(float)
    if positions.isna().any(axis=None):
        bad = frame.index[positions.isna().any(axis=1).to_numpy()]
        raise DataValueError(f"counts: {path.name!r}: rows must be named '<x>x<y>', found {shorten(bad, 3)}")
    names = _spot_names(positions[0].to_numpy(), positions[1].to_numpy())
    unique_spots(names, f"counts: {path.name!r}")
    return sparse.csr_matrix(values.astype(np.int32)), names, genes


def _read_spots(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        raise DataValueError(f"spots: there is no file {str(path)!r}")
    with parsing("spots", path, "a table of spots"):
        table = pd.read_csv(path, sep="\t")
    missing = [column for column in ("x", "y", "pixel_x", "pixel_y") if column not in table]
    if missing:
        raise MissingKeyError(
            f"spots: {path.name!r} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        )
    whole = [column for column in ("x", "y", "selected") if column in table]
    table = finite_columns(table, whole, f"spots: {path.name!r}")
    table.index = _spot_names(table["x"].to_numpy(), table["y"].to_numpy())
    unique_spots(table.index, f"spots: {path.name!r}")
    return table


def _mpp_from_lattice(table: pd.DataFrame, xy: np.ndarray, pitch: np.ndarray, name: str) -> float:
    """µm per pixel from the pixels per array step along x and along y."""
    found: list[float] = []
    for axis, letter in enumerate("xy"):
        column = f"new_{letter}" if f"new_{letter}" in table else letter
        steps = table[column].to_numpy(dtype=np.float64)
        centred = steps - steps.mean()
        if not (spread := centred @ centred) > 0:
            raise ScaleError(
                f"spots: {name!r} has one array position along {letter}, so the scale cannot be derived; pass mpp="
            )
        slope = abs(centred @ xy[:, axis]) / spread  # an array may lie mirrored on the image
        if not slope > 0:
            raise ScaleError(f"spots: {name!r}: pixel_{letter} does not change with {column}; pass mpp=")
        found.append(float(pitch[axis] / slope))
    return isotropic(found[0], found[1], f"spots: {name!r} with pitch_um={tuple(map(float, pitch))}")


def _report(unmatched: dict[str, list[str]], counts: str, spots: str) -> None:
    parts = [
        f"{len(names)} only in {file!r} ({shorten(names)})"
        for names, file in ((unmatched["counts_only"], counts), (unmatched["spots_only"], spots))
        if names
    ]
    if parts:
        warnings.warn(f"spots left out: {'; '.join(parts)}", HespotexWarning, stacklevel=3)
