"""The program itself, and the options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from ._screen import name_options

__all__ = [
    "BatchSize",
    "Device",
    "Encoder",
    "ImageKey",
    "Log",
    "Mpp",
    "Overwrite",
    "Quiet",
    "Scheduler",
    "Seed",
    "ShapesKey",
    "TableKey",
    "Weights",
    "Workers",
    "app",
]

app = typer.Typer(
    name="hespotex",
    help="Predict spatial gene expression from H&E histology.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BatchSize = Annotated[int | None, typer.Option(min=1, help="Tiles embedded at a time.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:<n> or mps.")]
Encoder = Annotated[str, typer.Option(help="Image encoder, a name that 'hespotex encoders' lists.")]
ImageKey = Annotated[str | None, typer.Option(help="Image of a store; the only one by default.")]
Log = Annotated[Path | None, typer.Option(help="File for a JSON line about each event; - for stderr.")]
Mpp = Annotated[float | None, typer.Option(help="µm per pixel, where the file does not say.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output path.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a dask scheduler, such as tcp://host:8786.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random; HESPOTEX_SEED or 0 by default.")]
ShapesKey = Annotated[str | None, typer.Option(help="Shapes of a store to predict for; the only ones by default.")]
TableKey = Annotated[str | None, typer.Option(help="Table of a store to predict for; the only one by default.")]
Weights = Annotated[Path | None, typer.Option(help="Local weights file of the encoder, where it needs one.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes to start on this machine.")]


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Predict spatial gene expression from H&E histology."""
    del version
    command = context.command.commands[context.invoked_subcommand]  # type: ignore[attr-defined, index]  # of a group
    name_options(option.name for option in command.params if option.param_type_name == "option")
