"""``hespotex predict``: one slide into a store, or many into a folder."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataValueError
from ._app import BatchSize, Device, Mpp, Overwrite, Scheduler, Weights, Workers, app
from ._files import STORE_MARKS, check_apart, check_output, write_store
from ._screen import in_options, is_terminal, say, step

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
    mpp: Mpp = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    device: Device = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    retries: Annotated[int, typer.Option(min=0, help="Further tries on a slide whose failure may pass.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    log: Annotated[Path | None, typer.Option(help="File for a JSON line about each event; - for stderr.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict expression on slides; steps the model needs are run with the model's own parameters.

    Into a folder, the same command goes on after an interruption. Exit code 0: all slides are done; 3: some failed, which
    the table and manifest.parquet in the folder list.
    """
    if out.suffix == ".zarr":
        if len(slides) > 1:
            raise DataValueError(
                f"--out {out} is a store for one slide; name a folder for the results of {len(slides)}"
            )
        if scheduler is not None or workers is not None or log is not None or format is not Format.zarr:
            raise DataValueError(
                "--scheduler, --workers, --log and --format go with a folder as --out, not with a store"
            )
        check_apart(slides[0], out)
        check_output(out, STORE_MARKS, "zarr store", overwrite=overwrite)
        _check_model(model)
        options = {"weights": weights, "batch_size": batch_size, "device": device}
        _into_store(slides[0], model, out, mpp, options, quiet=quiet)
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
                weights=weights,
                batch_size=batch_size,
                device=device,
                retries=retries,
                overwrite=overwrite,
                progress_bar=is_terminal() and not quiet,
                log=_Report(log, quiet=quiet),
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
    slide: Path, model: Path, out: Path, mpp: float | None, options: dict[str, Any], *, quiet: bool
) -> None:
    """Slide and prediction in one store."""
    from .. import models, tl
    from ..io._open import open_slide

    fitted = models.load(model)
    sdata = open_slide(slide, mpp)
    with step(f"Predicting {slide.name}", quiet=quiet):
        tl.predict(sdata, fitted, mpp=mpp if slide.is_dir() else None, progress_bar=False, **options)
    with step(f"Writing {out}", quiet=quiet):
        write_store(sdata, out)
    if not quiet:
        typer.echo(str(out))


class _Report:
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
