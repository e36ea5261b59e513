"""The verbs for runs by their id, here and on clusters: each calls one function below."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id, the beginning of one, or its folder.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Use a cluster that asks nobody for a token.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Everything as JSON.")]


@app.command()
def submit(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|URL",
            help="A cluster of clusters.yaml, or a dashboard.  [default: the only one there]",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a setting: stages.0.tokens=2M."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The run's id; twice the same is one run.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With a URL: a folder that all nodes see, for runs."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, send nothing.")
    ] = False,
    insecure: InsecureOption = False,
) -> None:
    """Train a recipe on a cluster."""
    from .cluster.listing import show_run
    from .cluster.submission import Order, commands
    from .cluster.submission import submit as submit_run

    order = Order(
        recipe=recipe,
        changes=changes or (),
        cluster=cluster,
        storage=storage,
        run_id=run_id,
        dry_run=dry_run,
        insecure=insecure,
    )
    done = submit_run(order, typer.echo, _warn)
    if done.how == "dry":
        typer.echo("nothing was sent (--dry-run)")
    elif done.how == "known":
        typer.echo(f"{done.record.id} was submitted before; nothing was sent\n")
        typer.echo(show_run(done.record)[1])
    else:
        typer.echo("\n".join(["", f"submitted {done.record.id}", *commands(done.record.id)]))


@app.command()
def runs(
    everything: Annotated[
        bool, typer.Option("--all", help="Those whose folder is gone, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the runs that were started from here."""
    from .cluster.listing import list_runs
    from .cluster.registry import Registry

    values, text = list_runs(Registry().records(), everything=everything)
    typer.echo(json.dumps(values, indent=2) if as_json else text)


@app.command()
def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends; its exit code.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The log file of this rank.")
    ] = None,
) -> None:
    """Show what a run has said."""
    import sys

    from .cluster.output import quiet_pipe, show_logs
    from .cluster.registry import find_run

    try:
        code = show_logs(find_run(run), sys.stdout, follow=follow, rank=rank)
        sys.stdout.flush()
    except BrokenPipeError:
        quiet_pipe()
        code = 0
    raise typer.Exit(code)


@app.command()
def stop(run: RunArgument) -> None:
    """Save a run and end it; `longspan resume` goes on with it."""
    from .cluster.registry import find_run
    from .cluster.stop import stop_run

    raise typer.Exit(stop_run(find_run(run), typer.echo))


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def show(run: str | None, as_json: bool) -> None:
    """Print one run, or list all."""
    from .cluster.listing import show_run
    from .cluster.registry import find_run

    if run is None:
        runs(as_json=as_json)
        return
    values, text = show_run(find_run(run))
    typer.echo(json.dumps(values, indent=2) if as_json else text)


def go_on(run: str, exactness: str | None, from_step: int | None, insecure: bool) -> int:
    """Resume a run where it was started: here or on its cluster; the exit code."""
    from .cluster.local import recorded
    from .cluster.registry import Record, find_run
    from .cluster.submission import commands, resubmit
    from .errors import RunError
    from .trainer.exactness import read_level
    from .trainer.launch import resume

    allowed = None if exactness is None else read_level(exactness, "--exactness")
    found = find_run(run)
    if isinstance(found, Record) and found.cluster is not None:
        how = {"exactness": allowed, "from_step": from_step, "insecure": insecure}
        record = resubmit(found, _warn, **how)
        lines = [f"submitted {record.submissions[-1].id}", *commands(record.id)]
        typer.echo("\n".join(lines))
        return 0
    if insecure:
        raise RunError("--insecure is for runs on clusters, and this one is here", "leave it out")
    directory = found.directory if isinstance(found, Record) else found
    name = directory.read_environment().get("recipe", directory.path.name)
    with recorded(str(name), directory.path):
        return resume(directory.path, exactness=allowed, from_step=from_step)
