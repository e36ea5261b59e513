"""Dashboard: whoever reaches it may run anything on the cluster, so it has to ask for a token."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable

from .result import Result

CHECK = "dashboard"
_EXPECTED = "requests without a token refused"
_FIX = "start Ray with RAY_AUTH_MODE=token on every node, or let the network keep others out"
_LIMIT_S = 5.0


def where() -> str | None:
    """The dashboard of the cluster that this process is connected to; None if it has none."""
    from ray._private import worker

    # Ray tells this to whoever connects, and to nobody later.
    ask: Callable[[], str | None] | None = getattr(worker, "get_dashboard_url", None)
    try:
        return (ask() or None) if ask is not None else None
    except Exception:  # not connected, or Ray has moved it: there is nothing to look at
        return None


def probe(address: str) -> int | str:
    """The HTTP status that a request without a token gets, or why there is none."""
    url = address if "://" in address else f"http://{address}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/api/jobs/", timeout=_LIMIT_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def judge(status: int | str) -> Result:
    """The cluster's result. A warning: who submits has refused it already, or was told to go on."""
    if status in (401, 403):
        return Result("cluster", CHECK, "ok", f"HTTP status {status}", _EXPECTED)
    if isinstance(status, int) and status < 400:
        return Result("cluster", CHECK, "warn", "anybody who reaches it may", _EXPECTED, _FIX)
    return Result("cluster", CHECK, "warn", f"no clear answer ({status})", _EXPECTED, _FIX)
