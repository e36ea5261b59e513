"""Node secrets: what stands in files of a node, for the environment of the processes there."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from ..errors import RunError
from ..redact import HIDDEN_NAMES, SHORTEST, hidden_names


def take_secrets(secrets: Mapping[str, str], *, all_here: bool = True) -> dict[str, str]:
    """Put a cluster's secrets into the environment of this process, which redacts them from now on.

    Args:
        secrets: The paths of files, by the name of the variable that gets their content.
        all_here: Whether each has to be on this node; else those that are not are left out.

    Returns:
        The variables that were set: with them a child redacts the values as well, under any name.

    Raises:
        RunError: A file that has to be here cannot be read.
    """
    # What hid something before, in whoever started this process, hides it still.
    names = dict.fromkeys([*hidden_names(os.environ), *secrets])
    found = {HIDDEN_NAMES: ",".join(names)}
    for name, path in secrets.items():
        try:
            found[name] = _read(Path(path))
        except (OSError, ValueError) as error:
            if not all_here:
                continue
            why = getattr(error, "strerror", None) or str(error)
            raise RunError(
                f"the secret {name} cannot be read from {path} on {socket.gethostname()}: {why}",
                "put the file on every node, or leave it out of the cluster's secrets",
            ) from error
    os.environ.update(found)
    return found


def short_secrets(secrets: Mapping[str, str]) -> str:
    """A warning of those in this environment that are not hidden; empty where all are.

    They are words that text may have anyway.
    """
    short = [name for name in secrets if 0 < len(os.environ.get(name, "")) < SHORTEST]
    if not short:
        return ""
    names, verb = ", ".join(short), "is" if len(short) == 1 else "are"
    return (
        f"warning: {names} of the cluster's secrets {verb} not hidden: under {SHORTEST} characters"
    )


def _read(path: Path) -> str:
    text = path.read_text("utf-8").strip()
    if "\0" in text:
        raise ValueError("it is no text")
    return text
