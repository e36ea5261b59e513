"""Child: a measurement in a process of its own, which may hang or crash without harm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...redact import redact_text


class ChildError(Exception):
    """A child ended without an answer; the text says why."""


def run_children(
    module: str, environments: Sequence[Mapping[str, str]], limit_s: float
) -> list[dict[str, Any]]:
    """Run a module of this folder once per environment, all at the same time.

    Args:
        module: Its name; it prints one JSON object as its last line.
        environments: What each process sees besides our environment.
        limit_s: Seconds until all are ended.

    Returns:
        What each printed.

    Raises:
        ChildError: One of them failed or is not done in time; none is left.
    """
    command = (sys.executable, "-P", "-m", f"{__package__}.{module}")
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        for more in environments
    ]
    deadline = time.monotonic() + limit_s
    try:
        return [_answer(child, max(0.1, deadline - time.monotonic())) for child in children]
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer within {limit_s:.0f} s") from None
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def _answer(child: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    out, err = child.communicate(timeout=limit_s)
    with contextlib.suppress(ValueError, IndexError):
        value = json.loads(out.splitlines()[-1])
        if child.returncode == 0 and isinstance(value, dict):
            return value
    lines = [line for line in err.splitlines() if line.strip()]
    how = f"exit code {child.returncode}"
    if child.returncode < 0:
        how = f"ended by signal {-child.returncode}"
    raise ChildError(redact_text(lines[-1].strip()[:300]) if lines else how)
