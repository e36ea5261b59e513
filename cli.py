"""The command line: each verb calls one function below."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__, cli_checkpoint, cli_cluster, cli_render
from .errors import LongspanError
from .redact import redact_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .trainer.convert.verbs import Report

app = typer.Typer(
    name="longspan",
    help="Stretch a language model to a longer context: verified, resumable, one command.",
    epilog="Start with: longspan train quickstart  (no GPU, no download, about 5 minutes)",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_cluster.app)
app.add_typer(cli_checkpoint.app, name="checkpoint")
app.add_typer(cli_render.app, name="render")

_RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
]
_SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting: stages.0.tokens=2M."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


@app.command()
def train(
    recipe: _RecipeArgument,
    changes: _SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's folder.  [default: ./runs/<name of the recipe>]")
    ] = None,
) -> None:
    """Train a recipe on this machine."""
    from .cluster.local import recorded
    from .recipes.check import check_recipe
    from .recipes.loading import load_recipe
    from .trainer.launch import train as train_run

    loaded = load_recipe(recipe, changes or ())
    checked = check_recipe(loaded)
    if os.environ.get("RANK", "0") == "0":
        for warning in checked.warnings:
            typer.echo(f"warning: {warning}", err=True)
    directory = run_dir or Path("runs") / loaded.name
    with recorded(loaded.name, directory):
        code = train_run(loaded.run(), loaded.name, directory)
    raise typer.Exit(code)


@app.command()
def resume(
    run: cli_cluster.RunArgument,
    exactness: Annotated[
        str | None,
        typer.Option(
            metavar="E2|E1|E0",
            help="Let this resume fall to E1 (other layout or machine) or E0 (other data too).",
        ),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(
            "--from", metavar="STEP", help="Go on from this checkpoint; newer ones are set aside."
        ),
    ] = None,
    insecure: cli_cluster.InsecureOption = False,
) -> None:
    """Go on with a run from its newest checkpoint, or an older one."""
    raise typer.Exit(cli_cluster.go_on(run, exactness, from_step, insecure))


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run's id, the beginning of one, or its folder.  [default: list all]",
        ),
    ] = None,
    as_json: cli_cluster.JsonOption = False,
) -> None:
    """Show where a run is and where its time went."""
    cli_cluster.show(run, as_json)


@app.command()
def check(recipe: _RecipeArgument, changes: _SetOption = None) -> None:
    """Show what a recipe will run, or what is wrong with it."""
    from .recipes.check import check_recipe
    from .recipes.loading import load_recipe
    from .recipes.outline import outline

    _print(outline(check_recipe(load_recipe(recipe, changes or ()))))


@app.command()
def recipes() -> None:
    """List the recipes that come with longspan."""
    from .recipes.loading import load_recipe, shipped_recipes

    loaded = [load_recipe(name) for name in shipped_recipes()]
    width = max(len(recipe.name) for recipe in loaded)
    for recipe in loaded:
        typer.echo(f"{recipe.name:<{width}}  {recipe.summary}")


@app.command()
def mechanisms() -> None:
    """Compare the attention mechanisms that a stage can have."""
    from .attention.catalogue import catalogue

    _print(catalogue())


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    import json

    from .recipes.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Show what this machine offers and what is missing."""
    from .cluster.doctor import rows
    from .trainer.doctor import diagnose

    _print(diagnose(("Cluster", rows)))


_VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Compare the logits with transformers, position by position."),
]
_TextOption = Annotated[
    Path | None, typer.Option("--text", help="With --verify: compare on this text file.")
]
_DtypeOption = Annotated[
    str | None, typer.Option(metavar="bf16|fp32", help="Dtype of the weights.  [default: as found]")
]


@app.command("import")
def import_(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="The folder of a Hugging Face checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    dtype: _DtypeOption = None,
    verify: _VerifyOption = False,
    text: _TextOption = None,
) -> None:
    """Make a Hugging Face checkpoint ready to start runs from."""
    from .trainer.convert.verbs import import_model

    _show(import_model(hf_dir, out, dtype=dtype, verify=verify, text=text))


@app.command()
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run's id, the beginning of one, or its folder, or a checkpoint's.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    dtype: _DtypeOption = None,
    verify: _VerifyOption = False,
    text: _TextOption = None,
) -> None:
    """Write a run's model as a Hugging Face checkpoint."""
    from .cluster.registry import run_folder
    from .trainer.convert.verbs import export_model

    _show(export_model(run_folder(what), out, dtype=dtype, verify=verify, text=text))


def _show(report: Report) -> None:
    """Print what was done; models that differ are a failure."""
    for line in report.lines:
        typer.echo(line)
    if not report.equal:
        raise typer.Exit(1)


def _print(what: RenderableType) -> None:
    from rich.console import Console

    # A pipe has no width, and what somebody wants to grep must not be folded.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(what)


def main() -> None:
    """Run the command line; a user's mistake ends with a message and its exit code."""
    try:
        app(prog_name="longspan")
    except LongspanError as error:
        typer.echo(f"error: {redact_text(str(error))}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
