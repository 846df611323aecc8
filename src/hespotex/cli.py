"""The command line program: ``hespotex demo``, ``train``, ``predict``, ``evaluate``.

Imports nothing heavy until a command runs, so that ``hespotex --help`` is instant.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ._version import __version__
from .errors import DataValueError, HespotexError, HespotexWarning

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .models import Model

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

# Arguments that messages of the library name and that are options here.
_OPTIONS = ("encoder", "key", "model", "mpp", "n_top_genes", "preset", "seed", "weights")
_STORE_MARKS = ("zarr.json", ".zgroup")  # of any zarr store
_MODEL_MARKS = ("manifest.json",)  # of a saved model

Encoder = Annotated[str, typer.Option(help="Image encoder, a name in hx.encoders.available().")]
Mpp = Annotated[float | None, typer.Option(help="µm per pixel, where the file does not say.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output path.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random; HESPOTEX_SEED or 0 by default.")]
Weights = Annotated[Path | None, typer.Option(help="Local weights file of the encoder, where it needs one.")]


def main() -> None:
    """Run the program; an error becomes one sentence and an exit code."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # takes the rest as *_
    try:
        app()
    except (HespotexError, OSError) as error:
        _say(f"[bold red]Error:[/] {escape(_in_options(str(error)))}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning about the user's data as one line; those of the libraries underneath are not for the user."""
    if issubclass(category, HespotexWarning):
        _say(f"[yellow]Warning:[/] {escape(_in_options(str(message)))}")


def _say(text: str) -> None:
    _screen.print(text, soft_wrap=True)  # a pipe or a log gets whole lines


def _in_options(text: str) -> str:
    """A message of the library with its arguments named as the options of this program."""
    text = text.replace("overwrite=True", "--overwrite")
    calls = re.findall(r"\bhx\.[\w.]+\([^)]*\)", text)  # Python is left as it is
    for number, call in enumerate(calls):
        text = text.replace(call, f"\0{number}\0")
    for name in _OPTIONS:
        option = "--" + name.replace("_", "-")
        text = re.sub(rf"\b{name}=(?=['\"\w])", f"{option} ", text)  # with a value
        text = re.sub(rf"\b{name}=", option, text)
    for number, call in enumerate(calls):
        text = text.replace(f"\0{number}\0", call)
    return text


@contextmanager
def _step(text: str) -> Iterator[None]:
    """Show what is being done, then that it is done and how long it took."""
    start = perf_counter()
    with _screen.status(f"{escape(text)} …"):
        yield
    _say(f"[green]✓[/] {escape(text)} [dim]({perf_counter() - start:.0f} s)[/]")


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
    seed: Seed = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller patients, for a first look.")] = False,
) -> None:
    """Train on synthetic patients, predict one that was held out and a slide that has only an image."""
    from ._demo import run_demo

    report = run_demo(out, seed=seed, quick=quick, step=_step)
    _say(f"\nRead [bold]{escape(str(report))}[/]")


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
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model on sections that have image and expression, and save it. The stores are not changed."""
    from . import models, tl
    from ._keys import Keys

    unfitted = models.create(model, preset=preset)
    _check_output(out, _MODEL_MARKS, "saved model", overwrite=overwrite)
    resolved = [path.resolve() for path in sections]
    if twice := [str(path) for path, place in zip(sections, resolved, strict=True) if resolved.count(place) > 1]:
        raise DataValueError(f"the same section is given more than once: {', '.join(twice)}; name each once")
    data = []
    for path in sections:
        if path.is_file():
            raise DataValueError(
                f"{path} is a file; training needs SpatialData stores (.zarr) with an image and counts"
            )
        with _step(f"Preparing {path.name}"):
            sdata = _read(path)
            _prepare(sdata, unfitted, encoder, weights)
        data.append(sdata)
    with _step(f"Training {model} on {len(data)} section{'s' if len(data) > 1 else ''}"):
        fitted = tl.train(
            data,
            unfitted,
            embedding_key=Keys.embedding(encoder),
            n_top_genes=n_top_genes,
            seed=seed,
            progress_bar=False,
        )
    fitted.save(out, overwrite=overwrite)
    typer.echo(f"{out}: {len(fitted.genes)} genes")


@app.command()
def predict(
    slide: Annotated[Path, typer.Argument(help="SpatialData store (.zarr), or a TIFF, JPEG or PNG image.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder of a saved model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Store (.zarr) to write slide and prediction to.")],
    *,
    mpp: Mpp = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict expression on a slide; steps the model needs are run with the model's own parameters."""
    from . import models, tl

    if out.resolve() == slide.resolve():
        raise DataValueError("--out is the slide itself; the prediction goes to a store of its own")
    _check_output(out, _STORE_MARKS, "zarr store", overwrite=overwrite)
    if not model.exists():
        raise DataValueError(f"--model {model} does not exist; hespotex train ... --out {model} makes one")
    fitted = models.load(model)
    sdata = _read(slide, mpp=mpp)
    with _step(f"Predicting {slide.name}"):
        tl.predict(sdata, fitted, mpp=mpp if slide.is_dir() else None, weights=weights, progress_bar=False)
    with _step(f"Writing {out}"):
        sdata.write(out, overwrite=overwrite)
    typer.echo(str(out))


