"""``hespotex demo``, ``train`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .._files import check_writable, replacing
from ..errors import DataValueError
from ._app import Encoder, Log, Overwrite, Quiet, Seed, Weights, app
from ._files import MODEL_MARKS, check_output
from ._report import reported
from ._screen import say, step

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ..models import Model

__all__ = ["demo", "evaluate", "train"]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, tables and maps.")] = Path("hespotex-demo"),
    *,
    seed: Seed = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller patients, for a first look.")] = False,
) -> None:
    """Train on synthetic patients, predict one that was held out and a slide that has only an image."""
    from .._demo import run_demo

    report = run_demo(out, seed=seed, quick=quick, step=step)
    say(f"\nRead [bold]{escape(str(report))}[/]")


@app.command()
def train(
    sections: Annotated[list[Path], typer.Argument(help="SpatialData stores (.zarr) with H&E and counts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the model to.")],
    *,
    model: Annotated[str, typer.Option(help="A name in hx.models.available().")] = "hespotex",
    preset: Annotated[str | None, typer.Option(help="Named settings of the model, such as 'paper'.")] = None,
    encoder: Encoder = "morphology",
    weights: Weights = None,
    n_top_genes: Annotated[int | None, typer.Option(help="Size of the gene panel.")] = None,
    devices: Annotated[str, typer.Option(help="Devices to train on, a number or 'auto' for all.")] = "1",
    num_nodes: Annotated[int, typer.Option(min=1, help="Machines; start the command on each with torchrun.")] = 1,
    seed: Seed = None,
    quiet: Quiet = False,
    log: Log = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model on sections that have image and expression, and save it. The stores are not changed."""
    from .. import models, tl
    from .._keys import Keys
    from ..io._open import open_slide

    with reported("train", log if _is_first() else None, quiet=quiet or not _is_first()) as report:
        unfitted = models.create(model, preset=preset)
        check_output(out, MODEL_MARKS, "saved model", overwrite=overwrite)
        resolved = [path.resolve() for path in sections]
        if twice := [str(path) for path, place in zip(sections, resolved, strict=True) if resolved.count(place) > 1]:
            raise DataValueError(f"the same section is given more than once: {', '.join(twice)}; name each once")
        data = []
        for path in sections:
            if path.is_file():
                raise DataValueError(
                    f"{path} is a file; training needs SpatialData stores (.zarr) with an image and counts"
                )
            with report.step(f"Preparing {path.name}", "prepare", slide=str(path)):
                sdata = open_slide(path)
                _prepare(sdata, unfitted, encoder, weights)
            data.append(sdata)
        with report.step(f"Training {model} on {len(data)} section{'s' if len(data) > 1 else ''}", "train"):
            fitted = tl.train(
                data,
                unfitted,
                embedding_key=Keys.embedding(encoder),
                n_top_genes=n_top_genes,
                devices=_devices(devices),
                num_nodes=num_nodes,
                seed=seed,
                progress_bar=False,
            )
        if _is_first():
            fitted.save(out, overwrite=overwrite)
            report.result(f"{out}: {len(fitted.genes)} genes")


@app.command()
def evaluate(
    slide: Annotated[Path, typer.Argument(help="SpatialData store (.zarr) with a prediction and counts.")],
    *,
    key: Annotated[str | None, typer.Option(help="Key of the prediction; the only one by default.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV to write the scores of all genes to.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Score a stored prediction against the measured counts, beside null models and the noise ceiling."""
    from .. import tl
    from .._demo import summarise
    from ..io._open import open_slide

    with reported("evaluate", log, quiet=quiet) as report:
        if out is not None:
            if out.suffix != ".csv" or out.is_dir():
                raise DataValueError(f"--out {out}: scores are written as CSV; name a file that ends in .csv")
            if out.exists() and not overwrite:
                raise DataValueError(f"--out {out} exists; add --overwrite to replace it")
            check_writable(out, f"--out {out}")
            out.parent.mkdir(parents=True, exist_ok=True)
        with report.step(f"Scoring {slide.name}", "evaluate", slide=str(slide)):
            scores = tl.evaluate(open_slide(slide), key, copy=True)
        assert scores is not None  # copy=True
        if out is not None:
            with replacing(out) as part:
                scores.to_csv(part, index=False)
        report.result(summarise(scores).round(3).to_string())


def _prepare(sdata: SpatialData, model: Model, encoder: str, weights: Path | None) -> None:
    """Run the ``pp`` steps that training needs and the section lacks."""
    from .. import pp
    from .._keys import Keys
    from ..data.tables import resolve_table

    table = resolve_table(sdata).adata
    if Keys.embedding(encoder) not in table.obsm:
        options: dict[str, Any] = {} if weights is None else {"weights": weights}
        pp.embed(sdata, encoder, progress_bar=False, **options)
    if "graph" in model.needs and Keys.CONNECTIVITIES not in table.obsp:
        pp.spatial_graph(sdata)
    if "nuclei" in model.needs and Keys.N_NUCLEI not in table.obs:
        pp.segment_nuclei(sdata, progress_bar=False)


def _devices(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise DataValueError(f"--devices {text} must be a number of at least 1, or 'auto'")
    return int(text)


def _is_first() -> bool:
    """Whether this process is the one that writes, where torchrun has started several."""
    import os

    return int(os.environ.get("RANK", "0")) == 0
