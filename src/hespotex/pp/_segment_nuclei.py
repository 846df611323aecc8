"""Nuclei of a slide: outlines, label image, shapes and how many lie in each spot."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import Keys
from .._logging import logger
from .._tasks import check_client
from ..data.blockwise import available_bytes, check_target
from ..data.geometry import Slide, image_transformations, resolve_slide
from ..data.provenance import read_record, record
from ..data.transaction import restored_on_error
from ..errors import DataValueError
from ..image.stream import WorkingGrid, working_grid
from ..segmentation._kept import KeptRuns
from ..segmentation._nuclei import Nuclei
from ..segmentation._outline import SIMPLIFY_UM
from ..segmentation._raster import label_dtype, rasterise
from ..segmentation._store import Names, NucleiStore, feature_table, label_element, outline_shapes
from ..segmentation._tiled import iter_nuclei
from ..segmentation.existing import iter_given
from ..segmentation.watershed import DIAMETER_UM
from ._count_nuclei import SpotCounts, Spots, resolve_spots
from ._free import check_elements_free
from ._nuclei_source import Method, Source, resolve_source

if TYPE_CHECKING:
    from distributed import Client
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["segment_nuclei"]

OBJECT_BYTES = 1500  # of a nucleus as a polygon, its row and what is needed to make them
SPARE = 0.8  # of the free memory


def segment_nuclei(
    sdata: SpatialData,
    method: Method = "watershed",
    *,
    image_key: str | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    diameter_um: float = DIAMETER_UM,
    mpp: float | None = None,
    simplify_um: float = SIMPLIFY_UM,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    n_jobs: int | None = None,
    client: Client | None = None,
    raster: bool = True,
    key_added: str = Keys.NUCLEI,
    target: str | os.PathLike[str] | None = None,
    copy: bool = False,
    progress_bar: bool | None = None,
) -> GeoDataFrame | None:
    """Outline all nuclei of a slide, describe them, and count them per spot.

    The slide is worked on in overlapping blocks; no nucleus is cut, lost or found twice at a seam, and with ``"watershed"``
    and nuclei that are there already the result does not depend on the blocks. Work that is interrupted after more than ten
    seconds goes on where it stopped when the same call is made again, except with functions and with nuclei that are there
    already.

    Parameters
    ----------
    sdata
        Object with an H&E image of known scale.
    method
        A way to find nuclei:

        - ``"watershed"`` needs no weights: the best regions of a component tree of the nuclear stain, grown by
          watershed.
        - ``"cellpose"`` is Cellpose 4.
        - ``"instanseg"`` is InstanSeg, ``"lazyslide:<name>"`` another segmenter of lazyslide-models that returns
          instance masks.
        - A function of an RGB image (h, w, 3) uint8 that returns its label image.

        Or nuclei that are outlined already, and are kept as they are, ids included:

        - A label image of the size of the image or of one of its levels: its name in ``sdata.labels``, an array, or the
          path of a ``.npy`` file.
        - The name of polygons in ``sdata.shapes``, such as ``"nucleus_boundaries"`` of Xenium or
          ``"cellpose_boundaries"`` of sopa, wherever their transformations place them on the image.
        - The path of a ``.geojson`` file with polygons in level-0 pixels, as QuPath exports them.
    image_key
        Name in ``sdata.images``; may be left out where there is only one.
    shapes_key
        Spots to count nuclei in; by default those that the one table annotates. Without a table nothing is counted.
    table_key
        Their table; may be left out where there is only one.
    diameter_um
        Diameter of a typical nucleus in µm.
    mpp
        Working resolution in µm per pixel; by default 0.5, or the image's own if that is coarser. Label images keep
        theirs.
    simplify_um
        Tolerance in µm within which outlines are simplified, at most half a pixel; 0 keeps every step. Measures are of
        full outlines, and polygons that are there already stay as they are.
    model
        Path of the weights of a network. By default those of Cellpose where Cellpose keeps them, of which nothing is
        downloaded, and those of lazyslide-models in the cache of the hub, or from there.
    device
        Of networks; the setting by default.
    n_jobs
        Threads; the setting by default. One for networks and for functions.
    client
        ``dask.distributed.Client`` of a cluster to work on, whose workers can read the image; the result is the same. A
        function is called in all threads of a worker.
        Nuclei that are there already are taken in this process.
    raster
        Whether to write the label image, too. Without it, nuclei in the patch window are not counted.
    key_added
        Name of the outlines; those of the label image and of the table are derived from it.
    target
        Folder of a zarr store, for more nuclei than fit into memory: they are written there, row of blocks by row of
        blocks, as a SpatialData that appears only when whole. `sdata` gets the counts alone. Without it the call stops
        with an error as soon as nuclei, at 1.5 kB each, would take more than 80 % of the free memory: about half a
        million nuclei per free GB.
    copy
        Return the outlines in place of writing anything.
    progress_bar
        The setting by default.

    Returns
    -------
    The outlines if `copy`, else ``None`` and these are written:

    ``shapes["nuclei"]``
        Polygons in level-0 pixels with their ``nucleus_id``. They carry the image's transformations.
    ``labels["nuclei_labels"]``
        Label image of the ids at the working resolution, compressed in memory.
    ``tables["nuclei_features"]``
        A row per nucleus: area, perimeter and axes in µm, eccentricity, circularity, solidity, mean and standard
        deviation of haematoxylin. ``obsm["spatial"]`` holds centroids in level-0 pixels. Where ids are no positive
        whole numbers, ``obs["label"]`` is the number in the label image; ``obs["classification"]`` is that of a GeoJSON
        file.
    ``obs["n_nuclei"]`` of the spots' table
        Nuclei whose centroid lies in the spot.
    ``obs["n_nuclei_window"]``
        Distinct labels in the square patch of the spot, the background included, as HESpotEx counts.
    ``uns["hespotex"]["n_nuclei"]``
        Parameters and versions.

    Raises
    ------
    ScaleError
        If the image's scale is unknown, or too coarse for nuclei of this size.
    MissingKeyError
        If `method` names neither a method nor labels nor shapes nor a file.
    MissingWeightsError
        If the weights of a network are not there.
    GeometryError
        If labels or shapes share no coordinate system with the image, or labels do not cover it.
    DataTypeError, DataValueError
        If labels are not whole numbers, or negative, or have another size than the image; if no outline can be used, or
        ids are not unique; if no nucleus is found; if `key_added` or a column of counts is taken by something that this
        function did not make; if `target` exists or cannot be written, or nuclei do not fit into memory without it.
    OutputError
        If nothing can be written to the folder of `target`.
    WorkerError
        If the workers of `client` are lost.

    Warns
    -----
    HespotexWarning
        If nuclei are so large that a block's surroundings cut them; if given outlines had to be repaired or left out; if
        the work was interrupted, and what is kept of it.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=400)
    >>> hx.pp.segment_nuclei(sdata, n_jobs=1)
    >>> sdata["nuclei_features"].var_names[0]
    'area_um2'
    >>> hx.pp.segment_nuclei(sdata, "nuclei.npy")  # doctest: +SKIP
    >>> hx.pp.segment_nuclei(sdata, "qupath.geojson")  # doctest: +SKIP
    >>> hx.pp.segment_nuclei(sdata, "instanseg", target="nuclei.zarr")  # doctest: +SKIP
    """
    if not np.isfinite(diameter_um) or diameter_um <= 0:
        raise DataValueError(f"diameter_um={diameter_um!r} must be a positive number of µm")
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise DataValueError(f"mpp={mpp!r} must be a positive number of µm per pixel")
    if not (np.isfinite(simplify_um) and simplify_um >= 0):
        raise DataValueError(f"simplify_um={simplify_um!r} must be a number of µm, 0 for full outlines")
    if n_jobs is not None and n_jobs < 1:
        raise DataValueError(f"n_jobs={n_jobs!r} must be at least 1")
    check_client(client)
    if target is not None:
        if copy:
            raise DataValueError("copy=True returns outlines and target= writes them to disk; choose one")
        target = Path(target)
        check_target(target)
    slide = resolve_slide(sdata, image_key=image_key)
    names = Names(key_added)
    spots = resolve_spots(sdata, slide, shapes_key, table_key)
    if not copy:
        _check_free(sdata, names)
        if spots is not None:
            spots.check_free()
    source = resolve_source(sdata, slide, method, diameter_um=diameter_um, mpp=mpp, model=model, device=device)
    grid = working_grid(slide, source.mpp)
    note = {
        "created_by": "hespotex.pp.segment_nuclei",
        "params": {**source.params, "diameter_um": diameter_um, "simplify_um": simplify_um} if source.params else {},
        "method": source.name,
        "image": slide.key,
        "mpp": grid.mpp,
    }
    counts = None if spots is None or copy else SpotCounts(sdata, slide, spots)
    nothing = DataValueError(
        f"segment_nuclei found no nuclei on image {slide.key!r} with method {source.name!r}: the image may be blank or out "
        f"of focus, or diameter_um={diameter_um:g} does not fit. Look at it, or go on without nuclei"
    )
    with ExitStack() as stack:
        kept = KeptRuns(lambda: source.identity(slide, simplify_um)) if source.described is not None else None
        if kept is not None:
            stack.enter_context(kept)
        # Closed whatever ends the work: a notebook keeps the traceback, and with it threads and tasks of a cluster.
        found = stack.enter_context(
            closing(_found(slide, source, simplify_um, n_jobs, client, kept, progress_bar=progress_bar))
        )
        if target is not None:
            labels = _label_type(source) if raster else None
            _to_disk(
                NucleiStore(target, names, grid, image_transformations(sdata, slide.key), labels=labels, note=note),
                sdata,
                found,
                grid,
                spots,
                counts,
                note,
                nothing,
            )
            return None
        nuclei = Nuclei.concatenate(list(_fitting(found)), grid)
        if len(nuclei) == 0:
            raise nothing
        outlines = outline_shapes(nuclei, image_transformations(sdata, slide.key))
        if copy:
            return outlines
        elements = {names.shapes: outlines, names.table: feature_table(nuclei, names.shapes, note)}
        image = rasterise(nuclei) if raster else None
        if image is not None:
            import dask.array as da

            # not da.from_zarr, by whose name SpatialData takes an array for files, and cannot overwrite a store
            labels = da.from_array(image, chunks=image.chunks, name=False)
            elements[names.labels] = label_element(labels, grid, image_transformations(sdata, slide.key))
        if counts is not None:
            counts.add(nuclei)
        _write(sdata, names, elements, spots, {} if counts is None else counts.columns(grid, image), note)
    return None


def _check_free(sdata: SpatialData, names: Names) -> None:
    """Raise if writing would replace anything that an earlier call has not made."""
    kinds = {names.shapes: "shapes", names.labels: "labels", names.table: "tables"}
    ours = names.table in sdata.tables and bool(read_record(sdata.tables[names.table], names.shapes))
    check_elements_free(sdata, kinds, key_added=names.shapes, maker="segment_nuclei", is_ours=lambda _: ours)


def _found(
    slide: Slide,
    source: Source,
    simplify_um: float,
    n_jobs: int | None,
    client: Client | None,
    kept: KeptRuns | None,
    *,
    progress_bar: bool | None,
) -> Generator[Nuclei]:
    """Nuclei of one row of blocks after the other."""
    if source.outlines is not None:
        return iter_given(
            source.outlines,
            slide,
            mpp=source.mpp,
            block_px=source.block_px,
            n_jobs=n_jobs,
            progress_bar=progress_bar,
        )
    assert source.backend is not None
    return iter_nuclei(
        slide,
        source.backend,
        mpp=source.mpp,
        halo_px=source.halo_px,
        block_px=source.block_px,
        n_jobs=1 if source.one_thread else n_jobs,
        client=None if source.keep_names else client,
        keep_names=source.keep_names,
        simplify_um=simplify_um,
        kept=kept,
        progress_bar=progress_bar,
    )


def _fitting(found: Iterator[Nuclei]) -> Iterator[Nuclei]:
    """The same, until there are more of them than memory takes."""
    count = 0
    for nuclei in found:
        count += len(nuclei)
        free = available_bytes()
        if free is not None and count * OBJECT_BYTES > SPARE * free:
            raise DataValueError(
                f"{count} nuclei of a part of the slide take {_size(count * OBJECT_BYTES)} already, and {_size(free)} of "
                f"memory are free, of which {SPARE:.0%} may be used. Write them to disk: "
                f"hx.pp.segment_nuclei(..., target='nuclei.zarr'), which goes on where this stopped"
            )
        yield nuclei


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _label_type(source: Source) -> np.dtype:
    """Type of a label image whose highest number is not known before it is written."""
    if source.outlines is not None and source.outlines.ids.dtype.kind in "iu":
        return label_dtype(int(source.outlines.ids.max()))
    return np.dtype(np.int32 if source.dtype is None or np.can_cast(source.dtype, np.int32) else np.int64)


def _to_disk(
    store: NucleiStore,
    sdata: SpatialData,
    found: Iterator[Nuclei],
    grid: WorkingGrid,
    spots: Spots | None,
    counts: SpotCounts | None,
    note: dict[str, Any],
    nothing: DataValueError,
) -> None:
    number = 0
    with store:
        for nuclei in found:
            store.write(nuclei)
            number += len(nuclei)
            if counts is not None:
                counts.add(nuclei)
            del nuclei  # before the next ones are made
        if not number:
            raise nothing
        columns = {} if counts is None else counts.columns(grid, store.raster)
    if spots is not None:
        with restored_on_error(sdata):
            spots.write(columns)
            record(spots.table.adata, Keys.N_NUCLEI, **note)
    logger.info("segment_nuclei: %d nuclei; wrote %s", number, store.path)


def _write(
    sdata: SpatialData,
    names: Names,
    elements: dict[str, Any],
    spots: Spots | None,
    counts: dict[str, np.ndarray],
    note: dict[str, Any],
) -> None:
    with restored_on_error(sdata):
        for name in (names.table, names.labels, names.shapes):
            if name in sdata:
                del sdata[name]
        for name in (names.shapes, names.labels, names.table):
            if name in elements:
                sdata[name] = elements[name]
        if spots is not None:
            spots.write(counts)
            record(spots.table.adata, Keys.N_NUCLEI, **note)
    logger.info(
        "segment_nuclei: %d nuclei; wrote shapes[%r], tables[%r]%s%s",
        len(elements[names.table]),
        names.shapes,
        names.table,
        f", labels[{names.labels!r}]" if names.labels in elements else "",
        f" and obs{list(counts)} of table {spots.table.key!r}"
        if spots is not None
        else "; there is no table to count for",
    )