@app.command()
def evaluate(
    slide: Annotated[Path, typer.Argument(help="SpatialData store (.zarr) with a prediction and counts.")],
    *,
    key: Annotated[str | None, typer.Option(help="Key of the prediction; the only one by default.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV to write the scores of all genes to.")] = None,
) -> None:
    """Score a stored prediction against the measured counts, beside null models and the noise ceiling."""
    from . import tl
    from ._demo import summarise

    if out is not None:
        if out.is_dir():
            raise DataValueError(f"--out {out} is a folder; name a CSV file")
        out.parent.mkdir(parents=True, exist_ok=True)
    with _step(f"Scoring {slide.name}"):
        scores = tl.evaluate(_read(slide), key, copy=True)
    assert scores is not None  # copy=True
    if out is not None:
        scores.to_csv(out, index=False)
    typer.echo(summarise(scores).round(3).to_string())


def _check_output(out: Path, marks: tuple[str, ...], kind: str, *, overwrite: bool) -> None:
    """Raise before the work if its result could not be written, and make the folder above it."""
    if out.exists() and not overwrite:
        raise DataValueError(f"--out {out} exists; add --overwrite to replace it")
    if out.exists() and not any((out / mark).is_file() for mark in marks):
        raise DataValueError(f"--out {out} exists and is no {kind}, so it is not replaced; name another place")
    out.parent.mkdir(parents=True, exist_ok=True)


def _read(path: Path, *, mpp: float | None = None) -> SpatialData:
    """A SpatialData from a store, or from an image file."""
    if not path.exists():
        raise DataValueError(f"{path} does not exist")
    if path.is_file():
        from . import io

        return io.read_image(path, mpp=mpp)
    import spatialdata

    remedy = "give a store that SpatialData.write made"
    try:
        sdata = spatialdata.read_zarr(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataValueError(f"{path} cannot be read as a SpatialData store ({error}); {remedy}") from error
    if not list(sdata.gen_elements()):
        raise DataValueError(f"{path} holds no image, shapes or table of SpatialData; {remedy}")
    return sdata


def _prepare(sdata: SpatialData, model: Model, encoder: str, weights: Path | None) -> None:
    """Run the ``pp`` steps that training needs and the section lacks."""
    from . import pp
    from ._keys import Keys
    from .data.tables import resolve_table

    table = resolve_table(sdata).adata
    if Keys.embedding(encoder) not in table.obsm:
        options: dict[str, Any] = {} if weights is None else {"weights": weights}
        pp.embed(sdata, encoder, progress_bar=False, **options)
    if "graph" in model.needs and Keys.CONNECTIVITIES not in table.obsp:
        pp.spatial_graph(sdata)
    if "nuclei" in model.needs and Keys.N_NUCLEI not in table.obs:
        pp.segment_nuclei(sdata, progress_bar=False)
