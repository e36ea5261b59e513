"""The verbs of `longspan checkpoint`: each calls one function below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_cluster import RunArgument

if TYPE_CHECKING:
    from .trainer.checkpoint.verbs import Report

app = typer.Typer(help="Look after a run's checkpoints.", no_args_is_help=True)


@app.command("ls")
def list_(run: RunArgument) -> None:
    """List a run's checkpoints, and what was left unfinished or set aside."""
    from .trainer.checkpoint.verbs import list_checkpoints

    _show(list_checkpoints(_folder(run)))


@app.command()
def verify(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="Only that of this step.", min=0)] = None,
) -> None:
    """Read every byte and compare all hashes; exit code 1 if anything is damaged."""
    from .trainer.checkpoint.verbs import verify as verify_run

    _show(verify_run(_folder(run), step))


@app.command()
def show(
    run: RunArgument,
    step: Annotated[
        int | None, typer.Argument(metavar="[STEP]", min=0, help="Or the newest.")
    ] = None,
    norms: Annotated[bool, typer.Option("--norms", help="The norms of all parameters.")] = False,
) -> None:
    """Show what a checkpoint says of itself, and its parameters."""
    from .trainer.checkpoint.contents import show as show_checkpoint

    for line in show_checkpoint(_folder(run), step, norms=norms):
        typer.echo(line)


@app.command()
def prune(
    run: RunArgument,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Only the newest N stay.  [default: as the recipe says]"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove checkpoints that need not stay, and unfinished attempts."""
    from .trainer.checkpoint.verbs import prune as prune_run

    def agree(names: list[str]) -> bool:
        for name in names:
            typer.echo(name)
        return yes or typer.confirm(f"Remove {'these' if len(names) > 1 else 'this'}?")

    _show(prune_run(_folder(run), keep, agree))


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="RUN (its newest) or RUN@STEP.")],
    right: Annotated[
        str, typer.Argument(metavar="B", help="The same, or another STEP of A's run.")
    ],
    moments: Annotated[
        bool, typer.Option("--moments", help="Compare the optimizer's moments too.")
    ] = False,
) -> None:
    """Compare two checkpoints; exit code 1 if their parameters differ."""
    from .trainer.checkpoint.comparison import compare

    _show(compare(left, right, moments=moments, folder=_folder))


def _folder(run: str) -> Path:
    from .cluster.registry import run_folder

    return run_folder(run)


def _show(report: Report) -> None:
    for line in report.lines:
        typer.echo(line)
    if not report.good:
        raise typer.Exit(1)
