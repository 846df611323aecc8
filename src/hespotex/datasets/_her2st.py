"""HER2-positive breast tumours of Andersson et al. (2021)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .._settings import settings
from ..errors import DataValueError
from ..io import read_st

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["her2st"]

_SOURCE: Final = "https://raw.githubusercontent.com/almaan/her2st/85df741/data"
_PARTS: Final = ("counts", "spots", "image")

# for each section that may be downloaded: path at the source and SHA-256 of counts, spots and image
_FILES: Final[dict[str, tuple[tuple[str, str], tuple[str, str], tuple[str, str]]]] = {
    "C2": (
        ("ST-cnts/C2.tsv.gz", "c1c59ea6cffae36b9ecb561b8e2a97e3aa5f4085f748e991a0e330ed9d09773d"),
        ("ST-spotfiles/C2_selection.tsv", "235b5f4306b3b57c628ffc82c98c7109602474fbcc79a917b9c50517f99b6b1c"),
        ("ST-imgs/C/C2/5714_HE_BT_C2.jpg", "26e2f73ae840cdd46c5bba405aae181f13a56a376b9848dff23f7a9c5de7f19e"),
    ),
    "C3": (
        ("ST-cnts/C3.tsv.gz", "e00c55a3eb9caac5d9c71b8906aae8be8b38f93e23938f4a0ebee17683ef6a2a"),
        ("ST-spotfiles/C3_selection.tsv", "7fd76c13370b7804ac3bb377b846d22485cf9223f9dd8dfc25be06e5aaf65755"),
        ("ST-imgs/C/C3/5714_HE_BT_D1.jpg", "0005a92674014d473040a28f0afca89ce5fa5c44019b479b638ceb3272ceb568"),
    ),
    "C4": (
        ("ST-cnts/C4.tsv.gz", "33201f76d41d7131dc600a0f87d9a70383af3503e81698b4d11e6f2e8d73e9da"),
        ("ST-spotfiles/C4_selection.tsv", "47e79f3b9dbfa3a8c18af9e948ba7ba4bf0a75ea1b4c292bc714ced7d0917d4c"),
        ("ST-imgs/C/C4/5714_HE_BT_D2.jpg", "f40607eb1d5f0d125decd71c48b0c5d29cf6776ad92297fd185631208c82d6f2"),
    ),
    "C5": (
        ("ST-cnts/C5.tsv.gz", "c0f310315ca6110d74dbdf7011e5b42432ba0b8eb5f001824764911988f39338"),
        ("ST-spotfiles/C5_selection.tsv", "2114cc3b4da759772112897f1e247d5443c9f8c808e6a9a952eb4fda379a194c"),
        ("ST-imgs/C/C5/5714_HE_BT_E1.jpg", "34028ea41e376396b50c42b0a11a7e689c85be4a8022e668d0a09cc128c04c65"),
    ),
}


def her2st(section: str, path: str | Path | None = None) -> SpatialData:
    """A section of the HER2-positive breast tumours of Andersson et al. (2021).

    H&E at 0.688 µm/px, whole-transcriptome counts of the first-generation array (100 µm spots, 200 µm apart).
    C2 to C5 are adjacent sections of one tumour: a split by section is not a split by patient.

    Parameters
    ----------
    section
        A letter for the patient and a number, e.g. ``"C2"``. Any section of a local folder; C2 to C5 are
        downloaded where there is none.
    path
        Folder with ``images/<section>.jpg``, ``counts/<section>.tsv.gz`` and ``spots/<section>_selection.tsv``.
        By default ``her2st`` in the folder that the environment variable ``HESPOTEX_DATA`` names; where that
        does not hold the section, it is downloaded into ``settings.cache_dir`` (checksums are verified).

    Returns
    -------
    SpatialData
        As of :func:`hespotex.io.read_st`.

    Raises
    ------
    DataValueError
        If the section is not there and cannot be downloaded.

    Notes
    -----
    CC BY 4.0; cite doi:10.1038/s41467-021-26271-2.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.her2st("C2")  # doctest: +SKIP
    """
    counts, spots, image = _local(section, path) or _download(section)
    return read_st(counts, spots, image, name=section, patient=section[:1])


def _local(section: str, path: str | Path | None) -> tuple[Path, Path, Path] | None:
    """Files of a section in a local folder; None where the default folder does not hold them."""
    if path is not None:
        folder = Path(path)
    elif root := os.environ.get("HESPOTEX_DATA"):
        folder = Path(root) / "her2st"
    else:
        return None
    files = (
        folder / "counts" / f"{section}.tsv.gz",
        folder / "spots" / f"{section}_selection.tsv",
        folder / "images" / f"{section}.jpg",
    )
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
    if not missing:
        return files
    if path is None:
        return None
    raise DataValueError(f"path: {str(folder)!r} does not hold section {section!r}; missing: {', '.join(missing)}")


def _download(section: str) -> tuple[Path, Path, Path]:
    import pooch

    if section not in _FILES:
        raise DataValueError(
            f"section={section!r} cannot be downloaded (possible: {', '.join(_FILES)}) and is not in a local folder. "
            f"{_advice(section)}"
        )
    folder = settings.cache_dir / "her2st"
    files = []
    for part, (source, digest) in zip(_PARTS, _FILES[section], strict=True):
        url = f"{_SOURCE}/{source}"
        try:
            file = pooch.retrieve(url, f"sha256:{digest}", fname=_name(section, part), path=folder)
        except (OSError, ValueError) as error:  # no connection, or a checksum that does not fit
            raise DataValueError(f"{url} could not be downloaded ({error}). {_advice(section)}") from error
        files.append(Path(file))
    counts, spots, image = files
    return counts, spots, image


def _name(section: str, part: str) -> str:
    return {"counts": f"{section}.tsv.gz", "spots": f"{section}_selection.tsv", "image": f"{section}.jpg"}[part]


def _advice(section: str) -> str:
    return (
        f"Place counts/{section}.tsv.gz, spots/{section}_selection.tsv and images/{section}.jpg (see "
        "https://github.com/almaan/her2st, folder data) into one folder and pass it as path=, or set HESPOTEX_DATA to "
        "the folder above one named her2st"
    )
