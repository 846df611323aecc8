"""The command line program: ``hespotex demo``, ``train``, ``predict``, ``evaluate``.

Imports nothing heavy until a command runs, so that ``hespotex --help`` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ._version import __version__
from .errors import DataValueError, HespotexError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["app", "main"]

app = typer.Typer(
    name="hespotex",
    help="Predict spatial gene expression from H&E histology.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_screen = Console(stderr=True, highlight=False)

Encoder = Annotated[str, typer.Option(help="Image encoder, a name in hx.encoders.available().")]
Mpp = Annotated[float | None, typer.Option(help="µm per pixel, where the file does not say.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output path.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def main() -> None:
    """Run the program; what went wrong becomes one sentence and an exit code."""
    try:
        app()
    except HespotexError as error:
        _screen.print(f"[bold red]Error:[/] {_escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        _screen.print("interrupted")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _step(text: str) -> Iterator[None]:
    """Show what is being done, then that it is done and how long it took."""
    start = perf_counter()
    with _screen.status(f"{_escape(text)} …"):
        yield
    _screen.print(f"[green]✓[/] {_escape(text)} [dim]({perf_counter() - start:.0f} s)[/]")


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Predict spatial gene expression from H&E histology."""
    del version


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, tables and maps.")] = Path("hespotex-demo"),
    *,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller patients, for a first look.")] = False,
) -> None:
    """Train on synthetic patients, predict one that was held out and a slide that has only an image."""
    from ._demo import run_demo

    report = run_demo(out, seed=seed, quick=quick, step=_step)
    _screen.print(f"\nRead [bold]{report}[/]")


@app.command()
def train(
    sections: Annotated[list[Path], typer.Argument(help="SpatialData stores (.zarr) with H&E and counts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the model to.")],
    *,
    model: Annotated[str, typer.Option(help="A name in hx.models.available().")] = "hespotex",
    preset: Annotated[str | None, typer.Option(help="Named settings of the model, such as 'paper'.")] = None,
    encoder: Encoder = "morphology",
    n_top_genes: Annotated[int | None, typer.Option(help="Size of the gene panel.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a model on sections that have image and expression, and save it. The stores are not changed."""
    from . import models, tl

    unfitted = models.create(model, preset=preset)
    if out.exists() and not overwrite:
        raise DataValueError(f"--out {out} exists; add --overwrite to replace it")
    data = []
    for path in sections:
        with _step(f"Preparing {path.name}"):
            sdata = _read(path)
            _prepare(sdata, unfitted.info.needs, encoder)
        data.append(sdata)
    with _step(f"Training {model} on {len(data)} sections"):
        fitted = tl.train(data, unfitted, n_top_genes=n_top_genes, seed=seed, progress_bar=False)
    fitted.save(out, overwrite=overwrite)
    typer.echo(f"{out}: {len(fitted.genes)} genes")


@app.command()
def predict(
    slide: Annotated[Path, typer.Argument(help="SpatialData store (.zarr), or a TIFF, JPEG or PNG image.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder of a saved model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Store (.zarr) to write slide and prediction to.")],
    *,
    mpp: Mpp = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict expression on a slide; steps the model needs are run with the model's own parameters."""
    from . import tl

    if out.resolve() == slide.resolve():
        raise DataValueError("--out is the slide itself; the prediction goes to a store of its own")
    if out.exists() and not overwrite:
        raise DataValueError(f"--out {out} exists; add --overwrite to replace it")
    sdata = _read(slide, mpp=mpp)
    with _step(f"Predicting {slide.name}"):
        tl.predict(sdata, model, mpp=mpp if slide.suffix == ".zarr" else None, progress_bar=False)
    with _step(f"Writing {out}"):
        sdata.write(out, overwrite=overwrite)
    typer.echo(str(out))


@app.command()
def evaluate(
    slide: Annotated[Path, typer.Argument(help="SpatialData store (.zarr) with a prediction and counts.")],
    *,
    key: Annotated[str | None, typer.Option(help="Key of the prediction; the only one by default.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV to write the scores to.")] = None,
) -> None:
    """Score a stored prediction against the measured counts, gene by gene."""
    from . import tl

    with _step(f"Scoring {slide.name}"):
        scores = tl.evaluate(_read(slide), key, copy=True)
    if out is not None:
        scores.to_csv(out, index=False)
    summary = scores[["pearson", "rmse"]].describe().loc[["mean", "50%"]].rename(index={"50%": "median"})
    typer.echo(summary.round(3).to_string())


def _read(path: Path, *, mpp: float | None = None) -> SpatialData:
    """A SpatialData from a store, or from an image file."""
    if not path.exists():
        raise DataValueError(f"{path} does not exist")
    if path.suffix == ".zarr" or path.is_dir():
        import spatialdata

        return spatialdata.read_zarr(path)
    from . import io

    return io.read_image(path, mpp=mpp)


def _prepare(sdata: SpatialData, needs: tuple[str, ...], encoder: str) -> None:
    """Run the ``pp`` steps that training needs and the section lacks."""
    from . import pp
    from ._keys import Keys
    from .data.tables import resolve_table

    options: dict[str, Any] = {"progress_bar": False}
    table = resolve_table(sdata).adata
    if Keys.embedding(encoder) not in table.obsm:
        pp.embed(sdata, encoder, **options)
    if "graph" in needs and Keys.CONNECTIVITIES not in table.obsp:
        pp.spatial_graph(sdata)
    if "nuclei" in needs and Keys.N_NUCLEI not in table.obs:
        pp.segment_nuclei(sdata, **options)
