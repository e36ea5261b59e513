"""Cluster settings: where a cluster is, what it has, and which secrets lie on its nodes."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ..settings import Settings
from ..trainer.flops import PEAKS, peak_flops

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTERFACE = re.compile(r"\^?=?[A-Za-z0-9_.:-]+(,[A-Za-z0-9_.:-]+)*")


def check_address(address: str) -> str:
    """The address of a dashboard, without a slash at its end.

    Raises:
        ValueError: It is something else; the text says what is expected.
    """
    expected = "the dashboard's address, such as http://127.0.0.1:8265"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.scheme == "ray" or port == 10001:
        raise ValueError(f"{expected} (ray:// is another door of the cluster)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(expected)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{expected}, and no credential in it: `token` names a file")
    return address.rstrip("/")


def check_absolute(path: str) -> str:
    """An absolute path of the nodes.

    Raises:
        ValueError: It is relative, or a URL.
    """
    if not PurePosixPath(path).is_absolute():
        raise ValueError("an absolute path, the same on all nodes")
    return path


def _check_token(path: str) -> str:
    if not path.startswith(("/", "~")):
        raise ValueError("the absolute path of a file that holds the token, not the token")
    return path


def _check_interface(pattern: str) -> str:
    if not _INTERFACE.fullmatch(pattern):
        raise ValueError("a name of letters and digits, or a pattern of NCCL's: eth, =eth0, ^lo")
    return pattern


def _check_gpu_name(name: str) -> str:
    if peak_flops(name) is None:
        raise ValueError(f"one of {', '.join(PEAKS)}, or left out")
    return name


def _check_secrets(secrets: dict[str, str]) -> dict[str, str]:
    for name, path in secrets.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"names of environment variables; {name!r} is none")
        if not PurePosixPath(path).is_absolute():
            raise ValueError(
                f"for {name} the absolute path of a file on the nodes, not the value itself"
            )
    return secrets


Address = Annotated[str, AfterValidator(check_address)]
NodePath = Annotated[str, AfterValidator(check_absolute)]


class NodeSettings(Settings):
    """The shape of a cluster's nodes. Left out: what the cluster says that it has."""

    count: int = Field(ge=1)
    """Nodes that can be had at the same time."""

    gpus: int = Field(default=0, ge=0)
    """GPUs of each node; 0 trains on CPUs."""

    gpu_name: Annotated[str, AfterValidator(_check_gpu_name)] | None = None
    """Their name, such as H100, for the expected hours; left out: as Ray says, if it does."""

    cores: int | None = Field(default=None, ge=1)
    """CPU cores of each node; on nodes without GPUs each rank takes one."""


class ClusterSettings(Settings):
    """One cluster."""

    address: Address
    """The address of its dashboard: `http://127.0.0.1:8265` through an SSH tunnel, or https."""

    storage: NodePath
    """A folder that all nodes see under this path; runs go to `runs/` in it."""

    nodes: NodeSettings | None = None
    """The shape of its nodes, for clusters that grow; left out: as it says itself."""

    secrets: Annotated[dict[str, str], AfterValidator(_check_secrets)] = Field(default_factory=dict)
    """Environment variables of the ranks, each with the file on the nodes that holds its value.
    Whatever they are called, their values are hidden in all that is written, if they have 8
    characters or more."""

    interface: Annotated[str, AfterValidator(_check_interface)] | None = None
    """The network interface between the nodes, or a pattern as of NCCL_SOCKET_IFNAME, of which
    gloo gets the interface that it stands for on each node; left out: the one with the node's
    address for gloo, and NCCL chooses."""

    token: Annotated[str, AfterValidator(_check_token)] | None = None
    """A file here with the cluster's token; left out: $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token."""
