"""What the output folders of 10x's instruments have in common."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np

from .._keys import Keys
from .._logging import logger
from ..data.counts import check_counts
from ..errors import DataValueError
from ._names import shorten

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["annotate", "folder", "foreign", "json_of", "one_of", "other_features", "required", "tidy_genes"]

GENES: Final = "Gene Expression"


def folder(path: str | Path, instrument: str) -> Path:
    """`path` as a folder.

    Raises
    ------
    DataValueError
        If it is none.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise DataValueError(f"path: {str(path)!r} {what}; give the output folder of {instrument}")
    return path


def required(path: Path, name: str) -> Path:
    """`path`, if it is a file; `name` is what 10x calls it.

    Raises
    ------
    DataValueError
        Naming the file.
    """
    if not path.is_file():
        raise DataValueError(f"path: there is no {path.name!r} in {str(path.parent)!r} (10x calls it the {name})")
    return path


def one_of(found: list[Path], argument: str, what: str) -> Path:
    """The only path of `found`.

    Raises
    ------
    DataValueError
        If there is none, or several.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataValueError(f"{argument}: the folder holds no {what}; pass {argument}= with the path of the file")
    names = shorten([str(path) for path in sorted(found)], 3)
    raise DataValueError(
        f"{argument}: the folder holds several files that may be the {what}: {names}; pass {argument}="
    )


def other_features(matrix: Path) -> dict[str, int]:
    """How many features of each type a matrix holds that are no genes: controls, codewords, antibodies.

    Raises
    ------
    DataValueError
        If the file is no feature matrix.
    """
    import h5py

    try:
        with h5py.File(matrix) as file:
            types = file["matrix/features/feature_type"].asstr()[:]
    except (OSError, KeyError) as error:
        raise DataValueError(f"path: {matrix.name!r} is no feature matrix of 10x, or damaged ({error})") from error
    kinds, counts = np.unique(types, return_counts=True)
    found = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    if not found.pop(GENES, 0):
        raise DataValueError(f"path: {matrix.name!r} holds no feature of type {GENES!r}, only {found}")
    if found:
        named = ", ".join(f"{count} of type {kind!r}" for kind, count in found.items())
        logger.info("%s: left out what is no gene: %s", matrix.name, named)
    return found


def tidy_genes(adata: AnnData) -> AnnData:
    """`adata` with names that occur once, after checking that it holds raw counts.

    10x lists genes by their Ensembl ids, of which some share a symbol: the second becomes ``<symbol>-1``, as in scanpy.
    """
    check_counts(adata.X, "the feature matrix")
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()].unique()
        logger.info("%d symbols stand for several genes and were numbered: %s", len(repeated), shorten(repeated))
        adata.var_names_make_unique()
    return adata


def annotate(adata: AnnData, shapes_key: str, instance_key: str) -> AnnData:
    """`adata` as the table of `shapes_key`, whose ids are in the column `instance_key`."""
    import pandas as pd
    from spatialdata.models import TableModel

    adata.uns.pop("spatialdata_attrs", None)
    adata.obs[Keys.REGION] = pd.Categorical([shapes_key] * adata.n_obs)
    return TableModel.parse(adata, region=shapes_key, region_key=Keys.REGION, instance_key=instance_key)


@contextmanager
def foreign(reader: str, *messages: str) -> Iterator[None]:
    """Around a call of spatialdata-io: silent about what begins with one of `messages`, which the caller sees to.

    Raises
    ------
    DataValueError
        In place of what it raises of damaged files, and of files that do not belong together.
    """
    ignored = (*messages, "Variable names are not unique", "Observation names are not unique")
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            for message in ignored:
                warnings.filterwarnings("ignore", message=message)
            yield
    except (OSError, LookupError, ValueError, AssertionError, RuntimeError, BadZipFile) as error:
        raise DataValueError(
            f"path: {reader} cannot read this folder: {type(error).__name__}: {error}. A file is damaged, or not of the same "
            f"run as the others; copy or download the folder again"
        ) from error


def json_of(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    DataValueError
        If the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataValueError(f"path: {path.name!r} is no JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise DataValueError(f"path: {path.name!r} holds no JSON object")
    return value
