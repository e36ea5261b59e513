"""`longspan render`: a recipe as what Kubernetes and Slurm start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .cluster.render.order import Order, Wanted

app = typer.Typer(
    no_args_is_help=True, help="Write what Kubernetes or Slurm starts; needs no cluster."
)

_Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting: stages.0.tokens=2M."),
]
_Cluster = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A cluster of clusters.yaml: storage, nodes, secrets."),
]
_Storage = Annotated[
    str | None, typer.Option(metavar="DIR", help="The folder that all nodes share.")
]
_Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes.  [default: the cluster's]")]
_Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs of each.  [default: the cluster's]")]
_Cores = Annotated[
    int | None, typer.Option(min=1, help="CPU cores of each.  [default: the cluster's]")
]
_RunId = Annotated[str | None, typer.Option(metavar="ID", help="The run's id.  [default: new]")]
_Out = Annotated[Path | None, typer.Option(metavar="FILE", help="[default: standard output]")]


@app.command()
def k8s(
    recipe: _Recipe,
    changes: _Set = None,
    cluster: _Cluster = None,
    storage: _Storage = None,
    nodes: _Nodes = None,
    gpus: _Gpus = None,
    cores: _Cores = None,
    run_id: _RunId = None,
    image: Annotated[
        str | None, typer.Option(help="With longspan and Ray.  [default: longspan:VERSION]")
    ] = None,
    claim: Annotated[
        str, typer.Option(metavar="NAME", help="The PersistentVolumeClaim of the storage.")
    ] = "longspan",
    out: _Out = None,
) -> None:
    """Write a KubeRay RayJob."""
    from .cluster.render.k8s import default_image, render_k8s
    from .cluster.render.order import Wanted

    wanted = Wanted(recipe, changes or (), cluster, storage, nodes, gpus, cores, run_id)
    _write(wanted, lambda order: render_k8s(order, image or default_image(), claim), out)
    if image is None:
        note = f"note: the manifest names image {default_image()}, which you have to build and push"
        typer.echo(f"{note}; --image names another one", err=True)


@app.command()
def slurm(
    recipe: _Recipe,
    changes: _Set = None,
    cluster: _Cluster = None,
    storage: _Storage = None,
    nodes: _Nodes = None,
    gpus: _Gpus = None,
    cores: _Cores = None,
    run_id: _RunId = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="torchrun: it ends with the first rank that fails.")
    ] = False,
    out: _Out = None,
) -> None:
    """Write a Slurm script."""
    from .cluster.render.order import Wanted
    from .cluster.render.slurm import render_slurm

    wanted = Wanted(recipe, changes or (), cluster, storage, nodes, gpus, cores, run_id)
    _write(wanted, lambda order: render_slurm(order, ray=not no_ray), out)


def _write(wanted: Wanted, render: Callable[[Order], str], out: Path | None) -> None:
    """Render what is wanted, and write it."""
    from .cluster.render.order import take
    from .errors import RunError

    order = take(wanted)
    for warning in order.warnings:
        typer.echo(f"warning: {warning}", err=True)
    text = render(order)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        what = f"{out} cannot be written: {error.strerror or error}"
        raise RunError(what, "give another --out") from error
    typer.echo(f"{out}: run {order.run_id}", err=True)
