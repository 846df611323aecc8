"""Segment a slide block by block as if it were one image.

A block is read with its surroundings; of what is found, it keeps the nuclei whose centroid lies in its core, whole,
also where they reach beyond it. So nothing is cut at a seam, and nothing is found twice or not at all unless the backend
sees the same nucleus differently from two sides. Those are recognised by their overlap, and a block keeps what it finds
shortly beyond its core in case that the neighbour finds nothing there.

Blocks are worked on in runs, which are what travels to a cluster and what is kept in case of an interruption. Runs end
with a row of blocks, and a row is merged as soon as it is there: nothing grows with the slide but the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from .._settings import settings
from .._tasks import iter_tasks
from ..errors import DataTypeError, DataValueError, HespotexWarning
from ..image.stream import Block, block_corners, iter_blocks, working_grid
from ._merge import Found, Merger
from ._nuclei import Nuclei
from ._outline import SIMPLIFY_UM, measure_regions
from ._packed import PackedRegions
from .labels import check_numbers

if TYPE_CHECKING:
    from distributed import Client

    from ..data.geometry import Slide
    from ._kept import KeptRuns

__all__ = ["BLOCK_PX", "Backend", "iter_nuclei", "segment_slide"]

BLOCK_PX = 1024
_RUN_BLOCKS = 8  # some seconds of one thread
_SPARE = 8  # a part of the surroundings: centroids seen from two sides lie closer together than that

#: A function of a block that returns its label image, the surroundings included.
Backend = Callable[[Block], np.ndarray]


def segment_slide(
    slide: Slide,
    backend: Backend,
    *,
    mpp: float,
    halo_px: int,
    block_px: int = BLOCK_PX,
    n_jobs: int | None = None,
    client: Client | None = None,
    keep_names: bool = False,
    progress_bar: bool | None = None,
) -> Nuclei:
    """Find the nuclei of a slide; parameters are those of :func:`iter_nuclei`."""
    grid = working_grid(slide, mpp)
    rows = iter_nuclei(
        slide,
        backend,
        mpp=mpp,
        halo_px=halo_px,
        block_px=block_px,
        n_jobs=n_jobs,
        client=client,
        keep_names=keep_names,
        progress_bar=progress_bar,
    )
    return Nuclei.concatenate(list(rows), grid)


def iter_nuclei(
    slide: Slide,
    backend: Backend,
    *,
    mpp: float,
    halo_px: int,
    block_px: int = BLOCK_PX,
    n_jobs: int | None = None,
    client: Client | None = None,
    keep_names: bool = False,
    simplify_um: float = SIMPLIFY_UM,
    kept: KeptRuns | None = None,
    progress_bar: bool | None = None,
) -> Generator[Nuclei]:
    """Find the nuclei of a slide, one row of blocks after the other.

    Parameters
    ----------
    slide
        As :func:`hespotex.data.geometry.resolve_slide` gives it.
    backend
        Label image of a block; with `n_jobs` above 1 called in several threads, with `client` in other processes.
    mpp
        Working resolution in µm per pixel.
    halo_px
        Surroundings read with each block: at least the length of a nucleus.
    block_px
        Side of a block. It bounds memory and does not change the result.
    n_jobs
        Blocks worked on at a time; the setting by default.
    client
        A dask cluster to work on: there each run of blocks reads its own pixels. The result is the same.
    keep_names
        Whether labels mean the same in all blocks: they become the ids. Else ids are 1…n, along rows.
    simplify_um
        See :func:`~hespotex.segmentation._outline.measure_regions`.
    kept
        Results of an interrupted run, and where to keep those of this one.
    progress_bar
        The setting by default.

    Yields
    ------
    The nuclei of each row of blocks that has some, along rows of pixels.
    """
    if block_px < 1 or halo_px < 1:
        raise DataValueError(f"block_px={block_px!r} and halo_px={halo_px!r} must be positive")
    grid = working_grid(slide, mpp)
    runs = _runs(block_corners(grid, block_px))
    reading = {"mpp": mpp, "block_px": block_px, "halo_px": halo_px}
    measuring = {"backend": backend, "spare_px": 0 if keep_names else halo_px // _SPARE, "simplify_um": simplify_um}
    merger = Merger(block_px, halo_px, by_name=keep_names)
    results = _results(
        slide, runs, reading, measuring, n_jobs or settings.n_jobs, client, kept, progress_bar=progress_bar
    )
    found = cut = 0
    parts: list[Found] = []
    with closing(results):
        for number, (run, part) in enumerate(zip(runs, results, strict=True)):
            parts.append(part)
            cut += part.cut
            if number + 1 < len(runs) and runs[number + 1][0, 0] == run[0, 0]:
                continue  # the row of blocks goes on
            del part
            merged = merger.add(int(run[0, 0]) // block_px, parts)
            if len(merged):
                ids = merged.names if keep_names else np.arange(found + 1, found + len(merged) + 1)
                found += len(merged)
                yield Nuclei(ids=ids, regions=merged, grid=grid)
            del merged  # a row of a wide slide is tens of MB
    if not found and kept is not None:
        kept.forget()  # what follows is an error, but nothing was interrupted
    if merger.scattered:
        warnings.warn(
            f"{merger.scattered} pieces of the label image have the number of another nucleus that lies apart from them and are "
            "left out; give each nucleus a number of its own, as skimage.measure.label does",
            HespotexWarning,
            stacklevel=4,
        )
    if cut:
        warnings.warn(
            f"{cut} nuclei reach further than {halo_px} px ({halo_px * grid.mpp:.0f} µm) from their block and were cut; "
            f"raise diameter_um if nuclei are that large",
            HespotexWarning,
            stacklevel=4,
        )


def _runs(corners: np.ndarray) -> list[np.ndarray]:
    """Blocks that follow each other in a row, by their corners (y, x), up to 8 of them (n, 2)."""
    rows = np.split(corners, np.flatnonzero(np.diff(corners[:, 0])) + 1)
    return [part for row in rows for part in np.array_split(row, -(-len(row) // _RUN_BLOCKS))]


def _results(
    slide: Slide,
    runs: list[np.ndarray],
    reading: dict[str, float],
    measuring: dict[str, Any],
    n_jobs: int,
    client: Client | None,
    kept: KeptRuns | None,
    *,
    progress_bar: bool | None,
) -> Generator[Found]:
    """Regions of each run, in order: those kept, and those computed now."""
    from tqdm.auto import tqdm

    held = [kept is not None and kept.holds(number) for number in range(len(runs))]
    missing = [run for run, there in zip(runs, held, strict=True) if not there]
    if client is None:
        computed = _computed_here(slide, missing, reading, measuring, n_jobs)
    else:
        shared = {"slide": slide, "reading": reading, "measuring": measuring}
        computed = iter_tasks(_segment_run, missing, shared=shared, client=client)
    show = settings.progress_bar if progress_bar is None else progress_bar
    total = sum(map(len, runs))
    with closing(computed), tqdm(total=total, unit="block", desc="nuclei", disable=not show or total < 2) as bar:
        for number, run in enumerate(runs):
            part = kept.load(number) if kept is not None and held[number] else None
            if part is None and held[number]:  # somebody deleted it since
                part = _segment_run(run, slide=slide, reading=reading, measuring=measuring)
            elif part is None:
                part = next(computed)
                if kept is not None:
                    kept.save(number, part)
            yield part
            bar.update(len(run))


def _computed_here(
    slide: Slide, runs: list[np.ndarray], reading: dict[str, float], measuring: dict[str, Any], n_jobs: int
) -> Generator[Found]:
    """Regions of runs, computed in threads that one reader feeds."""
    blocks = _read(slide, list(_streams(runs)), reading)
    with closing(iter_tasks(_segment_block, blocks, shared=measuring, n_jobs=n_jobs)) as results:
        for run in runs:
            yield Found.join([next(results) for _ in run])


def _streams(runs: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Runs that are read together, by the corners of their blocks.

    Chunks of the image that two rows of blocks share are decoded once, but have to be held in between. On wide slides
    that is more memory than decoding them again is time: each run is read by itself there.
    """
    wide = any((run[0, 0] == after[0, 0]) for run, after in zip(runs, runs[1:], strict=False))
    if wide:
        yield from runs
    elif runs:
        yield np.concatenate(runs)


