"""Door: requests to a cluster's dashboard, and in plain words what is wrong when they fail."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import ClusterError
from ..redact import redact_text
from .clusters import Cluster
from .token import Token, read_token

_TIMEOUT_S = 30.0
_SHOWN = 400
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NoAnswer(ClusterError):
    """A request that may have been heard: whether it was done is not known."""


@dataclass(frozen=True)
class Answer:
    """What the dashboard said.

    Attributes:
        status: The HTTP status.
        body: The content.
    """

    status: int
    body: bytes

    def value(self) -> Any:
        """The content as JSON; None when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def last_line(self) -> str:
        """The last line that says something: of a traceback its error."""
        text = self.body.decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
        return redact_text(lines[-1][:_SHOWN]) if lines else f"HTTP status {self.status}"


class Door:
    """One cluster's dashboard. Redirects are not followed: they could carry the token away.

    Args:
        cluster: Which one.
        timeout_s: How long an answer may take.

    Raises:
        ClusterError: A token file that was named cannot be used.
    """

    def __init__(self, cluster: Cluster, timeout_s: float = _TIMEOUT_S) -> None:
        self.cluster = cluster
        self.token: Token = read_token(cluster)
        self._timeout_s = timeout_s
        parts = urlsplit(cluster.settings.address)
        self._secure, self._host = parts.scheme == "https", parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/")

    @property
    def address(self) -> str:
        """Of the dashboard."""
        return self.cluster.settings.address

    @property
    def headers(self) -> dict[str, str]:
        """What proves that we may."""
        return {"Authorization": f"Bearer {self.token.value}"} if self.token.value else {}

    @property
    def shows_token(self) -> bool:
        """Whether the token travels over a network unencrypted."""
        return bool(self.token.value) and not self._secure and self._host not in _LOOPBACK

    def ask(
        self, method: str, path: str, body: Any = None, *, token: bool = True, raw: bool = False
    ) -> Answer:
        """Send one request.

        Args:
            method: Of HTTP.
            path: From the root of the dashboard.
            body: Plain values that are sent as JSON; bytes are sent as they are.
            token: Send the token.
            raw: Return 401 and 403 as they are instead of raising.

        Raises:
            ClusterError: There was no answer, or it was that the token is missing or wrong.
        """
        headers = dict(self.headers) if token else {}
        if body is not None and not isinstance(body, bytes):
            headers["Content-Type"], body = "application/json", json.dumps(body).encode()
        answer = self._send(method, path, body, headers)
        if answer.status in (401, 403) and not raw:
            raise self._refused(answer.status)
        if 300 <= answer.status < 400:
            what = f"{self.address} sends requests elsewhere (HTTP status {answer.status})"
            raise ClusterError(what, "give the address of the dashboard itself")
        return answer

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, self._base + path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from None
        finally:
            connection.close()

    def _silent(self, error: Exception) -> ClusterError:
        """What to say about a cluster that does not answer."""
        where = f"cluster {self.cluster.name}"
        where += f" ({self.address})" if self.cluster.listed else ""
        tunnel = f"ssh -L {self._port}:127.0.0.1:{self._port} HEAD_NODE"
        fix = f"is it up? A dashboard that listens on its own machine only needs a tunnel: {tunnel}"
        if self._host not in _LOOPBACK:
            fix = "is it up, and is its dashboard open to this machine? `ray start --head "
            fix += f"--dashboard-host` says where it listens; through a tunnel: {tunnel}, "
            fix += f"and address http://127.0.0.1:{self._port}"
        if isinstance(error, socket.gaierror):
            return ClusterError(f"{where}: there is no machine `{self._host}`", "mend `address`")
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "reason", None) or str(error)
            what = f"{where}: no encrypted connection ({reason.lower()})"
            return ClusterError(what, "an address with http:// if it has no certificate")
        if isinstance(error, TimeoutError):
            return NoAnswer(f"{where} gave no answer in {self._timeout_s:g} s", fix)
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            return NoAnswer(f"{where} broke off the connection", fix)
        if isinstance(error, http.client.HTTPException):
            what = f"{where}: what answers there is no dashboard"
            return ClusterError(what, "the dashboard's port is 8265 where nothing else was chosen")
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ClusterError(f"{where} cannot be reached: {reason.lower()}", fix)

    def _refused(self, status: int) -> ClusterError:
        name = self.cluster.name
        show = "`ray get-auth-token` on the cluster shows it"
        if self.token.value is None:
            return ClusterError(
                f"cluster {name} asks for a token, and none was found ({self.token.source})",
                f"put it into a file that only you can read ({show}), and name the file: "
                "as `token` of the cluster in clusters.yaml, or in RAY_AUTH_TOKEN_PATH",
            )
        return ClusterError(
            f"cluster {name} refuses the token from {self.token.source} (HTTP status {status})",
            f"put the right one there; {show}",
        )
