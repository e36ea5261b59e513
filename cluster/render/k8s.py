"""K8s: a run as a RayJob, which KubeRay starts a Ray cluster for and ends it afterwards."""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from ... import __version__
from ..command import ENDING_S, driver_command, job_variables
from ..jobs import RUN_KEY
from .order import Order, label

RAY_VERSION = "2.52.0"
"""The oldest with tokens; KubeRay refuses them for less, and the image may have a newer one."""

_MOUNT = "/etc/longspan"
_RECIPE = "recipe.yaml"
_HEAD_CORES, _HEAD_MEMORY = "2", "8Gi"
_KEPT_S = 600
_NEW_CLUSTERS = 2
"""A lost driver is worth that; KubeRay cannot tell it from a user's mistake, which is not more."""

_SECRET = "longspan"

HEADER = """\
# {run_id}: a run of {name} as a RayJob. However often it is started, it is one run.
#
# It needs KubeRay 1.5.1 or newer, which makes the cluster's token itself (authOptions), and
#   a volume that all nodes can write:   PersistentVolumeClaim {claim}
#   an image with python, ray and longspan {version}:   {image}
{secrets}#
#   kubectl apply -f FILE
#   kubectl logs -f job/{job}
#
# Once it has ended, apply does nothing. From its newest checkpoint it goes on with
#   kubectl replace --force -f FILE
# and where its driver fails, KubeRay does so itself on a new cluster, {clusters} times at most.
"""


def default_image() -> str:
    """The image where none was given."""
    return f"longspan:{__version__}"


def job_name(run_id: str) -> str:
    """A run's id as KubeRay takes it; where that changes it, a name that no other run has."""
    plain = label(run_id)
    # It names services as well, and those begin with a letter.
    first = "" if plain[0].isalpha() else "run-"
    if first + plain == run_id:
        return plain
    short = label(first + run_id, 33)
    return f"{short}-{hashlib.sha256(run_id.encode()).hexdigest()[:6]}"


def manifest(order: Order, image: str, claim: str) -> list[dict[str, Any]]:
    """The recipe as a ConfigMap, and the RayJob that runs it.

    Args:
        order: What is to run.
        image: That has longspan.
        claim: The PersistentVolumeClaim of the storage.
    """
    name = job_name(order.run_id)
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe"},
        "data": {_RECIPE: order.text},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "longspan"}},
        "spec": {
            "jobId": f"{order.run_id}-1",
            "entrypoint": _entrypoint(order),
            "metadata": {RUN_KEY: order.run_id},
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": job_variables(order.grace_s)}),
            "backoffLimit": _NEW_CLUSTERS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEPT_S,
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "headGroupSpec": _head(order, image, claim, name),
                "workerGroupSpecs": [_workers(order, image, claim)],
            },
        },
    }
    return [recipe, job]


def render_k8s(order: Order, image: str, claim: str) -> str:
    """The manifest as YAML, with what it needs said on top."""
    secrets = ""
    if order.secrets:
        keys = " ".join(f"--from-file={name}=FILE" for name in order.secrets)
        secrets = f"#   its secrets:   kubectl create secret generic {_SECRET} {keys}\n"
    head = HEADER.format(
        run_id=order.run_id,
        name=order.name,
        claim=claim,
        version=__version__,
        image=image,
        secrets=secrets,
        job=job_name(order.run_id),
        clusters=_NEW_CLUSTERS,
    )
    documents = manifest(order, image, claim)
    return head + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100) for document in documents
    )


def _entrypoint(order: Order) -> str:
    slots = min(order.gpus or order.node_cores, order.node_cores)  # none of them may be up yet
    return driver_command(
        "driver", order.run_id, order.run_dir, order.name,
        recipe=f"{_MOUNT}/{_RECIPE}",
        device="gpu" if order.gpus else "cpu", ranks=order.ranks, slots=slots,
        secrets=order.secrets, interface=order.interface,
    )  # fmt: skip


def _head(order: Order, image: str, claim: str, name: str) -> dict[str, Any]:
    """The driver's pod, which takes no rank."""
    resources = {"cpu": _HEAD_CORES, "memory": _HEAD_MEMORY}
    pod = _pod(order, "ray-head", image, claim, resources)
    container = pod["spec"]["containers"][0]
    container["volumeMounts"].append({"name": "recipe", "mountPath": _MOUNT, "readOnly": True})
    pod["spec"]["volumes"].append({"name": "recipe", "configMap": {"name": f"{name}-recipe"}})
    return {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": pod}


def _workers(order: Order, image: str, claim: str) -> dict[str, Any]:
    resources = {"cpu": str(order.node_cores)}
    if order.gpus:
        resources["nvidia.com/gpu"] = str(order.gpus)
    return {
        "groupName": "ranks",
        "replicas": order.nodes,
        "minReplicas": order.nodes,
        "maxReplicas": order.nodes,
        "rayStartParams": {},
        "template": _pod(order, "ray-worker", image, claim, resources),
    }


def _pod(
    order: Order, container: str, image: str, claim: str, resources: dict[str, str]
) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"name": "storage", "mountPath": order.storage},
        # NCCL and Ray share memory there, and a container's own is 64 MiB.
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    for name, path in order.secrets.items():
        mount = {"name": "secrets", "mountPath": path, "subPath": name, "readOnly": True}
        mounts.append(mount)
    if order.secrets:
        volumes.append({"name": "secrets", "secret": {"secretName": _SECRET}})
    return {
        "spec": {
            "terminationGracePeriodSeconds": order.grace_s + ENDING_S,
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
                    "resources": {"requests": dict(resources), "limits": dict(resources)},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }
    }


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, and no references between equal parts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
