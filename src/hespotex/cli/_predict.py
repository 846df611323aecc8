"""``hespotex predict``: one slide into a store, or many into a folder."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataValueError
from ._app import (
    BatchSize,
    Device,
    ImageKey,
    Log,
    Mpp,
    Overwrite,
    Quiet,
    Scheduler,
    ShapesKey,
    TableKey,
    Weights,
    Workers,
    app,
)
from ._files import STORE_MARKS, check_apart, check_output, write_store
from ._report import Report, reported
from ._screen import in_options, is_terminal, say

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["predict"]

SOME_FAILED = 3  # exit code


class Format(StrEnum):
    """Of the results in a folder."""

    zarr = "zarr"
    h5ad = "h5ad"


@app.command()
def predict(
    slides: Annotated[
        list[Path], typer.Argument(help="Slide and image files, SpatialData stores (.zarr), folders of them.")
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder of a saved model.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for a result per slide; or, for one slide, a store (.zarr) with it."),
    ],
    *,
    format: Annotated[Format, typer.Option(help="Of the results in a folder.")] = Format.zarr,
    table_key: TableKey = None,
    shapes_key: ShapesKey = None,
    image_key: ImageKey = None,
    mpp: Mpp = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    device: Device = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    retries: Annotated[int, typer.Option(min=0, help="Further tries on a slide whose failure may pass.")] = 1,
    quiet: Quiet = False,
    log: Log = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict expression on slides; steps the model needs are run with the model's own parameters.

    Into a folder, the same command goes on after an interruption. Exit code 0: all slides are done; 3: some failed, which
    the table and manifest.parquet in the folder list.
    """
    options: dict[str, Any] = {
        "table_key": table_key,
        "shapes_key": shapes_key,
        "image_key": image_key,
        "weights": weights,
        "batch_size": batch_size,
        "device": device,
    }
    out = out.expanduser()
    if out.suffix == ".zarr":
        if len(slides) > 1:
            raise DataValueError(
                f"--out {out} is a store for one slide; name a folder for the results of {len(slides)}"
            )
        if scheduler is not None or workers is not None or format is not Format.zarr:
            raise DataValueError("--scheduler, --workers and --format go with a folder as --out, not with a store")
        with reported("predict", log, quiet=quiet) as report:
            check_apart(slides[0], out)
            check_output(out, STORE_MARKS, "zarr store", overwrite=overwrite)
            _check_model(model)
            _into_store(slides[0], model, out, mpp, options, report)
        return
    _check_model(model)
    from .. import tl
    from ._cluster import cluster

    try:
        with cluster(scheduler, workers) as client:
            cohort = tl.predict_cohort(
                slides,
                model,
                out,
                client=client,
                format=format.value,
                mpp=mpp,
                retries=retries,
                overwrite=overwrite,
                progress_bar=is_terminal() and not quiet,
                log=_CohortReport(log, quiet=quiet),
                **options,
            )
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        raise
    failed = cohort[cohort["status"] != "done"]
    if not quiet:
        typer.echo(_summary(cohort))
        typer.echo(f"{out}: {len(cohort) - len(failed)} of {len(cohort)} slides, listed in {out / 'manifest.parquet'}")
    if len(failed):
        raise typer.Exit(SOME_FAILED)


def _check_model(model: Path) -> None:
    if not model.exists():
        raise DataValueError(f"--model {model} does not exist; hespotex train ... --out {model} makes one")


def _into_store(
    slide: Path, model: Path, out: Path, mpp: float | None, options: dict[str, Any], report: Report
) -> None:
    """Slide and prediction in one store."""
    from .. import models, tl
    from ..io._open import has_elements, open_slide

    fitted = models.load(model)
    sdata = open_slide(slide, mpp)
    with report.step(f"Predicting {slide.name}", "predict", slide=str(slide)):
        tl.predict(sdata, fitted, mpp=mpp if has_elements(slide) else None, progress_bar=False, **options)
    with report.step(f"Writing {out}", "write", output=str(out)):
        write_store(sdata, out)
    report.result(str(out))


class _CohortReport:
    """A line on stderr for each slide, and the JSON log, if one is wanted."""

    def __init__(self, log: Path | None, *, quiet: bool) -> None:
        from ..tl._cohort.events import sink

        self._log = sink(log)
        self._quiet = quiet
        self._lines = log is None or str(log) != "-"

    def __call__(self, event: dict[str, Any]) -> None:
        self._log(event)
        if not self._lines:
            return
        line = _line(event)
        if line and (not self._quiet or event["event"] == "slide_failed"):
            from tqdm.auto import tqdm

            tqdm.write(line, file=sys.stderr)  # above the bars, where there are some


def _line(event: dict[str, Any]) -> str | None:
    """What a person wants to know of an event."""
    name = Path(event.get("slide", "")).name
    match event["event"]:
        case "slide_done":
            warned = "".join(f"\n  Warning: {in_options(text)}" for text in event["warnings"])
            return f"✓ {name} ({event['n_tiles']} tiles, {event['seconds']:.0f} s){warned}"
        case "slide_kept":
            return f"✓ {name} (there already)"
        case "slide_failed":
            return f"✗ {name}: {in_options(event['message'])}"
        case "slide_retried":
            return f"↻ {name}, once more after the others: {in_options(event['message'])}"
    return None


def _summary(cohort: pd.DataFrame) -> str:
    import pandas as pd

    failed = cohort[cohort["status"] != "done"]
    table = pd.DataFrame(
        {
            "slide": cohort["slide"].map(lambda path: Path(path).name),
            "status": cohort["status"],
            "tiles": cohort["n_tiles"],
            "seconds": cohort["seconds"].round(1),
            "error": cohort["error"],
        }
    )
    shown = table if len(table) <= 50 else table.loc[failed.index]  # of many slides, those to look at
    return shown.to_string(index=False) if len(shown) else "all slides are done"
