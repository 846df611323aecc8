"""``hespotex encoders`` and ``doctor``: what there is."""

from __future__ import annotations

import typer

from ._app import app

__all__ = ["doctor", "encoders"]


@app.command()
def encoders() -> None:
    """List all encoders: size, resolution, licence, whether gated and cached, and what to install."""
    import pandas as pd

    from ..encoders import available

    table = available().drop(columns="summary", errors="ignore")
    with pd.option_context("display.max_colwidth", 40):
        typer.echo(table.to_string(na_rep=""))


@app.command()
def doctor() -> None:
    """Look at this installation: packages, device, disk, weights. Exit code 1 if something essential is broken."""
    from ._doctor import examine

    problems = []
    for finding in examine():
        typer.echo(finding.title)
        for line in finding.lines:
            typer.echo(f"  {line}")
        for problem in finding.problems:
            typer.echo(f"  PROBLEM: {problem}")
        problems += finding.problems
    typer.echo(f"{len(problems)} problems found" if problems else "No problem found")
    if problems:
        raise typer.Exit(1)
