"""``hespotex embed`` and ``segment``: single steps on a slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataValueError
from ._app import Device, Encoder, Log, Mpp, Overwrite, Quiet, Scheduler, Weights, Workers, app
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
    batch_size: Annotated[
        str | None, typer.Option(help="Tiles embedded at a time, or 'auto': what is fastest on the device.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network, for many thousand tiles.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Precision of the network, such as 'bfloat16'.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="How the network's tokens become features, such as 'class'.")
    ] = None,
    device: Device = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    quiet: Quiet = False,
    log: Log = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn the image around each spot into features; on a slide without spots, of tiles on its tissue."""
    from .. import pp
    from .._keys import Keys
    from ..encoders import create
    from ._cluster import cluster

    with reported("embed", log, quiet=quiet) as report:
        check_apart(slide, out)
        check_output(out, STORE_MARKS, "zarr store", overwrite=overwrite)
        tiles = _tiles_at_a_time(batch_size)
        given = {"weights": weights, "dtype": dtype, "pooling": pooling}
        made = create(encoder, **{name: value for name, value in given.items() if value is not None})
        if compile:
            made.compile()
        sdata = _open(slide, mpp)
        tissues = {Keys.TISSUE, Keys.TISSUE_LAZYSLIDE}
        if not sdata.tables and set(sdata.shapes) <= tissues:
            with report.step(f"Laying tiles on {slide.name}", "tiles", slide=str(slide)):
                if not sdata.shapes:
                    pp.detect_tissue(sdata, progress_bar=False)
                pp.make_tiles(sdata, diameter_um=made.tile_um, pitch_um=made.tile_um if pitch_um is None else pitch_um)
        shown = report.step(f"Embedding {slide.name} with {encoder}", "embed", shows_bar=True, slide=str(slide))
        with cluster(scheduler, workers) as client, shown:
            pp.embed(sdata, made, batch_size=tiles, device=device, client=client, progress_bar=report.has_bar)
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


def _tiles_at_a_time(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise DataValueError(f"--batch-size {text} must be a whole number of at least 1, or 'auto'")
    return int(text)


def _open(slide: Path, mpp: float | None) -> SpatialData:
    from ..io._open import has_elements, open_slide

    sdata = open_slide(slide, mpp)
    if mpp is not None and has_elements(slide):
        from .. import pp

        pp.set_scale(sdata, mpp=mpp)
    return sdata


def _write(sdata: SpatialData, out: Path, report: Report) -> None:
    with report.step(f"Writing {out}", "write", output=str(out)):
        write_store(sdata, out)
    report.result(str(out))
