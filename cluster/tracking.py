"""Tracking: what becomes of a run's metrics on a cluster, as far as that is known from here."""

from __future__ import annotations

from collections.abc import Mapping

from ..trainer.observe.wandb_account import KEY, resolve_mode
from ..trainer.settings import TrackingSettings


def tracking_words(tracking: TrackingSettings, secrets: Mapping[str, str]) -> str:
    """Where metrics will go.

    Args:
        tracking: Of the recipe.
        secrets: Of the cluster: files on its nodes, by the name of the variable.
    """
    there = f"Weights & Biases, project {tracking.project}"
    if tracking.wandb == "offline":
        words = [f"{there}, offline: `wandb sync` uploads it from the run's folder"]
    elif tracking.wandb == "off":
        words = []
    elif KEY in secrets:
        words = [f"{there}, with the key in {secrets[KEY]} on its nodes"]
    elif tracking.wandb == "online":
        words = [f"{there}, with a key of its nodes' own"]
    else:
        words = ["Weights & Biases only if its nodes have a key of their own"]
    if tracking.tensorboard:
        words.append("TensorBoard files in the run's folder")
    return " and ".join(words) or "none"


def tracking_warnings(
    tracking: TrackingSettings, secrets: Mapping[str, str], cluster: str
) -> list[str]:
    """What a user may expect of Weights & Biases, and will perhaps not get.

    Args:
        tracking: Of the recipe.
        secrets: Of the cluster.
        cluster: Its name.
    """
    if tracking.wandb in ("off", "offline") or KEY in secrets:
        return []
    mode = resolve_mode(tracking)
    if tracking.wandb == "auto" and mode == "offline":
        what = "tracking: WANDB_MODE=offline holds on this machine, not on the nodes"
        return [f"{what}; set tracking.wandb: offline"]
    if tracking.wandb == "auto" and mode == "off":
        return []
    without = "the run will not start" if tracking.wandb == "online" else "nothing is tracked"
    return [
        f"tracking: cluster {cluster} has no Weights & Biases key among its secrets; unless its "
        f"nodes have one of their own (environment, ~/.netrc), {without}: name a file on the "
        f"nodes that holds it as {KEY} in `secrets` of {cluster} in clusters.yaml"
    ]
