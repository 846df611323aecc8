"""Parsing of files and columns that are not what they should be: one kind of error that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import error as ZlibError

import numpy as np

from ..errors import DataValueError, HespotexError
from ._names import shorten

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["finite_columns", "parsing"]


@contextmanager
def parsing(argument: str, path: Path, what: str) -> Iterator[None]:
    """Turn what a parser raises about a file into an error that names it; our own errors pass.

    Raises
    ------
    DataValueError
        If the file is empty, damaged, truncated or of another format.
    """
    try:
        yield
    except HespotexError:
        raise
    except (OSError, EOFError, ValueError, TypeError, KeyError, ZlibError) as error:
        raise DataValueError(
            f"{argument}: {path.name!r} cannot be read as {what} ({type(error).__name__}: {error}); it may be empty, "
            "incomplete or of another format: copy or download it again"
        ) from error


def finite_columns(table: pd.DataFrame, columns: Sequence[str], where: str) -> pd.DataFrame:
    """`table` with these columns as numbers.

    Raises
    ------
    DataValueError
        If one holds text, nothing, or infinity.
    """
    import pandas as pd

    table = table.copy()
    for column in columns:
        # as objects, since numbers may be stored as categories
        values = pd.to_numeric(table[column].astype(object), errors="coerce").astype(np.float64)
        lost = table.index[~np.isfinite(values)]
        if len(lost):
            raise DataValueError(
                f"{where}: column {column!r} holds no number in {len(lost)} of {len(table)} rows: "
                f"{shorten(list(lost), 3)}; correct these rows or leave them out"
            )
        table[column] = values
    return table