def _read(slide: Slide, corners: np.ndarray | list[np.ndarray], reading: dict[str, float]) -> Iterator[Block]:
    return iter_blocks(slide, corners=corners, progress_bar=False, **reading)  # type: ignore[arg-type]


def _segment_run(corners: np.ndarray, *, slide: Slide, reading: dict[str, float], measuring: dict[str, Any]) -> Found:
    """Regions of a run of blocks, whose pixels are read here."""
    return Found.join([_segment_block(block, **measuring) for block in _read(slide, corners, reading)])


def _segment_block(block: Block, *, backend: Backend, spare_px: int, simplify_um: float) -> Found:
    """Regions whose centroid lies in the core or at most `spare_px` beyond it, on the grid."""
    labels = np.asarray(backend(block))
    if labels.shape != block.pixels.shape[:2]:
        raise DataValueError(
            f"the segmenter returned labels of shape {labels.shape} for {block.pixels.shape[:2]} pixels"
        )
    if labels.dtype.kind not in "iu":
        raise DataTypeError(f"the segmenter returned {labels.dtype}; labels are whole numbers, 0 for background")
    labels = _on_grid(check_numbers(labels, "the segmenter's label image"), block)
    origin = (block.y - block.halo_px, block.x - block.halo_px)
    rows, columns = block.core
    near = (
        slice(rows.start - spare_px, rows.stop + spare_px),
        slice(columns.start - spare_px, columns.stop + spare_px),
    )
    regions = measure_regions(labels, block.pixels, block.grid.mpp, near, origin, simplify_um=simplify_um)
    rows, columns = block.place
    x, y = regions.centroids.T
    spare = (y < rows.start) | (y >= rows.stop) | (x < columns.start) | (x >= columns.stop)
    window = np.array([*origin, origin[0] + labels.shape[0], origin[1] + labels.shape[1]])
    cut = (regions.boxes == window).any(axis=1) & ~spare
    return Found(PackedRegions.pack(regions), spare, int(cut.sum()))


def _on_grid(labels: np.ndarray, block: Block) -> np.ndarray:
    """`labels` without what lies beyond the slide, where there is only filling."""
    height, width = block.grid.shape
    top, left = block.y - block.halo_px, block.x - block.halo_px
    rows, columns = slice(max(-top, 0), height - top), slice(max(-left, 0), width - left)
    inside = np.zeros(labels.shape, dtype=bool)
    inside[rows, columns] = True
    return labels if inside.all() else np.where(inside, labels, 0)
