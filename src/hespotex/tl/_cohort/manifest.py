"""The table of what became of each slide, rewritten as a whole after each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..._files import replacing
from ..._logging import logger
from ...errors import DataValueError
from .slides import printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["STAGES", "Manifest", "Row", "Status"]

Status = Literal["pending", "done", "failed"]
STAGES = ("read", "tissue", "tiles", "embed", "predict", "write")
_NAME = "manifest.parquet"


@dataclass
class Row:
    """What became of a slide.

    ``pending`` is a slide that was not begun, or whose work was cut off; the next run goes on with it. `identity` is that of
    the last result that was finished.
    """

    slide: str
    output: str
    status: Status = "pending"
    attempts: int = 0
    seconds: float = float("nan")
    stages: dict[str, float] = field(default_factory=dict)
    n_tiles: int = 0
    n_genes: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    message: str = ""
    model: str = ""
    options: str = ""
    identity: str = ""
    size: int = 0
    mtime_ns: int = 0
    fingerprint: str = ""
    hespotex_version: str = ""
    finished: str = ""


class Manifest:
    """The rows of a folder of results, by slide, kept in ``manifest.parquet``.

    Parameters
    ----------
    folder
        Where the table is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self.rows: dict[str, Row] = {row.slide: row for row in _read(self._path)}

    def save(self) -> None:
        """Write the table; it is the old or the new one, never a part."""
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist([_flat(row) for row in self.rows.values()], schema=_schema())
        with replacing(self._path) as part:
            parquet.write_table(table, part)

    def frame(self, slides: Iterable[Path]) -> pd.DataFrame:
        """The rows of `slides` as a table."""
        import pandas as pd

        return pd.DataFrame([_flat(self.rows[printable(slide)]) for slide in slides], columns=_schema().names)


def _schema() -> Any:
    import pyarrow as pa

    types = {"str": pa.string(), "Status": pa.string(), "int": pa.int64(), "float": pa.float64()}
    columns = []
    for entry in fields(Row):
        if entry.name == "stages":
            columns += [(f"seconds_{stage}", pa.float64()) for stage in STAGES]
        else:
            columns.append((entry.name, types.get(str(entry.type), pa.list_(pa.string()))))
    return pa.schema(columns)


def _flat(row: Row) -> dict[str, Any]:
    values = asdict(row)
    stages = values.pop("stages")
    return values | {f"seconds_{stage}": stages.get(stage, float("nan")) for stage in STAGES}


def _read(path: Path) -> list[Row]:
    """The rows of an earlier run; of a damaged file none, as the results themselves say what they are.

    Raises
    ------
    DataValueError
        If it is another table, which must not be replaced.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not path.exists():
        return []
    try:
        table = parquet.read_table(path)
        ours = {"slide", "output", "identity"} <= {*table.column_names}
        found = table.cast(_schema()).to_pylist() if ours else []
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        logger.warning("ignoring %s, which cannot be read: %s", path, error)
        return []
    if not ours:
        raise DataValueError(f"out={str(path.parent)!r} holds a {_NAME} of something else; name another folder")
    rows = []
    for values in found:
        stages = {stage: values.pop(f"seconds_{stage}") for stage in STAGES}
        rows.append(Row(**values, stages={stage: spent for stage, spent in stages.items() if spent == spent}))
    return rows
