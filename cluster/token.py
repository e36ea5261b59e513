"""Token: what a cluster asks for before it answers; found where Ray's own tools look."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ClusterError
from .clusters import Cluster

_DEFAULT = "~/.ray/auth_token"


@dataclass(frozen=True)
class Token:
    """A token, or that there is none.

    Attributes:
        value: Goes into one header and nowhere else.
        source: Where it was found, or where it was looked for.
    """

    value: str | None = field(repr=False)
    source: str


def read_token(cluster: Cluster) -> Token:
    """The token for a cluster: its own file, else the environment, else Ray's file.

    Raises:
        ClusterError: A file that was named cannot be read or holds no token.
    """
    if cluster.settings.token is not None:
        where = f"token of cluster {cluster.name} in clusters.yaml"
        return _from_file(Path(cluster.settings.token), where)
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return Token(_checked(value, "$RAY_AUTH_TOKEN"), "$RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _from_file(Path(path), "$RAY_AUTH_TOKEN_PATH")
    if Path(_DEFAULT).expanduser().is_file():
        return _from_file(Path(_DEFAULT), _DEFAULT)
    return Token(None, f"in $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or {_DEFAULT}")


def _from_file(path: Path, named_by: str) -> Token:
    path = path.expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # A token that was written in place of its file's path must not be shown.
        shown = path if path.is_absolute() and "/" in str(path)[1:] else "that file"
        reason = getattr(error, "strerror", None) or "it is not text"
        fix = "give the path of a file that you can read and that holds the token alone"
        raise ClusterError(f"{named_by}: {shown} cannot be read: {reason}", fix) from None
    return Token(_checked(text, str(path)), str(path))


def _checked(text: str, source: str) -> str:
    value = text.strip()
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        what = "is empty" if not value else "holds more than a token"
        raise ClusterError(f"{source} {what}", "`ray get-auth-token` shows the cluster's token")
    return value
