"""Nuclei as elements of SpatialData: in memory, or written to a store of their own row of blocks by row of blocks."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from .._files import staged
from .._keys import Keys
from ..data.blockwise import check_target, publish_store
from ..data.provenance import record
from ..data.tables import mark_table
from ..errors import DataValueError
from ._outline import FEATURES
from ._raster import CHUNK_PX, paint

if TYPE_CHECKING:
    import zarr
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata.transformations import BaseTransformation

    from ..image.stream import WorkingGrid
    from ._nuclei import Nuclei

__all__ = ["NucleiStore", "Names", "feature_table", "label_element", "outline_shapes"]

_CHUNK_ROWS = 1 << 16
_BATCH = 1 << 13  # nuclei that are objects at a time


@dataclass(frozen=True)
class Names:
    """Names of the three elements; unique across kinds, as SpatialData wants them."""

    shapes: str

    @property
    def labels(self) -> str:
        """Of the label image."""
        return Keys.NUCLEI_LABELS if self.shapes == Keys.NUCLEI else Keys.derived(self.shapes, "labels")

    @property
    def table(self) -> str:
        """Of the table."""
        return Keys.nuclei_table(self.shapes)


def outline_shapes(nuclei: Nuclei, transformations: Mapping[str, BaseTransformation]) -> GeoDataFrame:
    """Shapes element of outlines in level-0 pixels."""
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    frame = GeoDataFrame({Keys.NUCLEUS_ID: nuclei.ids}, geometry=nuclei.outlines(), index=nuclei.ids)
    return ShapesModel.parse(frame, transformations=dict(transformations))


def feature_table(nuclei: Nuclei, region: str, note: Mapping[str, Any]) -> AnnData:
    """Table of what was measured of the nuclei in the shapes `region`, with a note how they were made."""
    import pandas as pd
    from anndata import AnnData
    from spatialdata.models import TableModel

    columns: dict[str, Any] = {
        Keys.REGION: pd.Categorical([region] * len(nuclei)),
        Keys.NUCLEUS_ID: nuclei.ids,
        **nuclei.columns,
    }
    if nuclei.labels is not None:
        columns[Keys.LABEL] = nuclei.labels
    adata = AnnData(
        nuclei.regions.features,
        obs=pd.DataFrame(columns, index=pd.Index(nuclei.ids.astype(str))),
        var=pd.DataFrame(index=pd.Index(list(FEATURES))),
        obsm={Keys.SPATIAL: nuclei.centroids()},
    )
    table = TableModel.parse(adata, region=region, region_key=Keys.REGION, instance_key=Keys.NUCLEUS_ID)
    mark_table(table, "nuclei")
    record(table, region, **note)
    return table


def label_element(raster: Any, grid: WorkingGrid, transformations: Mapping[str, BaseTransformation]) -> Any:
    """Labels element of a label image on `grid`, a dask array."""
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import Scale, Sequence

    scale = Scale(list(grid.factor), axes=("x", "y"))
    placed = {
        name: transformation if grid.factor == (1.0, 1.0) else Sequence([scale, transformation])
        for name, transformation in transformations.items()
    }
    return Labels2DModel.parse(raster, dims=("y", "x"), transformations=placed)


class NucleiStore:
    """Zarr store of a SpatialData that appears under its name only when all nuclei are in it.

    Used as a context manager around :meth:`write`; an error inside leaves nothing behind.

    Parameters
    ----------
    path
        Folder to create.
    names
        Names of the elements.
    grid
        Working grid of the nuclei.
    transformations
        Those of the image.
    labels
        Type of the label image; ``None`` to leave it out.
    note
        How they were made.

    Raises
    ------
    DataValueError
        If there is something at `path` already, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        names: Names,
        grid: WorkingGrid,
        transformations: Mapping[str, BaseTransformation],
        *,
        labels: np.dtype | None,
        note: Mapping[str, Any],
    ) -> None:
        check_target(path)
        self.path, self._names, self._grid = Path(path), names, grid
        self._transformations, self._labels, self._note = transformations, labels, note
        self._work = ExitStack()
        self._staging: Path | None = None
        self._outlines: Any = None
        self._group: zarr.Group | None = None

    @property
    def raster(self) -> zarr.Array | None:
        """The label image so far."""
        if self._group is None or self._labels is None:
            return None
        return next(iter(_member(self._group, f"labels/{self._names.labels}").array_values()))

    def __enter__(self) -> Self:
        try:
            self._staging = self._work.enter_context(staged(self.path))
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def write(self, nuclei: Nuclei) -> None:
        """Append nuclei, one or more."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "zarr v3 autosharding")  # anndata's, at each write
                for start in range(0, len(nuclei), _BATCH):
                    self._append(nuclei.take(np.arange(start, min(start + _BATCH, len(nuclei)))))
            if (raster := self.raster) is not None:
                paint(raster, nuclei)
        except OSError as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._staging is not None
        try:
            if self._outlines is not None:
                self._outlines.close()
            if kind is None:
                publish_store(self._staging / "store", self.path)
        except OSError as problem:
            if kind is None:
                raise self._unwritable(problem) from problem
        finally:
            self._work.close()

    def _append(self, nuclei: Nuclei) -> None:
        shapes = outline_shapes(nuclei, self._transformations)
        table = feature_table(nuclei, self._names.shapes, self._note)
        if self._group is None:
            self._begin(shapes, table)
        self._append_outlines(shapes)
        self._append_rows(table)

    def _begin(self, shapes: GeoDataFrame, table: AnnData) -> None:
        """Lay out the store by its first nuclei, with room for any number of them."""
        import dask.array as da
        import pyarrow.parquet as pq
        import zarr
        from spatialdata import SpatialData

        assert self._staging is not None
        elements: dict[str, Any] = {self._names.shapes: shapes, self._names.table: table}
        if self._labels is not None:
            blank = da.zeros(self._grid.shape, dtype=self._labels, chunks=CHUNK_PX)
            elements[self._names.labels] = label_element(blank, self._grid, self._transformations)
        root = self._staging / "store"
        SpatialData.init_from_elements(elements).write(root)
        self._group = zarr.open_group(root, mode="r+", use_consolidated=False)
        for array in self._growing():
            self._group.create_array(
                array.path,
                shape=(0, *array.shape[1:]),
                chunks=(_CHUNK_ROWS, *(max(size, 1) for size in array.shape[1:])),
                dtype=array.dtype,
                attributes=dict(array.attrs),
                overwrite=True,
            )
        file = root / "shapes" / self._names.shapes / "shapes.parquet"
        self._outlines = pq.ParquetWriter(file, _open_schema(pq.read_schema(file)))

    def _growing(self) -> list[zarr.Array]:
        """Arrays of the table that have a row per nucleus."""
        assert self._group is not None
        table = _member(self._group, f"tables/{self._names.table}")
        return [
            cast("zarr.Array", array)
            for name, array in table.members(max_depth=None)
            if hasattr(array, "shape")
            and (name == "X" or name.startswith(("obs/", "obsm/")))
            and not name.endswith("/categories")
        ]

    def _append_outlines(self, shapes: GeoDataFrame) -> None:
        import pyarrow.parquet as pq

        file = io.BytesIO()
        held = shapes.attrs
        try:
            shapes.attrs = {}  # transformations are stored elsewhere, and are no JSON
            shapes.to_parquet(file)
        finally:
            shapes.attrs = held
        file.seek(0)
        self._outlines.write_table(pq.read_table(file).replace_schema_metadata(self._outlines.schema.metadata))

    def _append_rows(self, table: AnnData) -> None:
        """By anndata's own encoding, whatever it is, of these rows."""
        import zarr
        from anndata.io import write_elem

        part = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
        write_elem(part, "table", table)
        prefix = f"tables/{self._names.table}/"
        for array in self._growing():
            rows: Any = part[f"table/{array.path.removeprefix(prefix)}"]
            array.append(rows[:])

    def _unwritable(self, error: OSError) -> DataValueError:
        return DataValueError(
            f"target={str(self.path)!r} could not be written ({error}); nothing is left there. Make room or name another "
            f"folder, and call again: parts of the slide that are finished are not done twice"
        )


def _member(group: zarr.Group, path: str) -> zarr.Group:
    return cast("zarr.Group", group[path])


def _open_schema(schema: Any) -> Any:
    """A schema of GeoParquet without the extent of the first outlines, which the others do not share."""
    about = json.loads(schema.metadata[b"geo"])
    for column in about["columns"].values():
        column.pop("bbox", None)
        column["geometry_types"] = []  # any
    return schema.with_metadata({**schema.metadata, b"geo": json.dumps(about).encode()})
