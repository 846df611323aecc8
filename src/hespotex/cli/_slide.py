"""``hespotex embed`` and ``segment``: single steps on a slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._app import BatchSize, Device, Encoder, Log, Mpp, Overwrite, Quiet, Scheduler, Weights, Workers, app
from ._files import STORE_MARKS, check_apart, check_output, write_store
from ._report import Report, reported

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["embed", "segment"]

Slide = Annotated[Path, typer.Argument(help="SpatialData store (.zarr), or a slide or image file.")]
Store = Annotated[Path, typer.Option("--out", "-o", help="Store (.zarr) to write slide and result to.")]


@app.command()
def embed(
    slide: Slide,
    out: Store,
    *,
    encoder: Encoder = "morphology",
    mpp: Mpp = None,
    weights: Weights = None,
    pitch_um: Annotated[
        float | None, typer.Option(help="Distance of tiles on a slide without spots; side by side by default.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    quiet: Quiet = False,
    log: Log = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn the image around each spot into features; on a slide without spots, of tiles on its tissue."""
    from .. import pp
    from ..encoders import create
    from ._cluster import cluster

    with reported("embed", log, quiet=quiet) as report:
        check_apart(slide, out)
        check_output(out, STORE_MARKS, "zarr store", overwrite=overwrite)
        made = create(encoder, **({} if weights is None else {"weights": weights}))
        sdata = _open(slide, mpp)
        if not sdata.tables and not sdata.shapes:
            with report.step(f"Laying tiles on {slide.name}", "tiles", slide=str(slide)):
                pp.detect_tissue(sdata, progress_bar=False)
                pp.make_tiles(sdata, diameter_um=made.tile_um, pitch_um=made.tile_um if pitch_um is None else pitch_um)
        shown = report.step(f"Embedding {slide.name} with {encoder}", "embed", shows_bar=True, slide=str(slide))
        with cluster(scheduler, workers) as client, shown:
            pp.embed(sdata, made, batch_size=batch_size, device=device, client=client, progress_bar=report.has_bar)
        _write(sdata, out, report)


@app.command()
def segment(
    slide: Slide,
    out: Store,
    *,
    method: Annotated[str, typer.Option(help="How nuclei are found, such as 'watershed' or 'cellpose'.")] = "watershed",
    mpp: Mpp = None,
    weights: Annotated[Path | None, typer.Option(help="Weights file of the method, where it needs one.")] = None,
    raster: Annotated[bool, typer.Option(help="Write the label image, too.")] = True,
    device: Device = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    quiet: Quiet = False,
    log: Log = None,
    overwrite: Overwrite = False,
) -> None:
    """Outline and describe all nuclei of a slide."""
    from .. import pp
    from ._cluster import cluster

    with reported("segment", log, quiet=quiet) as report:
        check_apart(slide, out)
        check_output(out, STORE_MARKS, "zarr store", overwrite=overwrite)
        sdata = _open(slide, mpp)
        options: dict[str, Any] = {"raster": raster, "device": device, "model": weights}
        text = f"Finding nuclei on {slide.name} with {method}"
        shown = report.step(text, "segment", shows_bar=True, slide=str(slide))
        with cluster(scheduler, workers) as client, shown:
            pp.segment_nuclei(sdata, method, client=client, progress_bar=report.has_bar, **options)
        _write(sdata, out, report)


def _open(slide: Path, mpp: float | None) -> SpatialData:
    from ..io._open import open_slide

    sdata = open_slide(slide, mpp)
    if mpp is not None and slide.is_dir():
        from .. import pp

        pp.set_scale(sdata, mpp=mpp)
    return sdata


def _write(sdata: SpatialData, out: Path, report: Report) -> None:
    with report.step(f"Writing {out}", "write", output=str(out)):
        write_store(sdata, out)
    report.result(str(out))
